"""One sequence on many processors: its parts side by side, exactly.

A part of a sequence maps the state S before it to ``S A + B`` after it (S is ``[V, K]``, A ``[K, K]``, B ``[V, K]``).
``summary`` runs the chunks of a part twice, from a state of zero, which gives B, and without values from the unit
matrix, which gives A; ``states_before`` goes through the parts of a sequence with these, and leaves the state that each
starts from. Then all parts run at once. In fp32 where states are kept; products of states are made of tf32 thirds.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gated_delta.kernels.gluon.chain import WIDE, barriers, buffers, keep, store_state
from gated_delta.kernels.gluon.jobs import part_of
from gated_delta.kernels.gluon.load import load
from gated_delta.kernels.gluon.prepare import VECTORS, narrow


@gluon.jit
def keep_summary(unit, rest, GROUP: gl.constexpr):
    """:func:`keep` from zero, or from the unit matrix, without outputs."""
    maps, chunks, length, tiles, signals = rest
    row = (GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE)))[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    S = gl.where((row == column) & unit, 1.0, 0.0)
    places = (0, 64, 0, 0, 0)
    S = keep(S, (None, None), places, 0, chunks, length, unit == 0, tiles, None, signals, 2, False, GROUP, 64)
    if chunks > 0:
        store_state(maps + GROUP * 64 * 128, 128, S)


@gluon.jit(do_not_specialize=["null_slot", "N", "size"])
def summary(
    vectors, k, v, x, cu_seqlens, slots, maps, null_slot, N, size, k_head, v_head, cu_stride, slot_stride,
    RK: gl.constexpr, RV: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """B (program 0 of the last dimension) or A (1) of a part that is not the last one of its sequence, for a head:
    ``maps[place, head]``.
    """
    head, place, unit = gl.program_id(0).to(gl.int64), gl.program_id(1), gl.program_id(2) == 1
    sequence, slot, begin, length, before, part = part_of(
        cu_seqlens, cu_stride, slots, slot_stride, null_slot, N, place, size, True
    )
    if (slot < 0) | (before + part >= length):
        return
    first, heads = begin + before, gl.num_programs(0)
    chunk = (begin // 64 + sequence + before // 64) * heads + head
    maps += ((place.to(gl.int64) * heads + head) * 2 + gl.program_id(2)) * (128 * 128)
    tiles = buffers(k.dtype, 2, STAGES, False)
    signals = (barriers(STAGES, 129), barriers(STAGES, 2), barriers(2, 1))
    chunks = (part + 63) // 64
    rest = (maps, chunks, part, tiles, signals)
    made = (x, x, vectors + chunk * VECTORS, narrow(chunk), heads)
    sources = (k, k, v, 0, narrow(head // RK * k_head), narrow(head // RV * v_head), narrow(first))
    gl.warp_specialize([
        (keep_summary, (unit, rest, gl.constexpr(0))),
        (keep_summary, (unit, rest, gl.constexpr(1))),
        (load, ((sources, made, 0, chunks, tiles, signals), gl.constexpr(2), gl.constexpr(False))),
    ], [4, 4], REGISTERS)  # fmt: skip


@triton.jit(do_not_specialize=["null_slot", "size"])
def states_before(
    maps, cu_seqlens, slots, source, has_state, states, null_slot, size, cu_stride, slot_stride, has_stride, s_slot,
    s_head, s_line, ROWS: tl.constexpr,
):  # fmt: skip
    """``states[place, head]`` for all parts of a sequence, ROWS values of a head in a program."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_seqlens + sequence * cu_stride).to(tl.int64)
    length = tl.load(cu_seqlens + (sequence + 1) * cu_stride).to(tl.int64) - begin
    slot = sequence
    if slots is not None:
        slot = tl.load(slots + sequence * slot_stride).to(tl.int64)
        slot = tl.where(slot == null_slot, -1, slot)
    if slot < 0:
        return
    row, column = (tile * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, 128)[None, :]
    S = tl.zeros([ROWS, 128], tl.float32)
    if source is not None:
        inside = (row >= 0) & (column >= 0)
        if has_state is not None:
            inside = inside & (tl.load(has_state + sequence * has_stride) != 0)
        at = source + slot * s_slot + head * s_head + row.to(tl.int64) * s_line + column
        S = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    first = (begin // size + sequence) * tl.num_programs(1) + head
    states += first * (128 * 128) + row * 128 + column
    maps += first * (2 * 128 * 128)
    step = tl.num_programs(1).to(tl.int64) * (128 * 128)
    tl.store(states, S)
    for i in tl.range(1, (length + size - 1) // size, num_stages=2):
        own = maps + (i - 1) * 2 * step
        A = tl.load(own + 128 * 128 + tl.arange(0, 128)[:, None] * 128 + column)
        S = tl.dot(S, A, tl.load(own + row * 128 + column), input_precision="tf32x3")
        tl.store(states + i * step, S)
