"""The gated norm: several rows a program, each held in registers between its sum of squares and its output."""

import triton
import triton.language as tl
from torch import Tensor

from gated_delta.kernels.triton.launch import Launches, Start, power_of_2
from gated_delta.kernels.triton.shared import sigmoid
from gated_delta.library import RmsNormGated, run, tensors

_ELEMENTS = 2048
"""Elements of a program of four warps: a thread reads two times 16 bytes of x and of z in bf16."""


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, x_outer, x_inner, z, z_outer, z_inner, weight, output, eps, rows, inner, V,
    BV: tl.constexpr, BR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Row ``outer * inner + i`` of the output is row ``(outer, i)`` of x and z."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.arange(0, BV)[None, :]
    mask = (row < rows)[:, None] & (column < V)
    far, near = (row // inner).to(tl.int64)[:, None], (row % inner).to(tl.int64)[:, None]
    x_row = tl.load(x + far * x_outer + near * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    z_row = tl.load(z + far * z_outer + near * z_inner + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_row * x_row, 1) / V + eps)
    gate = sigmoid(z_row)
    if SILU:
        gate *= z_row
    y = tl.where(x_row == 0.0, 0.0, x_row * inverse[:, None] * scale * gate)
    tl.store(output + row.to(tl.int64)[:, None] * V + column, y.to(output.dtype.element_ty), mask=mask)


def _rows(x: Tensor, z: Tensor) -> list[tuple[int, int, int]]:
    """(size, stride of x, stride of z) of the leading dimensions of both, as few as their strides allow."""
    merged: list[tuple[int, int, int]] = []
    for size, x_stride, z_stride in zip(x.shape[:-1], x.stride()[:-1], z.stride()[:-1], strict=True):
        if size == 1:
            continue
        outer = merged.pop()[0] if merged and merged[-1][1:] == (size * x_stride, size * z_stride) else 1
        merged.append((outer * size, x_stride, z_stride))
    return merged


def rms_norm_gated(call: RmsNormGated) -> None:
    """Of copies, where no two strides reach all rows."""
    run("rms_norm_gated", call._replace(x=call.x.contiguous(), z=call.z.contiguous()), "triton")


def bound_rms_norm_gated(call: RmsNormGated) -> Start | None:
    launches, (x, z, weight, eps, activation, output) = Launches(*tensors(call)), call
    dims = _rows(x, z)
    if len(dims) > 2:
        return None
    (outer, x_outer, z_outer), (inner, x_inner, z_inner) = [*dims, (1, 0, 0), (1, 0, 0)][:2]
    rows, size = outer * inner, x.shape[-1]
    block = power_of_2(max(1, size))
    together = max(1, _ELEMENTS // block)
    args = (x, x_outer, x_inner, z, z_outer, z_inner, weight, output, eps, rows, inner, size)
    constants = {"BV": block, "BR": together, "SILU": activation != "sigmoid"}
    launches.add(_norm_kernel, (-(-rows // together) if size else 0,), args, constants, warps=4)
    return launches.bound()
