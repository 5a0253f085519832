"""Triton's interpreter made right for what our kernels use: kernels run on CPU tensors, program by program.

Three gaps of Triton 3.6 are closed: it stores bf16 as 16-bit integers and multiplies those in ``tl.dot``, it cuts fp32
off to bf16 where GPUs round to nearest, and ``range`` over a value known only at run time fails with NumPy 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _as_float(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _create_dot(
    self: Any, a: Any, b: Any, d: Any, input_precision: object, max_num_imprecise_acc: object
) -> interpreter.TensorHandle:
    product = np.matmul(_as_float(a), _as_float(b)) + d.data
    return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


_cast_impl = interpreter.InterpreterBuilder.cast_impl


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _cast_impl(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
    high = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), high), tl.bfloat16)


def install() -> None:
    """Close the gaps, for this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *args: Any, **options: Any) -> None:
        patch(tensor, *args, **options)
        scope = args[0] if args else options.get("scope")

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(()))

        if scope is not None:
            scope.set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch_tensor
