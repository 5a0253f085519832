"""What brings chunks to the groups that keep a state, and what prepares them there (:mod:`chain`).

:func:`load` brings all of it from memory, X, P' and vectors too. Where chunks are prepared as they come, two groups
share what :func:`prepare` does, because one alone would be the slowest: :func:`pair` makes vectors, and the products of
rows of k with rows of k and q; :func:`make` inverts, and makes X and P' of it.

Barriers: ``empty``, a chunk is done, which leaves its room to the one STAGES later; ``full``, what a state needs first
is there, k, q and vectors; ``full_x``, v, X and P' are. Between the two groups: ``landed``, tiles of k and q are there;
``free``, N was read; ``ready``, P is there; ``full`` says here that N is, too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from gated_delta.kernels.gluon.jobs import sources_of, tokens_of
from gated_delta.kernels.gluon.prepare import (
    FROM_K,
    VECTORS,
    clear_rows,
    copy_tile,
    gates_of,
    narrow,
    normalise,
    put_keys,
    put_queries,
    store_vectors,
    wide,
    without_state,
)

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Its name since Triton 3.8, or the one before 3.9."""


@gluon.jit
def await_room(empty, n, STAGES: gl.constexpr):
    """For k and q of a program's chunk n: the one STAGES before it is done."""
    mbarrier.wait(empty.index(n % STAGES), ((n // STAGES) & 1) ^ 1)


@gluon.jit
def copy_pair(sources, done, t, tiles, landed, empty, OUT: gl.constexpr):
    """A chunk's k, and its q if there are outputs, as soon as there is room: of a job, before which so many chunks were
    done, its chunk t.
    """
    q, k, _, q_column, k_column, _, first = sources
    sQ, sK, _, _, _, _ = tiles
    STAGES: gl.constexpr = sK.shape[0]
    stage, row = (done + t) % STAGES, first + t * 64
    await_room(empty, done + t, STAGES)
    mbarrier.expect(landed.index(stage), 2 * 64 * (256 if OUT else 128))
    copy_tile(k, [row, k_column], landed.index(stage), sK.index(stage))
    if OUT:
        copy_tile(q, [row, q_column], landed.index(stage), sQ.index(stage))


@gluon.jit
def copy_values(sources, done, t, tiles, full_x, empty, GROUPS: gl.constexpr, MORE: gl.constexpr):
    """A chunk's v, as soon as there is room for it, for X and for P'; MORE: columns of these that come as well."""
    _, _, v, _, _, column, first = sources
    _, sK, sV, sX, _, _ = tiles
    STAGES: gl.constexpr = sK.shape[0]
    BUFFERS: gl.constexpr = sX.shape[0]
    if STAGES > BUFFERS:
        await_room(empty, done + t + STAGES - BUFFERS, STAGES)
    buffer = (done + t) % BUFFERS
    mbarrier.expect(full_x.index(buffer), 2 * 64 * (64 * GROUPS + MORE))
    for group in gl.static_range(GROUPS):
        tile = sV.index(GROUPS * buffer + group)
        copy_tile(v, [first + t * 64, column + 64 * group], full_x.index(buffer), tile)


@gluon.jit
def load(what, GROUPS: gl.constexpr, OUT: gl.constexpr):
    """All that chunks need. Tiles hold rows of the next sequence behind the last token of one: X is zero there."""
    sources, made, done, chunks, tiles, signals = what
    x, p, vectors, chunk, heads = made
    _, sK, _, sX, sP, factors = tiles
    full, empty, full_x = signals
    STAGES: gl.constexpr = sK.shape[0]
    BUFFERS: gl.constexpr = sX.shape[0]
    f = FROM_K + gl.arange(0, 256, gl.BlockedLayout([2], [32], [4], [0]))
    for t in range(chunks):
        stage, buffer, place = (done + t) % STAGES, (done + t) % BUFFERS, (chunk + t * heads) * 64
        copy_pair(sources, done, t, tiles, full, empty, OUT)
        copy_async(factors.index(stage), vectors + t * wide(heads) * VECTORS + f)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        copy_values(sources, done, t, tiles, full_x, empty, GROUPS, 192 if OUT else 128)
        copy_tile(x, [place, 0], full_x.index(buffer), sX.index(buffer))
        if OUT:
            copy_tile(p, [place, 0], full_x.index(buffer), sP.index(buffer))


@gluon.jit
def load_all(jobs, given, made, tiles, signals, GROUPS: gl.constexpr, PARTS: gl.constexpr, RATIOS: gl.constexpr):
    """:func:`load` for all jobs."""
    x, p, vectors, heads = made
    done = gl.to_tensor(0)
    for job in range(jobs[0], jobs[1], jobs[2]):
        tokens = tokens_of(jobs, job, GROUPS, PARTS)
        head, _, sequence, first, length = tokens
        place, chunks = (first // 64 + sequence) * heads + head, (length + 63) // 64
        own = (x, p, vectors + place * VECTORS, narrow(place), heads)
        load((sources_of(given, tokens, RATIOS), own, done, chunks, tiles, signals), GROUPS, gl.constexpr(True))
        done += chunks


@gluon.jit
def pair(
    jobs, given, made, tiles, signals, between, GROUPS: gl.constexpr, LOG: gl.constexpr, NORM: gl.constexpr,
    RATIOS: gl.constexpr,
):  # fmt: skip
    """Of all chunks, tiles, ahead of time, vectors, N and P. Rows of k behind the last token become zero."""
    gates, betas, g_row, g_head, beta_row, beta_head, scale = made
    room, landed, free, ready = between
    sQ, sK, _, sX, sP, factors = tiles
    full, empty, full_x = signals
    STAGES: gl.constexpr = sK.shape[0]
    BUFFERS: gl.constexpr = sX.shape[0]
    done = gl.to_tensor(0)
    for job in range(jobs[0], jobs[1], jobs[2]):
        tokens = tokens_of(jobs, job, GROUPS, gl.constexpr(False))
        head, first, length = tokens[0], tokens[3], tokens[4]
        sources, chunks = sources_of(given, tokens, RATIOS), (length + 63) // 64
        g, beta = gates + (first * g_row + head * g_head), betas + (first * beta_row + head * beta_head)
        if chunks > 0:  # nothing may be under way when a program ends
            copy_pair(sources, done, 0, tiles, landed, empty, True)
        own = gates_of(g, beta, length, g_row, beta_row, LOG)
        for t in range(chunks):
            n = done + t
            stage, buffer, left = n % STAGES, n % BUFFERS, length - t * 64
            q, k, vectors = sQ.index(stage), sK.index(stage), factors.index(stage)
            store_vectors(own, scale, vectors, LOG, sK.dtype == gl.float16)
            g += g_row * wide(64)
            beta += beta_row * wide(64)
            own = gates_of(g, beta, left - 64, g_row, beta_row, LOG)  # of the next chunk, ahead of time
            mbarrier.wait(landed.index(stage), (n // STAGES) & 1)
            if left < 64:
                clear_rows(k, left)
            if NORM:
                normalise(q, k, vectors)
            nothing = (left <= 0).to(gl.int32)
            mbarrier.wait(free.index(0), (n & 1) ^ 1)
            put_keys(k, room, vectors, nothing, NORM)
            mbarrier.arrive(full.index(stage), count=1)
            copy_values(sources, done, t, tiles, full_x, empty, GROUPS, 0)
            if (left > 64) & (STAGES > 2):
                copy_pair(sources, done, t + 1, tiles, landed, empty, True)
            put_queries(q, k, sP.index(buffer), vectors, nothing, NORM)
            mbarrier.arrive(ready.index(buffer), count=1)
            if (left > 64) & (STAGES == 2):  # its room is that of the chunk before, which may still be gone through
                copy_pair(sources, done, t + 1, tiles, landed, empty, True)
        done += chunks


@gluon.jit
def make(jobs, tiles, signals, between, GROUPS: gl.constexpr, NORM: gl.constexpr):
    """X and P' of all chunks."""
    room, _, free, ready = between
    _, sK, _, sX, sP, factors = tiles
    full, _, full_x = signals
    STAGES: gl.constexpr = sK.shape[0]
    BUFFERS: gl.constexpr = sX.shape[0]
    stage, turn, n = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for job in range(jobs[0], jobs[1], jobs[2]):
        length = tokens_of(jobs, job, GROUPS, gl.constexpr(False))[4]
        for t in range((length + 63) // 64):
            buffer, parity = n % BUFFERS, (n // BUFFERS) & 1
            mbarrier.wait(full.index(stage), turn)
            nothing = (length - t * 64 <= 0).to(gl.int32)
            without_state(
                sK.index(stage), sP.index(buffer), sX.index(buffer), room, factors.index(stage),
                (free.index(0), ready.index(buffer)), parity, nothing, NORM, 64,
            )  # fmt: skip
            mbarrier.arrive(full_x.index(buffer), count=1)
            # By hand: a quotient would be kept in memory for want of registers, and waited for.
            n += 1
            last = stage == STAGES - 1
            stage, turn = gl.where(last, 0, stage + 1), gl.where(last, turn ^ 1, turn)
