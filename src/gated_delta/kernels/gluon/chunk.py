"""What a chunk of 64 tokens needs no state for, made by four warps while others work on the chunk before it.

docs/maths.md writes a chunk as ``U = T (V - diag(d) K S)``, ``S' = d_C S + Kt^T U``, ``O = diag(d) Q S + P U``. These
warps make P, T and the factors of rows, and leave them in shared memory:

* ``T = (I + N)^-1 diag(beta)`` with N strictly lower triangular. Its diagonal blocks of 16 are inverted by forward
  substitution in fp32, a thread a column; twice, blocks are then joined by ``x - x C x``, where C is what lies below
  the diagonal of each pair. For bf16 activations these products are fp16: every entry is at most 2, and 11 bits cost
  the error budget 2 %. For fp16 activations they have two parts, and T itself enters products in two parts for both:
  one alone would exceed the budget where keys are similar.
* A decay between two tokens is ``2^(G_i - G_j)`` with G a running sum of logarithms, each split into a multiple of 1/8,
  whose sums and differences are exact, and a rest below 1/8: a strong decay costs the weak ones behind it nothing.
  alpha = 0 counts as 2^-160, which is 0 in fp32.
* The L2 norm is a factor of a row of q or k, and commutes with every product: q and k enter as they are stored.
"""

# Gluon's functions have no types that a checker could follow.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Vectors of 64 numbers that these warps keep for themselves: G's exact part, 2^rest and its inverse, beta, the factors
# that normalise k and q.
HIGH, REST, INVERSE, BETA, NORM_K, NORM_Q = (gl.constexpr(i) for i in range(6))
# Those for the warps of the state: what multiplies rows of K S and of Q S, what U takes on its way into the state, and
# the decay of the state (64 times the same).
FROM_K, FROM_Q, TO_STATE, DECAY = (gl.constexpr(i) for i in range(4))
VECTORS = gl.constexpr(4)
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
"""64 numbers, all in every warp."""


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def gates_of(g, beta, chunk, length, g_row, beta_row, LOG: gl.constexpr):
    """log2 alpha and beta of a chunk's tokens; 0 where there is no token."""
    row = (chunk * 64 + gl.arange(0, 64, LINE)).to(gl.int64)
    x = gl.load(g + row * g_row, mask=row < length, other=0.0 if LOG else 1.0).to(gl.float32)
    b = gl.load(beta + row * beta_row, mask=row < length, other=0.0).to(gl.float32)
    if LOG:
        x = x * 1.4426950408889634
    else:
        x = gl.where(x < 1e-37, -160.0, gl.log2(gl.maximum(x, 1e-37)))
    return gl.maximum(x, -160.0), b


