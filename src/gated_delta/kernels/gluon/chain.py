"""The chunks of a job (:mod:`jobs`), one after the other, job by job: groups of four warps side by side.

* :func:`load` brings q, k and v of coming chunks into shared memory, with X, P' and vectors, which :func:`prepare` has
  made for all chunks before, in a launch of its own.
* Where states fill the processors, :func:`pair` and :func:`make` do what :func:`prepare` does, as chunks come, instead.
* A group of ``keep`` holds 64 values of the state, ``[V, K]`` in fp32 registers. Every product of its is transposed,
  ``(K S)^T = S^T K^T`` and so on, so that what it computed last is its left operand, from registers:

      (K S)^T    Y = V - d (K S)    S <- d_C S + Y^T X, (Q S)^T    O = d (Q S) + P' Y

Where states fill the processors, two groups share what is loaded, and one computes while the other waits for tensor
cores. Where they do not, a program has one group, and a state two programs. The bits are the same.

Chunks follow each other through these groups as through a pipe; barriers in shared memory say when a buffer is full or
free again. What a group writes for a chunk is written while products of the next one run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from gated_delta.kernels.gluon.inverse import ACC, layout_of, rooms
from gated_delta.kernels.gluon.jobs import job_of
from gated_delta.kernels.gluon.load import load_all, make, pair
from gated_delta.kernels.gluon.prepare import (
    DECAY,
    FROM_K,
    FROM_Q,
    LINES,
    VECTORS,
    griddepcontrol,
    vectors_in_shared,
    wide,
)

WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))


@gluon.jit
def store_state(base, line, S):
    """64 values of a ``[V, K]`` state."""
    row = gl.arange(0, 64, gl.SliceLayout(1, WIDE)).to(gl.int64)[:, None]
    column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    gl.store(base + row * line + column, S.to(base.dtype.element_ty))


@gluon.jit
def first_state(base, line, is_there):
    """64 values of a ``[V, K]`` state in fp32; zero where there is none, and what is there (NaN) is not looked at."""
    S = gl.zeros([64, 128], gl.float32, WIDE)
    if base is not None:
        row = gl.arange(0, 64, gl.SliceLayout(1, WIDE)).to(gl.int64)[:, None]
        column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
        inside = (row >= 0) & (column >= 0) & is_there
        S = gl.load(base + row * line + column, mask=inside, other=0.0).to(gl.float32)
    return S


@gluon.jit
def vector_of(factors, stage, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    return factors.index(stage).slice(WHICH, 64).load(LAYOUT)


@gluon.jit
def outputs_of(state, Y, sQ, sP, from_q, sO, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Outputs of so many tokens, into shared memory."""
    layout: gl.constexpr = layout_of(COUNT)
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    state, Y = gl.convert_layout(state, left), gl.convert_layout(Y, left)
    tokens = sQ.slice(FIRST, COUNT, dim=0).permute((1, 0))
    o = warpgroup_mma(state, tokens, gl.zeros([64, COUNT], gl.float32, layout), use_acc=False, is_async=True)
    factor = from_q.slice(FIRST, COUNT).load(gl.SliceLayout(0, layout))
    o, state = warpgroup_mma_wait(0, deps=(o, state))
    o = warpgroup_mma(Y, sP.slice(FIRST, COUNT, dim=0).permute((1, 0)), o * factor[None, :], is_async=True)
    o, Y = warpgroup_mma_wait(0, deps=(o, Y))
    sO.slice(FIRST, COUNT, dim=0).permute((1, 0)).store(o.to(sO.dtype))


@gluon.jit
def store_outputs(output, o_row, sO, chunk, length):
    """64 values of a chunk's outputs; nothing for chunk -1."""
    out: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    d = gl.arange(0, 64, gl.SliceLayout(0, out))[None, :]
    row = (chunk * 64 + gl.arange(0, 64, gl.SliceLayout(1, out))).to(gl.int64)[:, None]
    gl.store(output + row * o_row + d, sO.load(out), mask=(row >= 0) & (row < length))


