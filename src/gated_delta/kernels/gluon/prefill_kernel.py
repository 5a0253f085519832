"""Prefill of one head of one sequence, or of a part of it: four groups of four warps, side by side.

* ``load`` brings q, k and v of coming chunks into shared memory, two chunks ahead.
* ``prepare`` (chunk.py) makes what a chunk needs no state for, one chunk ahead.
* Two groups of ``keep`` hold 64 values of the state each, ``[V, K]`` in fp32 registers. Every product of theirs is
  transposed, ``(K S)^T = S^T K^T`` and so on, so that what they computed last is its left operand, from registers:

      (K S)^T, (Q S)^T    Y = V - d (K S)    U = T Y    S <- d_C S + U^T Kt    O = d (Q S) + P U

Chunks of a sequence follow each other through these groups as through a pipe; barriers in shared memory say when a
buffer is full or free again.
"""

# Gluon's functions have no types that a checker could follow.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gated_delta.kernels.gluon.chunk import ACC, DECAY, FROM_K, FROM_Q, TO_STATE, VECTORS, prepare

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Its name since Triton 3.8, or the one before 3.9."""
WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))


@gluon.jit
def load(tensors, chunks, length, values, tiles, signals, STAGES: gl.constexpr, OUT: gl.constexpr):
    """Rows of q and k from ``length`` on are zero, and those of v from ``values`` on."""
    q, k, v, q_row, k_row, v_row = tensors
    sQ, sK, sV, _, _ = tiles
    _, full, empty, _, _ = signals
    whole: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    half: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n, c = gl.arange(0, 64, gl.SliceLayout(1, whole)), gl.arange(0, 128, gl.SliceLayout(0, whole))[None, :]
    m, d = gl.arange(0, 64, gl.SliceLayout(1, half)), gl.arange(0, 64, gl.SliceLayout(0, half))[None, :]
    for t in range(chunks):
        stage = t % STAGES
        mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
        row = (t * 64 + n).to(gl.int64)[:, None]
        copy_async(sK.index(stage), k + row * k_row + c, mask=row < length)
        if OUT:
            copy_async(sQ.index(stage), q + row * q_row + c, mask=row < length)
        row = (t * 64 + m).to(gl.int64)[:, None]
        copy_async(sV.index(2 * stage), v + row * v_row + d, mask=row < values)
        copy_async(sV.index(2 * stage + 1), v + row * v_row + (d + 64), mask=row < values)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def store_state(base, line, S, HALF: gl.constexpr):
    """64 values of a ``[V, K]`` state."""
    row = (HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE))).to(gl.int64)[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    gl.store(base + row * line + column, S.to(base.dtype.element_ty))


@gluon.jit
def first_state(base, line, is_there, HALF: gl.constexpr):
    """64 values of a ``[V, K]`` state in fp32; zero where there is none, and what is there (NaN) is not looked at."""
    if base is None:
        return gl.zeros([64, 128], gl.float32, WIDE)
    row = (HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE))).to(gl.int64)[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    inside = (row >= 0) & (column >= 0) & is_there
    return gl.load(base + row * line + column, mask=inside, other=0.0).to(gl.float32)


@gluon.jit
def keep(
    S, states, places, chunks, length, tiles, sO, signals,
    STAGES: gl.constexpr, OUT: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """64 values of the state through all chunks. What the next step needs is waited for while longer products run.

    U enters the state in two 16-bit parts. One alone costs the state most of its error budget where keys are
    similar, for a chunk does not see its own rounding, as a loop over tokens does.
    """
    final, kept, output = states
    is_last, before, every, f_line, c_row, c_line, o_row = places
    sQ, sK, sV, sT, sP = tiles
    shared, full, empty, ready, free = signals
    left: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    c: gl.constexpr = gl.SliceLayout(0, ACC)
    out: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n = gl.arange(0, 64, gl.SliceLayout(1, out))
    d = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(0, out))[None, :]
    zero = gl.zeros([64, 64], gl.float32, ACC)
    dtype: gl.constexpr = sK.dtype
    for t in range(chunks):
        stage, buffer = t % STAGES, t % 2
        vectors = VECTORS * buffer
        state = gl.convert_layout(S.to(dtype), left)
        mbarrier.wait(full.index(stage), (t // STAGES) & 1)
        fence_async_shared()
        ks = warpgroup_mma(state, sK.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUT:
            qs = warpgroup_mma(state, sQ.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(buffer), (t // 2) & 1)
        if OUT:
            KS, QS, state = warpgroup_mma_wait(0, deps=(ks, qs, state))
            outcome = QS * shared.index(vectors + FROM_Q).load(c)[None, :]
        else:
            KS, state = warpgroup_mma_wait(0, deps=(ks, state))
        V = sV.index(2 * stage + HALF).permute((1, 0)).load(ACC).to(gl.float32)
        Y = gl.convert_layout((V - KS * shared.index(vectors + FROM_K).load(c)[None, :]).to(dtype), left)
        u = warpgroup_mma(Y, sT.index(2 * buffer).permute((1, 0)), zero, use_acc=False, is_async=True)
        u = warpgroup_mma(Y, sT.index(2 * buffer + 1).permute((1, 0)), u, is_async=True)
        S = S * shared.index(vectors + DECAY).load(gl.SliceLayout(1, WIDE))[:, None]
        U, Y = warpgroup_mma_wait(0, deps=(u, Y))
        U_left = U * shared.index(vectors + TO_STATE).load(c)[None, :]
        decayed = gl.convert_layout(U_left.to(dtype), left)
        s = warpgroup_mma(decayed, sK.index(stage), S, is_async=True)
        rest = gl.convert_layout((U_left - U_left.to(dtype).to(gl.float32)).to(dtype), left)
        s = warpgroup_mma(rest, sK.index(stage), s, is_async=True)
        if OUT:
            now = gl.convert_layout(U.to(dtype), left)
            o = warpgroup_mma(now, sP.index(buffer).permute((1, 0)), outcome, is_async=True)
        S, decayed, rest = warpgroup_mma_wait(1 if OUT else 0, deps=(s, decayed, rest))
        if OUT:
            outcome, now = warpgroup_mma_wait(0, deps=(o, now))
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(free.index(buffer), count=1)
        if OUT:
            sO.permute((1, 0)).store(outcome.to(dtype))
            row = (t * 64 + n).to(gl.int64)[:, None]
            gl.store(output + row * o_row + d, sO.load(out), mask=row < length)
        if kept is not None:
            done = before + (t + 1) * 64
            if (done <= before + length) & (done % every == 0):
                store_state(kept + (done // every - 1).to(gl.int64) * c_row, c_line, S, HALF)
    if final is not None:
        if is_last:
            store_state(final, f_line, S, HALF)


@gluon.jit
def keep_from(source, s_line, is_there, rest, STAGES: gl.constexpr, HALF: gl.constexpr):
    """:func:`keep` from a state in memory, with outputs."""
    states, places, chunks, length, tiles, sO, signals = rest
    S = first_state(source, s_line, is_there, HALF)
    keep(S, states, places, chunks, length, tiles, sO, signals, STAGES, True, HALF)


@gluon.jit
def zero_rows(output, begin, end, o_row):
    """Zeros for these rows of one head of the output."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    n, d = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    for at in range(begin, end, 64):
        row = (at + n)[:, None]
        gl.store(output + row * o_row + d, gl.zeros([64, 128], output.dtype.element_ty, layout), mask=row < end)


