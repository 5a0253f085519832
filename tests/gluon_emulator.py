"""Gluon kernels on CPU tensors, without a compiler: their Python runs as it stands, and their mistakes are found.

Put :func:`bind` in the place of ``gated_delta.kernels.triton.launch.bind``. What is checked: gluon_block.py;
shared memory begins as NaN, and a pointer that leaves its tensor's memory is an error. Layouts are ignored, for the
compiler checks them.
"""

from __future__ import annotations

import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction

from gated_delta.kernels.triton.launch import at
from gluon_block import (
    Barriers,
    Block,
    Memory,
    Shared,
    fence_async_shared,
    here,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gluon_copies import copies_arrive, copy_tile, copy_to_shared, store_tile, store_wait
from gluon_values import TORCH, KernelError, Value, argument, raw


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: object = None, value: Value | None = None) -> Any:
    if here.partition.products:
        raise KernelError(f"{here.partition.agent.name} allocates while its products run, whose operands it may get")
    if dtype == gl.int64:
        return Barriers(shape[0])
    shared = Shared(Memory(), torch.full(tuple(shape), math.nan, dtype=TORCH[dtype]))
    if value is not None:
        shared.store(value)
    return shared


def mma_v2(a: Value, b: Value, acc: Value) -> Value:
    """A product of warps, done when it returns."""
    if not a.dtype == b.dtype in (gl.bfloat16, gl.float16):
        raise KernelError(f"a product of {a.dtype} and {b.dtype}")
    return Value(acc.data + a.data.float() @ b.data.float())


def associative_scan(x: Value, axis: int, combine: Callable[[Any, Any], Value]) -> Value:
    parts = (Value(part) for part in x.data.unbind(axis))
    return Value(torch.stack([part.data for part in itertools.accumulate(parts, combine)], axis))


def _pointwise(function: Callable[..., Tensor]) -> Callable[..., Value]:
    return lambda *args: Value(function(*(torch.as_tensor(raw(x)) for x in args)))


def _no_layout(*args: object, **options: object) -> None: ...


LAYOUTS = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout", "SwizzledSharedLayout")
POINTWISE = ("abs", "exp", "exp2", "floor", "log2", "maximum", "minimum", "rsqrt", "where")
LANGUAGE = SimpleNamespace(
    **{name: getattr(gl, name) for name in ("bfloat16", "float16", "float32", "int1", "int32", "int64")},
    **dict.fromkeys(LAYOUTS, _no_layout),
    **{name: _pointwise(getattr(torch, name)) for name in POINTWISE},
    NVMMASharedLayout=SimpleNamespace(get_default_for=_no_layout),
    constexpr=lambda x: x,
    static_range=range,
    program_id=lambda axis: Value(here.partition.block.place[axis]),
    num_programs=lambda axis: Value(here.partition.block.grid[axis]),
    load=lambda pointer, mask=True, other=0: pointer.load(mask, other),
    store=lambda pointer, value, mask=True: pointer.store(value, mask),
    arange=lambda start, end, layout=None: Value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(*shape, dtype=TORCH[dtype])),
    full=lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=TORCH[dtype])),
    sum=lambda x, axis: Value(x.data.sum(axis)),
    max=lambda x, axis: Value(x.data.amax(axis)),
    reshape=lambda x, shape: Value(x.data.reshape(shape)),
    permute=lambda x, order: Value(x.data.permute(order)),
    convert_layout=lambda x, layout: x,
    join=lambda x, y: Value(torch.stack((x.data, y.data), -1)),
    split=lambda x: tuple(map(Value, x.data.unbind(-1))),
    to_tensor=lambda x: x if isinstance(x, Value) else Value(x),
    associative_scan=associative_scan,
    allocate_shared_memory=allocate_shared_memory,
    inline_asm_elementwise=_no_layout,
    warp_specialize=lambda parts, warps, registers: here.partition.block.specialize(parts, warps),
)
REPLACED: dict[int, Any] = {
    id(gl): LANGUAGE,
    id(hopper.mbarrier): SimpleNamespace(
        MBarrierLayout=_no_layout,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        arrive=lambda barrier, count=1: barrier.arrive(here.partition.agent, count),
        expect=lambda barrier, size: barrier.expect(here.partition.agent, size),
    ),
    id(async_copy): SimpleNamespace(
        async_copy_global_to_shared=copy_to_shared,
        async_load=copy_to_shared,
        mbarrier_arrive=copies_arrive,
    ),
    id(hopper.fence_async_shared): fence_async_shared,
    id(hopper.mma_v2): mma_v2,
    id(hopper.tma): SimpleNamespace(store_wait=store_wait),
    id(hopper.warpgroup_mma): warpgroup_mma,
    id(hopper.warpgroup_mma_wait): warpgroup_mma_wait,
}
for _module, _ours, *_names in (  # the same: since Triton 3.8, and before 3.9
    (async_copy, copy_to_shared, "async_load", "async_copy_global_to_shared"),
    (hopper.tma, copy_tile, "async_load", "async_copy_global_to_shared"),
    (hopper.tma, store_tile, "async_store", "async_copy_shared_to_global"),
):
    REPLACED |= {id(getattr(_module, name)): _ours for name in _names if hasattr(_module, name)}
Edits = Mapping[str, Sequence[tuple[str, str]]]
"""By function, its module before it where two have the name: pieces of its source that are replaced, and what by."""


class Plain:
    """A kernel's functions as plain Python, with this module's things for Gluon's."""

    def __init__(self, edits: Edits) -> None:
        self.edits, self.modules = edits, dict[int, dict[str, Any]]()

    def function(self, kernel: Any) -> Callable[..., None]:
        names, function = self.names(kernel.fn.__globals__), kernel.fn
        own = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        edits = (*self.edits.get(function.__name__, ()), *self.edits.get(own, ()))
        if not edits:
            return FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        source = textwrap.dedent(inspect.getsource(function))
        source = source[source.index("def ") :]
        for old, new in edits:
            if old not in source:
                raise LookupError(f"{function.__name__} has no {old!r}")
            source = source.replace(old, new)
        changed: dict[str, Any] = {}
        exec(source, names, changed)
        return changed[function.__name__]

    def names(self, module: dict[str, Any]) -> dict[str, Any]:
        if id(module) not in self.modules:
            ours = self.modules[id(module)] = {}
            for name, x in module.items():
                if isinstance(x, GluonJITFunction):
                    ours[name] = self.function(x)
                else:
                    ours[name] = x.value if isinstance(x, gl.constexpr) else REPLACED.get(id(x), x)
        return self.modules[id(module)]


def bind(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], **options: Any
) -> Callable[..., None]:  # fmt: skip
    """As the library's, with tensors for addresses."""
    tiles = {i: at(x, None) for i, x in enumerate(args) if isinstance(x, TensorDescriptor)}

    def start(*given: Any) -> None:
        launch(kernel, grid, [at(tiles[i], x) if i in tiles else x for i, x in enumerate(given)], constants, **options)

    return start


def launch(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], *, warps: int,
    edits: Edits = MappingProxyType({}), seed: int = 0, **others: object,
) -> None:  # fmt: skip
    """Run a Gluon kernel, or one of Triton's in Triton's interpreter. ``others`` concern the compiler."""
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*args, **constants)
        return
    function = Plain(edits).function(kernel)
    given = list(map(argument, args))
    given += [constants[name] for name in kernel.arg_names[len(args) :]]
    for place in itertools.product(*map(range, grid)):
        block = Block(place, grid, warps, seed)
        here.partition = block.main
        function(*given)
        block.end()
        seed += 1