@gluon.jit
def axis_of(SIZE: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, .. along an axis of a three-dimensional layout, the other two of size 1."""
    if AXIS == 0:
        return gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None][:, :, None]
    elif AXIS == 1:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    else:
        return gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]


@gluon.jit
def substitute(N, sN, sD):
    """Inverses of the diagonal blocks of 16 of ``I + N``; sN, sD ``[block, row, column]``. N is not looked at on and
    above its diagonal.
    """
    thin = gl.reshape(N, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 == axis_of(4, 1, layout)
    sN.reshape([64, 16]).store(gl.sum(gl.where(own, thin, 0.0), axis=1))
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 16], [2, 16, 1], [4, 1, 1], [2, 1, 0])  # a thread a column
    row = axis_of(16, 2, cube)
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :]
    x = gl.zeros([4, 16, 16], gl.float32, cube)  # [block, column, row]
    for i in gl.static_range(16):
        line = gl.where(row < i, sN.slice(i, 1, dim=1).load(cube), 0.0)
        new = gl.where(column == i, 1.0, 0.0) - gl.sum(line * x, axis=2)
        x = gl.where(row == i, new[:, :, None], x)
    sD.store(gl.permute(x, [0, 2, 1]))


@gluon.jit
def spread(sD, LIKE):
    """The matrix with the four blocks of ``sD`` on its diagonal, laid out as another."""
    thin = gl.reshape(LIKE, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 == axis_of(4, 1, layout)
    blocks = sD.reshape([64, 16]).load(gl.SliceLayout(1, layout))[:, None, :]
    return gl.convert_layout(gl.reshape(gl.where(own, blocks, 0.0), [64, 64]), ACC)


@gluon.jit
def product(x, y, sX, sY, FINE: gl.constexpr):
    """``x @ y`` by fp16 tensor cores, FINE: of two fp16 parts each."""
    left: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    high_x, high_y = x.to(gl.float16), y.to(gl.float16)
    sX.store(high_y)
    if FINE:
        sY.store((y - high_y.to(gl.float32)).to(gl.float16))
    a = gl.convert_layout(high_x, left)
    fence_async_shared()
    z = warpgroup_mma(a, sX, gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True)
    rest = a
    if FINE:
        rest = gl.convert_layout((x - high_x.to(gl.float32)).to(gl.float16), left)
        z = warpgroup_mma(a, sY, z, is_async=True)
        z = warpgroup_mma(rest, sX, z, is_async=True)
    z, a, rest = warpgroup_mma_wait(0, deps=(z, a, rest))
    return z


@gluon.jit
def widen(x, C, sX, sY, FINE: gl.constexpr):
    """``x - x C x``: inverses of blocks twice as wide, when C has what is below the diagonal of each pair."""
    return x - product(x, product(C, x, sX, sY, FINE), sX, sY, FINE)


@gluon.jit
def inverse(N, sN, sD, sX, sY, FINE: gl.constexpr):
    """``(I + N)^-1`` of strictly lower triangular N, which is not looked at on and above its diagonal."""
    i, j = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None], gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    substitute(N, sN, sD)
    x = spread(sD, N)
    x = widen(x, gl.where((i // 32 == j // 32) & (i // 16 > j // 16), N, 0.0), sX, sY, FINE)
    return widen(x, gl.where(i // 32 > j // 32, N, 0.0), sX, sY, FINE)


@gluon.jit
def store_gates(own, log_alpha, strength):
    """What decays between tokens are made of; returns log2 of the chunk's decay, in the same two parts."""
    high = gl.floor(log_alpha * 8.0 + 0.5) * 0.125
    low = log_alpha - high
    rest = gl.associative_scan(low, 0, add)
    own.index(HIGH).store(gl.associative_scan(high, 0, add))
    own.index(REST).store(gl.exp2(rest))
    own.index(INVERSE).store(gl.exp2(-rest))
    own.index(BETA).store(strength)
    return gl.sum(high, 0), gl.exp2(gl.sum(low, 0))


@gluon.jit
def store_factors(own, shared, first, high, rest, scale, NORM: gl.constexpr):
    """The vectors for the warps of the state, from ``first`` on."""
    start = gl.exp2(own.index(HIGH).load(LINE)) * own.index(REST).load(LINE)
    left = gl.exp2(high - own.index(HIGH).load(LINE)) * rest * own.index(INVERSE).load(LINE)
    of_q = start * scale
    if NORM:
        of_q = of_q * own.index(NORM_Q).load(LINE)
        start, left = start * own.index(NORM_K).load(LINE), left * own.index(NORM_K).load(LINE)
    shared.index(first + FROM_K).store(start)
    shared.index(first + FROM_Q).store(of_q)
    shared.index(first + TO_STATE).store(left)
    shared.index(first + DECAY).store(gl.exp2(high) * rest + gl.zeros([64], gl.float32, LINE))


@gluon.jit
def triangles(KK, QK, own, scale, NORM: gl.constexpr):
    """N and P from the products of keys and queries with keys."""
    r: gl.constexpr = gl.SliceLayout(1, ACC)
    c: gl.constexpr = gl.SliceLayout(0, ACC)
    i, j = gl.arange(0, 64, r)[:, None], gl.arange(0, 64, c)[None, :]
    column, row_k = own.index(INVERSE).load(c), own.index(REST).load(r)
    row_q = row_k * scale
    row_k = row_k * own.index(BETA).load(r)
    if NORM:
        column, row_k = column * own.index(NORM_K).load(c), row_k * own.index(NORM_K).load(r)
        row_q = row_q * own.index(NORM_Q).load(r)
    high = own.index(HIGH).load(r)[:, None] - own.index(HIGH).load(c)[None, :]
    decay = gl.exp2(gl.where(i >= j, high, -1000.0)) * column[None, :]
    return KK * (decay * row_k[:, None]), QK * (decay * row_q[:, None])


@gluon.jit
def prepare(
    gates, chunks, length, scale, tiles, scratch, signals,
    STAGES: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Signals ``ready`` when T, P and vectors of one are there, ``empty`` when its q and k
    are not needed here any more. Without OUT, nothing is made for outputs, and q is not looked at.
    """
    g, beta, g_row, beta_row = gates
    sQ, sK, _, sT, sP = tiles
    sN, sD, sX, sY, own = scratch
    shared, full, empty, ready, free = signals
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    i, j = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None], gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    zero = gl.zeros([64, 64], gl.float32, ACC)
    log_alpha, strength = gates_of(g, beta, 0, length, g_row, beta_row, LOG)
    for t in range(chunks):
        stage, buffer = t % STAGES, t % 2
        high, rest = store_gates(own, log_alpha, strength)
        log_alpha, strength = gates_of(g, beta, t + 1, length, g_row, beta_row, LOG)  # while others are used
        mbarrier.wait(full.index(stage), (t // STAGES) & 1)
        fence_async_shared()
        keys = sK.index(stage).permute((1, 0))
        kk = warpgroup_mma(sK.index(stage), keys, zero, use_acc=False, is_async=True)
        if OUT:
            qk = warpgroup_mma(sQ.index(stage), keys, zero, use_acc=False, is_async=True)
        if OUT and NORM:
            x = sQ.index(stage).load(rows).to(gl.float32)
            own.index(NORM_Q).store(gl.rsqrt(gl.sum(x * x, axis=1) + 1e-6))
        KK = warpgroup_mma_wait(1 if OUT else 0, deps=(kk,))
        if NORM:
            own.index(NORM_K).store(gl.rsqrt(gl.sum(gl.where(i == j, KK, 0.0), axis=1) + 1e-6))
        QK = KK
        if OUT:
            QK = warpgroup_mma_wait(0, deps=(qk,))
        mbarrier.arrive(empty.index(stage), count=1)
        N, P = triangles(KK, QK, own, scale, NORM)
        mbarrier.wait(free.index(buffer), ((t // 2) & 1) ^ 1)
        if OUT:
            sP.index(buffer).store(P.to(sP.dtype))
        store_factors(own, shared, VECTORS * buffer, high, rest, scale, NORM)
        T = inverse(N, sN, sD, sX, sY, sT.dtype == gl.float16) * own.index(BETA).load(gl.SliceLayout(0, ACC))[None, :]
        part = T.to(sT.dtype)
        sT.index(2 * buffer).store(part)
        sT.index(2 * buffer + 1).store((T - part.to(gl.float32)).to(sT.dtype))
        fence_async_shared()
        mbarrier.arrive(ready.index(buffer), count=1)