@gluon.jit
def buffers(DTYPE: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of chunks on their way: q, k, v in two halves, T in two parts, P."""
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], DTYPE)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    return (
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], tile),
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], tile),
        gl.allocate_shared_memory(DTYPE, [2 * STAGES, 64, 64], square),
        gl.allocate_shared_memory(DTYPE, [4, 64, 64], square),
        gl.allocate_shared_memory(DTYPE, [2, 64, 64], square),
    )


@gluon.jit
def scratch():
    """Shared memory of ``prepare`` alone, and the vectors that it hands on."""
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    own = (
        gl.allocate_shared_memory(gl.float32, [4, 16, 16], cube),
        gl.allocate_shared_memory(gl.float32, [4, 16, 16], cube),
        gl.allocate_shared_memory(gl.float16, [64, 64], square),
        gl.allocate_shared_memory(gl.float16, [64, 64], square),
        gl.allocate_shared_memory(gl.float32, [8, 64], vector),
    )
    return own, gl.allocate_shared_memory(gl.float32, [8, 64], vector)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def sequence_of(cu_seqlens, stride, N, place, size):
    """The sequence that has this place: the last one whose places begin at or before it. Sequence i has places from
    ``cu_seqlens[i] // size + i`` on, enough for any lengths. Every step looks at 128.
    """
    line: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    found = gl.to_tensor(0)
    width = N
    while width > 1:
        step = (width + 127) // 128
        i = found + step * gl.arange(0, 128, line)
        base = gl.load(cu_seqlens + i.to(gl.int64) * stride, mask=i < N, other=0).to(gl.int64) // size + i
        found += step * (gl.sum(((base <= place) & (i < N)).to(gl.int32), axis=0) - 1)
        width = step
    return found


@gluon.jit
def part_of(cu_seqlens, cu_stride, slots, slot_stride, null_slot, N, place, size, PARTS: gl.constexpr):
    """What this place stands for, a sequence or with PARTS one of ``size`` tokens: sequence, its slot (negative for padding), its first token, its length, the tokens
    of it that come before this part, and those of the part.
    """
    sequence, before = place, gl.to_tensor(0)
    if PARTS:
        sequence = sequence_of(cu_seqlens, cu_stride, N, place, size)
    begin = gl.load(cu_seqlens + sequence * cu_stride).to(gl.int64)
    length = (gl.load(cu_seqlens + (sequence + 1) * cu_stride).to(gl.int64) - begin).to(gl.int32)
    part = length
    if PARTS:
        before = (place - (begin // size + sequence)).to(gl.int32) * size
        part = gl.minimum(length - before, size)
    slot = sequence.to(gl.int64)
    if slots is not None:
        slot = gl.load(slots + slot * slot_stride).to(gl.int64)
        slot = gl.where(slot == null_slot, -1, slot)
    return sequence.to(gl.int64), slot, begin, length, before, part


@gluon.jit(do_not_specialize=["null_slot", "L", "N", "size"])
def prefill(
    q, k, v, g, beta, cu_seqlens, slots, source, has_state, final, checkpoints, checkpoint_starts, output,
    scale, null_slot, L, N, size, every,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, cu_stride, slot_stride, has_stride, starts_stride,
    s_slot, s_head, s_line, f_slot, f_head, f_line, c_row, c_head, c_line, g_row, g_head, beta_row, beta_head,
    RQ: gl.constexpr, RK: gl.constexpr, RV: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr,
    ZERO_PADDING: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A head of a sequence, or with PARTS of ``size`` tokens of one, from a state that is at its place in ``source``.
    The last programs write zeros behind the last sequence, if wanted.
    """
    head, place = gl.program_id(0).to(gl.int64), gl.program_id(1)
    output += head * o_head
    if ZERO_PADDING:
        if place == gl.num_programs(1) - 1:
            zero_rows(output, gl.load(cu_seqlens + N * cu_stride).to(gl.int64), gl.to_tensor(L).to(gl.int64), o_row)
            return
    sequence, slot, begin, length, before, part = part_of(
        cu_seqlens, cu_stride, slots, slot_stride, null_slot, N, place, size, PARTS
    )
    first = begin + before
    if slot < 0:
        if ZERO_PADDING:
            zero_rows(output, first, first + part, o_row)
        return
    if (part <= 0) & (before > 0):
        return
    is_there = slot >= 0
    if PARTS:
        source += place.to(gl.int64) * s_slot + head * s_head
    elif source is not None:
        source += slot * s_slot + head * s_head
    if has_state is not None:
        is_there = gl.load(has_state + sequence * has_stride) != 0
    if final is not None:
        final += slot * f_slot + head * f_head
    if checkpoints is not None:
        row = gl.load(checkpoint_starts + sequence * starts_stride).to(gl.int64)
        checkpoints += row * c_row + head * c_head
    output += first * o_row
    q += first * q_row + head // RQ * q_head
    k += first * k_row + head // RK * k_head
    v += first * v_row + head // RV * v_head
    gates = (g + first * g_row + head * g_head, beta + first * beta_row + head * beta_head, g_row, beta_row)
    dtype: gl.constexpr = q.dtype.element_ty
    tiles = buffers(dtype, STAGES)
    own, shared = scratch()
    sO = gl.allocate_shared_memory(dtype, [2, 64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], dtype))
    signals = (shared, barriers(STAGES, 128), barriers(STAGES, 3), barriers(2, 1), barriers(2, 2))
    states = (final, checkpoints, output)
    places = (before + part >= length, before, every, f_line, c_row, c_line, o_row)
    chunks = (part + 63) // 64
    low = (states, places, chunks, part, tiles, sO.index(0), signals)
    high = (states, places, chunks, part, tiles, sO.index(1), signals)
    gl.warp_specialize([
        (keep_from, (source, s_line, is_there, low, STAGES, gl.constexpr(0))),
        (keep_from, (source, s_line, is_there, high, STAGES, gl.constexpr(1))),
        (prepare, (gates, chunks, part, scale, tiles, own, signals, STAGES, NORM, LOG, gl.constexpr(True))),
        (load, ((q, k, v, q_row, k_row, v_row), chunks, part, part, tiles, signals, STAGES, gl.constexpr(True))),
    ], [4, 4, 4], REGISTERS)  # fmt: skip