@gluon.jit
def keep(
    S, states, places, done, chunks, length, with_values, tiles, sO, signals,
    GROUPS: gl.constexpr, OUT: gl.constexpr, GROUP: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """64 values of the state through all chunks of a job, before which so many were done, and what they are then;
    outputs of AT_ONCE tokens at once, as there are registers for.
    """
    kept, output = states
    before, every, c_row, c_line, o_row = places
    sQ, sK, sV, sX, sP, factors = tiles
    full, empty, full_x = signals
    STAGES: gl.constexpr = sK.shape[0]
    BUFFERS: gl.constexpr = sX.shape[0]
    left: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    c: gl.constexpr = gl.SliceLayout(0, ACC)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    dtype: gl.constexpr = sK.dtype
    state = gl.convert_layout(S.to(dtype), left)
    for t in range(chunks):
        n = done + t
        stage, buffer = n % STAGES, n % BUFFERS
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        ks = warpgroup_mma(state, sK.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUT:
            store_outputs(output, o_row, sO, t - 1, length)
        KS, state = warpgroup_mma_wait(0, deps=(ks, state))
        mbarrier.wait(full_x.index(buffer), (n // BUFFERS) & 1)
        V = sV.index(GROUPS * buffer + GROUP).permute((1, 0)).load(ACC).to(gl.float32)
        if not OUT:
            V = gl.where(with_values, V, 0.0)
        Y = V + KS * vector_of(factors, stage, FROM_K, c)[None, :]
        if length - t * 64 < 64:
            Y = gl.where(gl.arange(0, 64, c)[None, :] < length - t * 64, Y, 0.0)
        Y = gl.convert_layout(Y.to(dtype), left)
        S = S * vector_of(factors, stage, DECAY, gl.SliceLayout(1, WIDE))[:, None]
        s = warpgroup_mma(Y, sX.index(buffer), S, is_async=True)
        if OUT:
            from_q = factors.index(stage).slice(FROM_Q, 64)
            for first in gl.static_range(0, 64, AT_ONCE):
                outputs_of(state, Y, sQ.index(stage), sP.index(buffer), from_q, sO, first, AT_ONCE)
        S, Y = warpgroup_mma_wait(0, deps=(s, Y))
        state = gl.convert_layout(S.to(dtype), left)
        mbarrier.arrive(empty.index(stage), count=1)
        if kept is not None:
            after = before + (t + 1) * 64
            if (after <= before + length) & (after % every == 0):
                row = (after // every - 1).to(gl.int64)
                store_state(kept + row * c_row, c_line, S)
    if OUT:
        store_outputs(output, o_row, sO, chunks - 1, length)
    return S


@gluon.jit
def zero_rows(output, count, o_row):
    """Zeros for 64 values of so many rows of the output."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n, d = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    zeros = gl.zeros([64, 64], output.dtype.element_ty, layout)
    for at in range(0, count, 64):
        row = (at + n)[:, None]
        gl.store(output + row.to(gl.int64) * o_row + d, zeros, mask=row < count)


@gluon.jit
def keep_all(
    jobs, states, tiles, sO, signals, GROUPS: gl.constexpr, GROUP: gl.constexpr, AT_ONCE: gl.constexpr,
    PARTS: gl.constexpr, ZERO_PADDING: gl.constexpr,
):  # fmt: skip
    """:func:`keep` for all jobs, from states in memory, with outputs; zeros for padding, if wanted."""
    (
        source, s_place, s_slot, s_head, s_line, has_state, has_stride, final, f_slot, f_head, f_line, carry,
        checkpoints, starts, starts_stride, c_row, c_head, c_line, every, output, o_row, o_head,
    ) = states  # fmt: skip
    done = gl.to_tensor(0)
    for job in range(jobs[0], jobs[1], jobs[2]):
        head, values, place, sequence, slot, begin, length, before, part = job_of(jobs, job, GROUPS, PARTS)
        values += GROUP * 64
        rows = output + ((begin + before) * o_row + head * o_head + values)
        if slot < 0:
            if ZERO_PADDING:
                zero_rows(rows, part, o_row)
        elif (part > 0) | (before == 0):
            own, kept, is_there = source, checkpoints, slot >= 0
            if source is not None:
                own += slot * s_slot + head * s_head + values * wide(s_line)
                if PARTS:
                    own += place * s_place
            if has_state is not None:
                is_there = gl.load(has_state + sequence * has_stride) != 0
            if checkpoints is not None:
                row = gl.load(starts + sequence * starts_stride).to(gl.int64)
                kept += row * c_row + head * c_head + values * wide(c_line)
            S, chunks = first_state(own, s_line, is_there), (part + 63) // 64
            S = keep(
                S, (kept, rows), (before, every, c_row, c_line, o_row), done, chunks, part, True, tiles,
                sO.index(GROUP), signals, GROUPS, True, GROUP, AT_ONCE,
            )  # fmt: skip
            done += chunks
            if before + part < length:
                if carry is not None:
                    store_state(carry + (head * 128 + values) * 128, 128, S)
            elif final is not None:
                store_state(final + (slot * f_slot + head * f_head + values * wide(f_line)), f_line, S)


@gluon.jit
def buffers(DTYPE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, MAKE: gl.constexpr):
    """Shared memory of chunks on their way: q, k, v for each group, X, P', and the vectors."""
    BUFFERS: gl.constexpr = STAGES if GROUPS == 1 else 2
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], DTYPE)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    return (
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], tile),
        gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], tile),
        gl.allocate_shared_memory(DTYPE, [GROUPS * BUFFERS, 64, 64], square),
        gl.allocate_shared_memory(DTYPE, [BUFFERS, 64, 128], tile),
        gl.allocate_shared_memory(DTYPE, [BUFFERS, 64, 64], square),
        vectors_in_shared(STAGES, LINES if MAKE else VECTORS),
    )


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def run(
    jobs, states, sO, sources, made, tiles, signals, between, GROUPS: gl.constexpr, PARTS: gl.constexpr,
    MAKE: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr, ZERO_PADDING: gl.constexpr, RATIOS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """The groups of a program, side by side."""
    first, second = gl.constexpr(0), gl.constexpr(1)
    if MAKE:  # a group has registers for the outputs of 32 tokens at once
        gl.warp_specialize([
            (keep_all, (jobs, states, tiles, sO, signals, GROUPS, first, gl.constexpr(32), PARTS, ZERO_PADDING)),
            (keep_all, (jobs, states, tiles, sO, signals, GROUPS, second, gl.constexpr(32), PARTS, ZERO_PADDING)),
            (make, (jobs, tiles, signals, between, GROUPS, NORM)),
            (pair, (jobs, sources, made, tiles, signals, between, GROUPS, LOG, NORM, RATIOS)),
        ], [4, 4, 4], REGISTERS)  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize([
            (keep_all, (jobs, states, tiles, sO, signals, GROUPS, first, gl.constexpr(64), PARTS, ZERO_PADDING)),
            (keep_all, (jobs, states, tiles, sO, signals, GROUPS, second, gl.constexpr(64), PARTS, ZERO_PADDING)),
            (load_all, (jobs, sources, made, tiles, signals, GROUPS, PARTS, RATIOS)),
        ], [4, 4], REGISTERS)  # fmt: skip
    else:
        gl.warp_specialize([
            (keep_all, (jobs, states, tiles, sO, signals, GROUPS, first, gl.constexpr(64), PARTS, ZERO_PADDING)),
            (load_all, (jobs, sources, made, tiles, signals, GROUPS, PARTS, RATIOS)),
        ], [4], REGISTERS)  # fmt: skip


@gluon.jit(do_not_specialize=["null_slot", "L", "N", "size", "halves", "places", "at", "count"])
def chain(
    q, k, v, x, p, vectors, g, beta, cu_seqlens, slots, source, has_state, final, carry, checkpoints,
    checkpoint_starts, output, scale, null_slot, L, N, size, halves, places, at, count, every,
    q_head, k_head, v_head, g_row, g_head, beta_row, beta_head, o_row, o_head, cu_stride,
    slot_stride, has_stride, starts_stride, s_place, s_slot, s_head, s_line, f_slot, f_head, f_line,
    c_row, c_head, c_line,
    RQ: gl.constexpr, RK: gl.constexpr, RV: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, MAKE: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr, ZERO_PADDING: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """``count`` jobs, of 64 or of 128 values of a head, so many ``halves`` for each of ``places``: sequences, or with
    PARTS ``size`` tokens of one, from the place ``at`` on, whose state, if more follow, goes to ``carry``.
    """
    if carry is not None:
        griddepcontrol("launch_dependents")
    where = (halves, places, at, L, N, cu_seqlens, cu_stride, slots, slot_stride, null_slot, size)
    jobs = (gl.program_id(0), count, gl.num_programs(0), where)
    tiles = buffers(q.dtype, GROUPS, STAGES, MAKE)
    # Arrivals: of vectors, and of tiles where nobody has waited for these; of groups; of v, and of X and P'.
    full, full_x = barriers(STAGES, 1 if MAKE else 129), barriers(tiles[3].shape[0], 2 if MAKE else 1)
    signals = (full, barriers(STAGES, GROUPS), full_x)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], q.dtype)
    sO = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, 64], square)
    states = (
        source, s_place, s_slot, s_head, s_line, has_state, has_stride, final, f_slot, f_head, f_line, carry,
        checkpoints, checkpoint_starts, starts_stride, c_row, c_head, c_line, every, output, o_row, o_head,
    )  # fmt: skip
    sources = (q, k, v, q_head, k_head, v_head)
    between = None
    if MAKE:
        made = (g, beta, g_row, g_head, beta_row, beta_head, scale)
        # Room, and barriers landed, free and ready; not there where nobody uses them: it would be taken for free.
        between = (rooms(q.dtype == gl.float16), barriers(STAGES, 1), barriers(1, 1), barriers(2, 1))
    else:
        made = (x, p, vectors, halves * GROUPS // 2)
    run(
        jobs, states, sO, sources, made, tiles, signals, between, GROUPS, PARTS, MAKE, NORM, LOG, ZERO_PADDING,
        (RQ, RK, RV), REGISTERS,
    )  # fmt: skip
