"""The tools of the room: sizes bound by name, one message per fault."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gated_delta.errors import DeviceError, DtypeError, GradientError, LayoutError, OptionError, ShapeError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)
LARGEST = torch.finfo(torch.float64).max
HEAD_SIZES = (32, 64, 96, 128, 192, 256)
LISTED_HEAD_SIZES = ", ".join(map(str, HEAD_SIZES))


def describe_dtypes(dtypes: Collection[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


class Arguments:
    """Checks the tensors of one call, in the order in which they are given.

    A shape is written as names, ``"L HQ K"``: the first tensor that uses a name binds it, later ones must agree.
    ``N+1`` is one more than ``N``, ``>=B`` at least ``B``, a number is itself, and ``*`` is any size. A word of
    ``meant`` stands for other names in this call.
    """

    def __init__(self, where: str, **meant: str) -> None:
        self.where, self.meant = where, meant
        self.sizes: dict[str, int] = {}
        self.bound_by: dict[str, str] = {}
        self._device: tuple[str, torch.device] | None = None

    def tensor(
        self, name: str, value: Any, spec: str, dtypes: Collection[torch.dtype], *, optional: bool = False,
        any_stride: bool = False, written: bool = False, whole: bool = False,
    ) -> None:  # fmt: skip
        """Check one tensor: its type, rank and sizes, dtype, device, gradient and strides; None passes if optional."""
        if optional and value is None:
            return
        for word, names in self.meant.items():
            spec = spec.replace(word, names)
        if not isinstance(value, Tensor):
            must = f"a tensor [{', '.join(spec.split())}] of {describe_dtypes(dtypes)}"
            raise DtypeError(self.where, name, "None" if value is None else f"a {type(value).__name__}", must)
        self._shape(name, value, spec)
        if value.dtype not in dtypes:
            raise DtypeError(self.where, name, describe_dtypes([value.dtype]), describe_dtypes(dtypes))
        if self._device is None:
            self._device = (name, value.device)
        elif value.device != self._device[1]:
            must = f"on {self._device[1]}, where {self._device[0]} is"
            raise DeviceError(self.where, name, f"on {value.device}", must)
        if value.requires_grad and torch.is_grad_enabled():
            must = (
                "detached or used under torch.no_grad(): this operator has no gradient "
                "(gated_delta.reference has differentiable evaluations)"
            )
            raise GradientError(self.where, name, "a tensor that requires grad", must)
        if not any_stride and value.shape[-1] > 1 and value.stride(-1) != 1:
            was = f"strided by {value.stride(-1)} elements in its last dimension"
            raise LayoutError(self.where, name, was, "contiguous in its last dimension (other strides are free)")
        if written and any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride(), strict=True)):
            raise LayoutError(self.where, name, "a view whose rows share memory", "memory of its own: it is written")
        if whole and not value.is_contiguous():
            raise LayoutError(self.where, name, f"of strides {list(value.stride())}", "contiguous")

    def bind(self, symbol: str, size: int, name: str) -> bool:
        """Whether ``symbol`` has that size; if it had none, it has now, and from ``name``."""
        if symbol not in self.sizes:
            self.sizes[symbol] = size
            self.bound_by[symbol] = name
        return self.sizes[symbol] == size

    def number(self, name: str, value: Any, *, least: float = -LARGEST, optional: bool = False) -> None:
        if optional and value is None:
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise DtypeError(self.where, name, f"a {type(value).__name__}", "a number")
        if not -LARGEST <= value <= LARGEST:
            raise OptionError(self.where, name, value, "a finite number")
        if value < least:
            raise OptionError(self.where, name, value, f"at least {least}")

    def flag(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise DtypeError(self.where, name, f"a {type(value).__name__}", "True or False")

    def whole(self, name: str, value: Any, *, least: int) -> None:
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise DtypeError(self.where, name, f"a {type(value).__name__}", f"a whole number of at least {least}")
        if value < least:
            raise OptionError(self.where, name, value, f"at least {least}")
        if value >= 2**63:
            raise OptionError(self.where, name, value, "below 2**63")

    def word(self, name: str, value: Any, words: Collection[object], meaning: str = "") -> None:
        if value not in words:
            must = meaning or " or ".join(repr(w) for w in words)
            raise OptionError(self.where, name, repr(value), must)

    def excluded(self, name: str, present: bool, because: str) -> None:
        if present:
            raise OptionError(self.where, name, "given", f"left out: {because}")

    def needed(self, name: str, present: bool, because: str) -> None:
        if not present:
            raise OptionError(self.where, name, "None", f"given: {because}")

    def _shape(self, name: str, value: Tensor, spec: str) -> None:
        dims = spec.split()
        if value.dim() == len(dims) and all(map(self._fits, dims, value.shape, [name] * len(dims))):
            return
        names = (d.removeprefix(">=").removesuffix("+1") for d in dims)
        known = [f"{n}={self.sizes[n]} (from {self.bound_by[n]})" for n in names if self.bound_by.get(n, name) != name]
        must = f"[{', '.join(dims)}]" + (f" with {', '.join(known)}" if known else "")
        raise ShapeError(self.where, name, f"of shape {list(value.shape)}", must)

    def _fits(self, dim: str, size: int, name: str) -> bool:
        if dim.isdigit():
            return size == int(dim)
        if dim.startswith(">="):
            return size >= self.sizes[dim[2:]]
        if dim.endswith("+1"):
            return size >= 1 and self.bind(dim[:-2], size - 1, name)
        return dim == "*" or self.bind(dim, size, name)
