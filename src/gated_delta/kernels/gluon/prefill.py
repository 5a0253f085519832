"""Prefill on Hopper: one launch, two, four where the parts of sequences are worked on side by side, or two for each
part of a sequence in turn. Grids and memory follow from shapes alone, for CUDA graphs.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gated_delta.kernels.gluon.chain import chain
from gated_delta.kernels.gluon.parts import states_before, summary
from gated_delta.kernels.gluon.prepare import VECTORS, prepare
from gated_delta.kernels.triton.launch import Launches, Start, strides
from gated_delta.library import Prefill, tensors

CHUNK = 64
REGISTERS = {1: (40,), 2: (232, 40), 3: (160, 120, 72)}
"""By groups that compute: of a thread of the second that keeps 64 values, of one that inverts, of one that loads."""
PREPARE_REGISTERS = {torch.bfloat16: 96, torch.float16: 128}
"""Five programs of :func:`prepare` on a processor; fp16, which takes two parts in more products, has four."""
STAGES = 3
"""Chunks whose q and k have room. fp16 has room for two in programs that prepare: N has two parts."""
ROWS = 16
"""Values of a state that a program of :func:`states_before` takes."""
PREPARE_US, BESIDE_US, ALONE_US, CHUNK_US, MAKE_US, SUMMARY_US = 2.1, 2.25, 1.0, 1.72, 3.4, 1.15
"""What a chunk takes: of a processor to be prepared, and beside a chain; where one group has a processor, where two
have, and where two more prepare it; of a summary. From measurements on an H200 (docs/prefill.md), as what follows.
"""
LAUNCH_US, JOB_US, PART_US, SPLIT_US = 3.0, 4.6, 3.0, 4.0
"""What takes a launch; a job, beside its chunks; a part on the way through a sequence; two launches more for parts."""
MOST_TURNS = 16

Made = tuple[Tensor, Tensor, Tensor]
"""Of all chunks: X, the transpose of P', and vectors."""


class Plan(NamedTuple):
    """How the chunks are gone through."""

    groups: int
    """Of 64 values of a state, in a program."""
    part: int = 0
    """Tokens of a part, 0 for whole sequences."""
    make: bool = False
    """Whether a program prepares its chunks itself."""
    in_turn: bool = False
    """Whether the parts, of one sequence alone, are gone through one after the other, the next one prepared meanwhile
    on processors that the states leave idle; no bit hangs on it.
    """


PLANS = Plan(1), Plan(2), Plan(2, make=True), Plan(1, CHUNK), Plan(2, CHUNK), Plan(1, CHUNK, in_turn=True)
"""All for which something else is compiled."""
_TAKEN: ContextVar[Plan | None] = ContextVar("plan", default=None)


def planned(chosen: Plan, case: Callable[[], object]) -> None:
    """Run ``case`` with this plan for every call of its own, to compile what it takes."""
    context = copy_context()
    context.run(_TAKEN.set, chosen)
    context.run(case)


