"""Launching kernels with little work on the host.

``kernel[grid](...)`` sorts a call's arguments anew each time, which costs more than a decode step takes. :func:`bind`
does it once for all calls that Triton would serve with one compiled kernel, and what it returns takes arguments as they
are. It calls the compiled kernel as ``JITFunction.run`` does (unchanged from Triton 3.6 to 3.9).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction

from gated_delta.errors import BackendError
from gated_delta.library import address

Start = Callable[..., None]
"""Runs a bound kernel on the current stream of its device. It takes numbers, and the
:func:`gated_delta.library.address` of a tensor or of what a descriptor describes.
"""
_COMPILED: dict[tuple[Any, ...], Any] = {}


def bind(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], *, warps: int, stages: int = 1,
    registers: int | None = None, beside: bool = False,
) -> Start:  # fmt: skip
    """Compile ``kernel`` for such arguments, or take what was compiled (in this process, or in Triton's disk cache).

    Args:
        args: tensors, descriptors, numbers and None, in the order of the kernel's parameters. A tensor on "meta" stands
            for memory that begins at a multiple of 16 bytes.
        constants: its ``tl.constexpr`` parameters, which come after ``args``.
        registers: most that a thread may take, so that more programs run side by side.
        beside: begin as soon as all programs of the kernel before let it (programmatic dependent launch).
    """
    if isinstance(kernel, InterpretedFunction):
        return lambda *given: kernel[grid](*given, **constants)
    rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    device = next(i for x in args if isinstance(x, Tensor) and (i := x.get_device()) >= 0)
    traits = [_number(x) if isinstance(x, int) else _trait(x) for x in args]
    key = (kernel.fn, device, warps, stages, registers, beside, rest, *traits)
    compiled = _COMPILED.get(key)
    if compiled is None:
        with torch.cuda.device(device), newest_assembler(torch.cuda.get_device_capability()):
            options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "launch_pdl": beside}
            compiled = kernel.warmup(*args, *rest, grid=grid, **options)
            compiled._init_handles()  # loads it onto this device
        _COMPILED[key] = compiled
    tiles = [(i, at(x, None)) for i, x in enumerate(args) if isinstance(x, TensorDescriptor)]
    return _start(compiled, (*grid, 1, 1)[:3], tiles, rest, device)


@contextmanager
def newest_assembler(capability: tuple[int, int]) -> Iterator[None]:
    """On Hopper, compile with the newer of the two assemblers that Triton brings (``TRITON_PTXAS_PATH`` and
    ``TRITON_PTXAS_BLACKWELL_PATH`` name others). ptxas 12.8, which Triton 3.6 and 3.7 would take, forgets to clear a
    register from which it makes descriptors of wgmma's operands, so that products read elsewhere (docs/kernels.md).

    Raises:
        BackendError: neither is of version 12.9 or later.
    """
    if capability[0] != 9:
        yield
        return
    version, path = max((_version(tool), tool.path) for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell))
    if version < (12, 9):
        was, must = f"{path} of version {'.'.join(map(str, version))}", "12.9 or later on Hopper"
        raise BackendError("triton", "ptxas", was, must)
    get_ptxas_version(10 * capability[0])  # is a part of all names in Triton's disk cache, and asked for but once
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = path
        yield


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))


def _start(
    compiled: Any, grid: tuple[int, ...], tiles: list[tuple[int, TensorDescriptor]], rest: tuple[Any, ...], device: int
) -> Start:
    run, function, packed, runtime = compiled.run, compiled.function, compiled.packed_metadata, knobs.runtime
    current_device, current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def start(*given: Any) -> None:
        if current_device() != device:
            with torch.cuda.device(device):
                start(*given)
            return
        args = [*given, *rest]
        for i, tile in tiles:
            args[i] = at(tile, _Base(given[i]))
        stream, enter, leave = current_stream(device), runtime.launch_enter_hook, runtime.launch_exit_hook
        hooks = None, None, None
        if enter.calls or leave.calls:  # somebody profiles
            hooks = compiled.launch_metadata(grid, stream, *args), enter, leave
        run(*grid, stream, function, packed, *hooks, *args)

    return start


class _Base(int):
    """What Triton reads the address of a descriptor from."""

    data_ptr = int.__int__


def at(look: TensorDescriptor, base: Any) -> TensorDescriptor:
    """A descriptor of other memory that looks alike. (To make one anew is to have it judged anew.)"""
    other = object.__new__(TensorDescriptor)
    other.__dict__ = {**look.__dict__, "base": base}
    return other


class Launches:
    """The kernels that a call starts, one after the other, bound to what its tensors look like: what :meth:`bound`
    gives takes the addresses of those ``given``, in their order. Other tensors have to stay where they are.
    """

    def __init__(self, *given: Tensor | None) -> None:
        self._given = given
        self._parts: list[Tensor] = []
        self._starts: list[tuple[Start, list[Any]]] = []
        self._zeros = False

    def scratch(self, *shape: int, dtype: torch.dtype, zeros: bool = False) -> Tensor:
        """Memory for the time of a call, all of it ``zeros`` if some is; gives what stands for it."""
        self._zeros |= zeros
        self._parts.append(torch.empty(shape, dtype=dtype, device="meta"))
        return self._parts[-1]

    def add(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], **options: Any
    ) -> None:
        """One kernel more, unless its grid is empty; as :func:`bind` has it."""
        if 0 not in grid:
            places = [x.base if isinstance(x, TensorDescriptor) else x for x in args]
            self._starts.append((bind(kernel, grid, args, constants, **options), places))

    def bound(self) -> Start:
        """All of them as one, which keeps no tensor of the call."""
        place = {id(x): i for i, x in enumerate((*self._given, *self._parts))}
        parts, begin, starts = self._parts, len(self._given) + len(self._parts), []
        for start, args in self._starts:  # what is not known by then stands behind what is
            chosen = itemgetter(*[place.get(id(x), i) for i, x in enumerate(args, begin)])
            stay = [x if isinstance(x, (int, float)) else None if id(x) in place else address(x) for x in args]
            starts.append((start, chosen, stay))
        *offsets, size = accumulate((-(-x.nbytes // 256) * 256 for x in parts), initial=0)
        like = next(x for x in self._given if x is not None).new_empty(0, dtype=torch.uint8)
        make = like.new_zeros if self._zeros else like.new_empty

        def run(*given: Any) -> None:
            if parts:
                room = make(size)
                if room.is_cuda:
                    begin = room.data_ptr()
                    given += tuple([begin + offset for offset in offsets])
                else:
                    views = zip(offsets, parts, strict=True)
                    given += tuple([room[i : i + x.nbytes].view(x.dtype).view(x.shape) for i, x in views])
            for start, chosen, stay in starts:
                start(*chosen((*given, *stay)))

        return run


def _trait(x: Any) -> object:
    """What Triton compiles for: a tensor's dtype and whether it begins at a multiple of 16 bytes; what the copy engine
    takes of a tensor at once; a number's type.
    """
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if x is None or isinstance(x, float):
        return type(x)
    return x.base.dtype, *x.block_shape


@lru_cache(1 << 14)
def _number(x: int) -> object:
    """The same of a whole number: whether it is 1, whether 16 divides it, its size."""
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


def power_of_2(x: int) -> int:
    """The next one. (Triton's own takes two microseconds.)"""
    return 1 << (x - 1).bit_length()


def strides(x: Tensor | None, *dims: int) -> tuple[int, ...]:
    """Strides of x along ``dims``, zeros without it."""
    return tuple(x.stride(dim) for dim in dims) if x is not None else (0,) * len(dims)
