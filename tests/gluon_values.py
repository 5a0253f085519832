"""Values and pointers of a Gluon kernel on a CPU: torch tensors with what its language has for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

FLOATS = {gl.bfloat16: torch.bfloat16, gl.float16: torch.float16, gl.float32: torch.float32}
TORCH = {**FLOATS, gl.int32: torch.int32, gl.int64: torch.int64, gl.int1: torch.bool}
GLUON = {ours: theirs for theirs, ours in TORCH.items()}


class KernelError(AssertionError):
    """The kernel did what a GPU would not forgive."""


class Value:
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data: Any) -> None:
        self.data = torch.as_tensor(data)

    dtype = property(lambda self: GLUON[self.data.dtype])
    shape = property(lambda self: tuple(self.data.shape))

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        return Value(self.data.view(TORCH[dtype]) if bitcast else self.data.to(TORCH[dtype]))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __invert__(self) -> Value:
        return Value(~self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def raw(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _add_operator(name: str, apply: Callable[[Any, Any], Any]) -> None:
    def combined(a: Any, b: Any) -> Value:
        if isinstance(a, Tensor) and isinstance(b, Tensor):  # also where one is a scalar, unlike torch
            common = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(common), b.to(common)
        return Value(apply(a, b))

    def forward(self: Value, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else combined(self.data, raw(other))

    setattr(Value, f"__{name}__", forward)
    setattr(Value, f"__r{name}__", lambda self, other: combined(torch.as_tensor(other), self.data))


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor"):
    _add_operator(_name, getattr(operator, f"__{_name}__"))
_add_operator("floordiv", lambda a, b: torch.div(a, b, rounding_mode="trunc"))
_add_operator("mod", lambda a, b: torch.fmod(a, torch.as_tensor(b)))


class Pointer:
    """Addresses in the memory under a tensor."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=GLUON[memory.dtype])

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + raw(other))

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, and which of them are meant."""
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(raw(mask)))
        meant = offset[mask]
        if bool(((meant < 0) | (meant >= len(self.memory))).any()):
            raise KernelError(f"a pointer leaves its tensor's memory of {len(self.memory)} numbers")
        return offset, mask

    def load(self, mask: Any = True, other: Any = 0) -> Value:
        offset, mask = self.places(mask)
        loaded = torch.full(offset.shape, other, dtype=self.memory.dtype)
        loaded[mask] = self.memory[offset[mask]]
        return Value(loaded)

    def store(self, value: Any, mask: Any = True) -> None:
        offset, mask = self.places(mask)
        self.memory[offset[mask]] = torch.as_tensor(raw(value)).expand(offset.shape)[mask].to(self.memory.dtype)


class Tiled:
    """A tensor that the copy engine takes tiles of, and stores tiles into."""

    def __init__(self, descriptor: Any) -> None:
        self.whole = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
        self.dtype = GLUON[descriptor.base.dtype]

    def tile(self, place: Sequence[Any], shape: Sequence[int]) -> Tensor:
        """What of a tile lies inside."""
        return self.whole[tuple(slice(int(raw(x)), int(raw(x)) + n) for x, n in zip(place, shape, strict=True))]


def argument(x: Any) -> Any:
    """What a kernel sees of an argument."""
    if isinstance(x, Tensor):
        return Pointer.to(x)
    return Tiled(x) if isinstance(x, TensorDescriptor) else x