def plan(total: int, count: int, heads: int, processors: int, whole: bool) -> Plan:
    """What is soonest done, if all sequences are as long as the mean; ``whole`` sequences if they must be."""
    chunks = -(-total // (CHUNK * max(count, 1)))
    step = 1 << max(chunks.bit_length() - 4, 0)  # few different ones, for the cache
    groups, parts, *how = _soonest(-(-chunks // step) * step, count, heads, processors, whole)
    return Plan(groups, CHUNK * -(-chunks // parts) if parts > 1 else 0, *how)


@cache
def _soonest(chunks: int, count: int, heads: int, processors: int, whole: bool) -> tuple[int, int, bool, bool]:
    """Groups, parts, whether programs prepare, and whether parts come in turn, for sequences of so many chunks."""
    states = count * heads
    best, least = (2, 1, True, False), -(-states // processors) * (MAKE_US * chunks + JOB_US)
    most = 1 if whole else min(chunks, 3 * processors // max(states, 1) + 1)
    for parts in range(1, most + 1):
        length = -(-chunks // parts)
        before = PREPARE_US * chunks * states / processors + LAUNCH_US
        if parts > 1:
            summaries = -(-2 * states * (parts - 1) // processors)
            before += summaries * SUMMARY_US * length + parts * PART_US + SPLIT_US
        for groups, each in ((2, CHUNK_US), (1, ALONE_US)):
            needed = -(-states * parts * 2 // (groups * processors)) * (each * length + JOB_US) + before
            if needed < least:
                best, least = (groups, parts, False, False), needed
    idle = processors - 2 * heads
    for parts in range(2, min(chunks, MOST_TURNS) + 1) if count == 1 and idle > 0 else ():
        length = -(-chunks // parts)
        each = max(ALONE_US, BESIDE_US * heads / idle) * length + JOB_US + LAUNCH_US
        needed = parts * each + PREPARE_US * length * heads / processors
        if needed < least:
            best, least = (1, parts, False, True), needed
    return best


def tileable(x: Tensor) -> bool:
    """Whether tiles of ``[L, H, 128]`` can be taken: the copy engine wants 16 bytes, the compiler strides of 32."""
    row, head = x.stride(0), x.stride(1)
    return x.data_ptr() % 16 == 0 and row % 16 == 0 and head % 16 == 0 and row >= (x.shape[1] - 1) * head + 128


def rows(x: Tensor, columns: int = 128) -> TensorDescriptor:
    """64 tokens of so many columns of ``[L, H, 128]``, whose heads lie next to each other in a row."""
    shape = [x.shape[0], (x.shape[1] - 1) * x.stride(1) + 128]
    return _descriptor(x, shape, [x.stride(0), 1], columns)


def tiles(x: Tensor) -> TensorDescriptor:
    """Those of ``[.., 64, C]``, contiguous."""
    columns = x.shape[-1]
    return _descriptor(x, [x.numel() // columns, columns], [columns, 1], columns)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], columns: int) -> TensorDescriptor:
    block = [CHUNK, columns]
    return TensorDescriptor(x, shape, strides, block, _layout(columns, x.dtype))


@cache
def _layout(columns: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(
        [CHUNK, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _gate(device: torch.device, value: float) -> Tensor:
    """One that was left out."""
    return torch.full((1,), value, device=device)


def bound_prefill(call: Prefill) -> Start:
    """``chunk_gated_delta_rule`` for K = V = 128 and activations of 16 bits: takes the addresses of the tensors."""
    launches = Launches(*tensors(call))
    (total, heads, _), count = call.output.shape, call.cu_seqlens.shape[0] - 1
    # Parts side by side change bits, and a checkpoint has those of the final state of a prefix.
    whole = call.batch_invariant or call.checkpoints is not None
    chosen = _TAKEN.get() or plan(total, count, heads, _processors(call.q.device), whole)
    if total == 0 and count == 0:
        return launches.bound()
    if total == 0:  # the copy engine wants addresses
        q, k, v = (launches.scratch(1, *y.shape[1:], dtype=y.dtype) for y in (call.q, call.k, call.v))
        call = call._replace(q=q, k=k, v=v)
    slots, alone = total // CHUNK + max(count, 1), chosen.in_turn and count == 1
    turns, each = (-(-total // chosen.part), chosen.part // CHUNK) if alone else (1, slots)
    made, states = None, launches.scratch(1, heads, 128, 128, dtype=torch.float32) if alone else None
    if not chosen.make:
        x, p = (launches.scratch(slots, heads, CHUNK, columns, dtype=call.q.dtype) for columns in (128, CHUNK))
        made = x, p, launches.scratch(slots, heads, VECTORS.value, dtype=torch.float32)
    for turn in range(turns):
        if made is not None:
            first = turn * each
            _prepare(call, launches, made, first, min(each, slots - first), beside=turn > 0)
            if chosen.part and not alone:
                states = _states_before(call, launches, made, chosen.part)
        _go_through(call, launches, chosen, made, states, (turn, turns) if alone else None)
    return launches.bound()


def _go_through(
    call: Prefill, launches: Launches, chosen: Plan, made: Made | None, states: Tensor | None,
    turn: tuple[int, int] | None,
) -> None:  # fmt: skip
    """Take states through chunks. ``states``: those that parts start from, or with a turn, which of how many, what one
    leaves to the next.
    """
    q, k, v, output, cu_seqlens = call.q, call.k, call.v, call.output, call.cu_seqlens
    (total, heads, _), count = output.shape, cu_seqlens.shape[0] - 1
    groups, part, make, _ = chosen
    x, p, vectors = made or (None, None, None)
    g, beta = _gates(call) if make else (None, None)
    source, has_initial_state, steps = call.source, call.has_initial_state, (0, *strides(call.source, 0))
    first, places, carry = 0, count + (total // part if part else 0), None
    jobs = places + call.zero_padding
    if turn is not None:
        (first, places), carry = turn, states
        jobs = 1 + (call.zero_padding and first + 1 == places)
    if states is not None and (turn is None or first > 0):
        source, has_initial_state, steps = states, None, (states.stride(0) if turn is None else 0, 0)
    halves = heads * 2 // groups
    args = (
        rows(q), rows(k), rows(v, 64), x if x is None else tiles(x), p if p is None else tiles(p), vectors, g, beta,
        cu_seqlens, call.state_indices, source, has_initial_state, call.final_state, carry, call.checkpoints,
        call.checkpoint_starts, output, call.scale, call.null_slot, total, count, part, halves, places, first,
        halves * jobs, call.checkpoint_every, q.stride(1), k.stride(1), v.stride(1), *strides(g, 0, 1),
        *strides(beta, 0, 1), *strides(output, 0, 1), *strides(cu_seqlens, 0), *strides(call.state_indices, 0),
        *strides(has_initial_state, 0), *strides(call.checkpoint_starts, 0), *steps, *strides(source, 1, 2),
        *strides(call.final_state, 0, 1, 2), *strides(call.checkpoints, 0, 1, 2),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "RQ": heads // q.shape[1], "RK": heads // k.shape[1], "RV": heads // v.shape[1], "GROUPS": groups,
        "STAGES": min(STAGES, 2) if make and q.dtype == torch.float16 else STAGES, "PARTS": part > 0, "MAKE": make,
        "NORM": make and call.use_qk_l2norm, "LOG": make and call.log_gates, "ZERO_PADDING": call.zero_padding,
        "REGISTERS": REGISTERS[groups + make],
    }  # fmt: skip
    launches.add(chain, (min(halves * jobs, _processors(q.device)),), args, constants, warps=4)


def _gates(call: Prefill) -> tuple[Tensor, Tensor]:
    given = (call.g, float(not call.log_gates)), (call.beta, 1.0)
    size = call.output.shape[:2]
    g, beta = (_gate(call.output.device, value).expand(size) if x is None else x for x, value in given)
    return g, beta


def _prepare(call: Prefill, launches: Launches, made: Made, first: int, slots: int, *, beside: bool) -> None:
    """What the chunks in so many slots do; ``beside`` the launch before, which ends no later."""
    q, k, cu_seqlens, state_indices = call.q, call.k, call.cu_seqlens, call.state_indices
    (x, p, vectors), heads, count = made, call.output.shape[1], cu_seqlens.shape[0] - 1
    g, beta = _gates(call)
    args = (
        rows(q), rows(k), tiles(x), tiles(p), g, beta, cu_seqlens, state_indices, vectors, call.scale,
        call.null_slot, count, heads, first, slots * heads, q.stride(1), k.stride(1), *strides(g, 0, 1),
        *strides(beta, 0, 1), *strides(cu_seqlens, 0), *strides(state_indices, 0),
    )  # fmt: skip
    constants = {"RQ": heads // q.shape[1], "RK": heads // k.shape[1]}
    constants |= {"NORM": call.use_qk_l2norm, "LOG": call.log_gates}
    if count > 0:
        grid, registers = (slots * heads + beside,), PREPARE_REGISTERS[q.dtype]
        launches.add(prepare, grid, args, constants, warps=4, registers=registers, beside=beside)


def _states_before(call: Prefill, launches: Launches, made: Made, part: int) -> Tensor:
    """The states that parts start from, ``[places, HV, V, K]`` fp32."""
    k, v, cu_seqlens, state_indices, (x, _, vectors) = call.k, call.v, call.cu_seqlens, call.state_indices, made
    (total, heads, _), count = call.output.shape, cu_seqlens.shape[0] - 1
    places = count + total // part
    maps = launches.scratch(places, heads, 2, 128, 128, dtype=torch.float32)
    states = launches.scratch(places, heads, 128, 128, dtype=torch.float32)
    args = (
        vectors, rows(k), rows(v, 64), tiles(x), cu_seqlens, state_indices, maps, call.null_slot, count, part,
        k.stride(1), v.stride(1), *strides(cu_seqlens, 0), *strides(state_indices, 0),
    )  # fmt: skip
    constants = {"RK": heads // k.shape[1], "RV": heads // v.shape[1], "STAGES": STAGES, "REGISTERS": REGISTERS[2]}
    launches.add(summary, (heads, places, 2), args, constants, warps=4)
    args = (
        maps, cu_seqlens, state_indices, call.source, call.has_initial_state, states, call.null_slot, part,
        *strides(cu_seqlens, 0), *strides(state_indices, 0), *strides(call.has_initial_state, 0),
        *strides(call.source, 0, 1, 2),
    )  # fmt: skip
    launches.add(states_before, (128 // ROWS, heads, count), args, {"ROWS": ROWS}, warps=8)
    return states
