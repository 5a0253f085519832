"""Launching kernels with little work on the host.

``kernel[grid](...)`` sorts a call's arguments anew each time, which costs more than a decode step takes. :func:`bind`
does it once for all calls that Triton would serve with one compiled kernel, and what it returns needs their pointers
alone. It calls the compiled kernel as ``JITFunction.run`` does (unchanged from Triton 3.6 to 3.9).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction

from gated_delta.errors import BackendError

Start = Callable[..., None]
"""Runs a bound kernel on the current stream of its device; takes what is not bound, pointers as numbers."""
_COMPILED: dict[tuple[Any, ...], Any] = {}


def bind(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], *, warps: int, stages: int = 1,
    registers: int | None = None, bound: int = 0,
) -> Start:  # fmt: skip
    """Compile ``kernel`` for such arguments, or take what was compiled (in this process, or in Triton's disk cache).

    Args:
        args: tensors, numbers and None, in the order of the kernel's parameters; the first is a tensor.
        constants: its ``tl.constexpr`` parameters, which come after ``args``.
        registers: most that a thread may take, so that more programs run side by side.
        bound: how many of ``args``, from the end, keep their values.
    """
    rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    device = args[0].get_device()
    key = (kernel.fn, device, warps, stages, registers, rest, *map(_trait, args))
    compiled = _COMPILED.get(key)
    if compiled is None:
        with torch.cuda.device(device), newest_assembler(torch.cuda.get_device_capability()):
            compiled = kernel.warmup(*args, *rest, grid=grid, num_warps=warps, num_stages=stages, maxnreg=registers)
            compiled._init_handles()  # loads it onto this device
        _COMPILED[key] = compiled
    return _start(compiled, (*grid, 1, 1)[:3], (*args[len(args) - bound :], *rest), device)


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


def _start(compiled: Any, grid: tuple[int, ...], rest: tuple[Any, ...], device: int) -> Start:
    run, function, packed, runtime = compiled.run, compiled.function, compiled.packed_metadata, knobs.runtime
    current_device, current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def start(*args: object) -> None:
        if current_device() != device:
            with torch.cuda.device(device):
                start(*args)
            return
        stream, enter, leave = current_stream(device), runtime.launch_enter_hook, runtime.launch_exit_hook
        if not enter.calls and not leave.calls:  # nobody profiles
            run(*grid, stream, function, packed, None, None, None, *args, *rest)
            return
        metadata = compiled.launch_metadata(grid, stream, *args, *rest)
        run(*grid, stream, function, packed, metadata, enter, leave, *args, *rest)

    return start


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], **options: int) -> None:
    """Run ``kernel`` on the current stream of the device of its first argument; as :func:`bind` has it."""
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*args, **constants)
        return
    start = bind(kernel, grid, args, constants, **options)
    start(*(x.data_ptr() if isinstance(x, Tensor) else x for x in args))


def _trait(x: Tensor | TensorDescriptor | float | None) -> object:
    """What Triton compiles for: a tensor's dtype and whether it begins at a multiple of 16 bytes; what the copy engine
    takes of a tensor at once; a number's type and size, whether it is 1, whether 16 divides it.
    """
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if x is None or isinstance(x, float):
        return type(x)
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


def strides(x: Tensor | None, *dims: int) -> tuple[int, ...]:
    """Strides of x along ``dims``, zeros without it."""
    return tuple(x.stride(dim) for dim in dims) if x is not None else (0,) * len(dims)
