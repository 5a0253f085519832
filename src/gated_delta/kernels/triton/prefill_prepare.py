"""What a chunk of 64 tokens does, apart from the state that it starts from: for all chunks at once.

docs/maths.md writes a chunk as ``U = T (V - diag(d) K S)``, ``S' = d_C S + Kt^T U``, ``O = diag(d) Q S + P U`` (here
with S as [K, V], and Kt the keys decayed to the chunk's end). T, P and Kt need no state, so U need not be formed: with
``Y = V - diag(d) K S`` it is ``S' = d_C S + X^T Y`` and ``O = diag(d) Q S + P' Y``, where ``X = T^T Kt`` and
``P' = P T``. This kernel makes X^T and P' (rounded to q's dtype), the scan over chunks has two products left.

* Everything triangular is held as blocks of 32 x 32, so that nothing above the diagonal is computed.
* The L2 norm is a factor of a row of q or k, and commutes with every product: q and k enter as they are stored.
* A decay between two tokens is ``2^(G_i - G_j)`` with G a running sum of logarithms. Each logarithm is split into a
  multiple of 1/8, whose sums and differences are exact, and a rest below 1/8, so a strong decay early in a chunk costs
  the weak ones behind it nothing. alpha = 0 counts as 2^-160, which is 0 in fp32.
* Slots: sequence i has the chunk slots from ``cu_seqlens[i] // 64 + i`` on. They are enough for any lengths, so the
  grid follows from shapes alone; a program whose slot is not used leaves.
"""

# Triton's functions have no types that a checker could follow.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gated_delta.kernels.triton.shared import slot_of

CHUNK = 64
VECTORS = 8 * CHUNK
# Vectors of 64 numbers for each chunk. For the scan: what multiplies the rows of K S and Q S, and the decay of S.
FROM_K, FROM_Q, DECAY = tl.constexpr(0), tl.constexpr(64), tl.constexpr(128)
# For this kernel: G's exact part, 2^rest, beta; then what a key's row and column of its triangle take.
HIGH, REST, BETA = tl.constexpr(192), tl.constexpr(256), tl.constexpr(320)
ROW, COLUMN = tl.constexpr(384), tl.constexpr(448)


@triton.jit
def sequence_of(cu_seqlens, stride, N, place):
    """The sequence of a chunk slot: the last one whose slots begin at or before it. Every step looks at 128."""
    found = 0
    width = N
    while width > 1:
        step = (width + 127) // 128
        i = found + step * tl.arange(0, 128)
        base = tl.load(cu_seqlens + i.to(tl.int64) * stride, mask=i < N, other=0).to(tl.int64) // 64 + i
        found += step * (tl.sum(((base <= place) & (i < N)).to(tl.int32), axis=0) - 1)
        width = step
    return found


@triton.jit
def parts(x, dtype: tl.constexpr):
    """fp32 as a sum of two numbers of 16 bits."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def product3(x, y):
    """``x @ y`` in fp32 to about 16 bits, as three products of bf16 parts."""
    x_high, x_low = parts(x, tl.bfloat16)
    y_high, y_low = parts(y, tl.bfloat16)
    return tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high)))


@triton.jit
def product2(x, y, total):
    """``total + x @ y`` of stored x and fp32 y, which enters in two parts of x's dtype."""
    y_high, y_low = parts(y, x.dtype)
    return tl.dot(x, y_high, tl.dot(x, y_low, total))


@triton.jit
def substitute(N):
    """``(I + N)^-1`` of four strictly lower triangular blocks of 16 by forward substitution, a column at a time.

    Shape [16, 2, 32] (row; pair; block of the pair, column): with two warps a thread holds one column of X, and a
    column of N comes from a neighbour.
    """
    r = tl.arange(0, 16)[:, None, None]
    lane = tl.arange(0, 32)[None, None, :]
    X = tl.where(r == lane % 16, 1.0, 0.0) + tl.zeros_like(N)
    for j in tl.static_range(15):
        row = tl.sum(tl.where(r == j, X, -0.0), axis=0)
        X -= tl.gather(N, tl.broadcast_to(lane // 16 * 16 + j, N.shape), axis=2) * row[None, :, :]
    return X


@triton.jit
def invert(a, b):
    """``(I + a)^-1`` and ``(I + b)^-1`` of strictly lower triangular ``[32, 32]``: blocks of 16, then
    ``[[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]``.
    """
    blocks = tl.permute(tl.reshape(tl.join(a, b), [2, 16, 2, 16, 2]), [1, 4, 3, 0, 2])
    left, right = blocks.split()
    A, C = left.split()  # [row, a or b, column]
    _, D = right.split()
    both = substitute(tl.reshape(tl.permute(tl.join(A, D), [0, 1, 3, 2]), [16, 2, 32]))
    A, D = tl.permute(tl.reshape(both, [16, 2, 2, 16]), [1, 0, 3, 2]).split()  # [a or b, row, column]
    C = -product3(D, product3(tl.permute(C, [1, 0, 2]), A))
    whole = tl.join(tl.join(A, tl.zeros_like(A)), tl.join(C, D))  # [a or b, row, column, right?, lower?]
    return tl.reshape(tl.permute(whole, [4, 1, 3, 2, 0]), [32, 32, 2]).split()


@triton.jit
def log2_decay(g, first, stride, inside, LOG: tl.constexpr):
    """``log2 alpha`` of 64 tokens from alpha or its natural logarithm; 0 where there is no token."""
    n = tl.arange(0, 64)
    if g is None:
        x = tl.zeros([64], tl.float32)
    else:
        x = tl.load(g + first + n * stride, mask=inside, other=0.0 if LOG else 1.0).to(tl.float32)
        if LOG:
            x *= 1.4426950408889634
        else:
            x = tl.where(x < 1e-37, -160.0, tl.log2(tl.maximum(x, 1e-37)))
    return tl.maximum(x, -160.0)


@triton.jit
def triangle(x, y, x_row, y_row, in_a, in_b, columns, BC: tl.constexpr, STAGES: tl.constexpr):
    """``x @ y^T`` of 64 rows each in blocks of 32, without the upper right one, and the squared norms of x's rows."""
    aa, bb = tl.zeros([32, 32], tl.float32), tl.zeros([32, 32], tl.float32)
    ba = tl.zeros([32, 32], tl.float32)
    square_a, square_b = tl.zeros([32], tl.float32), tl.zeros([32], tl.float32)
    for at in tl.range(0, columns, BC, num_stages=STAGES):
        xa, xb = tl.load(x + at, mask=in_a, other=0.0), tl.load(x + at + 32 * x_row, mask=in_b, other=0.0)
        ya, yb = tl.load(y + at, mask=in_a, other=0.0), tl.load(y + at + 32 * y_row, mask=in_b, other=0.0)
        square_a += tl.sum(xa.to(tl.float32) * xa.to(tl.float32), axis=1)
        square_b += tl.sum(xb.to(tl.float32) * xb.to(tl.float32), axis=1)
        aa, ba, bb = tl.dot(xa, tl.trans(ya), aa), tl.dot(xb, tl.trans(ya), ba), tl.dot(xb, tl.trans(yb), bb)
    return aa, ba, bb, square_a, square_b


@triton.jit
def store_gates(vectors, g, beta, first, end, head, g_row, beta_row, LOG: tl.constexpr):
    """Gates of a chunk, kept in memory so that every use has them where it needs them; both parts of G at its end."""
    n = tl.arange(0, 64)
    inside = first + n < end
    log_alpha = log2_decay(g, first * g_row + head, g_row, inside, LOG)
    high = tl.floor(log_alpha * 8.0 + 0.5) * 0.125
    all_high, all_rest = tl.sum(high, axis=0), tl.exp2(tl.sum(log_alpha - high, axis=0))
    tl.store(vectors + HIGH + n, tl.cumsum(high, axis=0))
    tl.store(vectors + REST + n, tl.exp2(tl.cumsum(log_alpha - high, axis=0)))
    tl.store(vectors + DECAY + n, tl.exp2(all_high) * all_rest + tl.zeros([64], tl.float32))
    strength = tl.full([64], 1.0, tl.float32)
    if beta is not None:
        strength = tl.load(beta + first * beta_row + head + n * beta_row, mask=inside, other=0.0).to(tl.float32)
    tl.store(vectors + BETA + n, tl.where(inside, strength, 0.0))
    return all_high, all_rest


@triton.jit
def inverse_norm(square, NORM: tl.constexpr):
    """The factor of each row, 1 unless rows are to be normalised."""
    return tl.rsqrt(square + 1e-6) if NORM else tl.full(square.shape, 1.0, tl.float32)


@triton.jit
def store_keys(vectors, i, norm):
    """What the gates of tokens i and the norms of their keys make of rows and columns."""
    rest, start = tl.load(vectors + REST + i), tl.exp2(tl.load(vectors + HIGH + i))
    tl.store(vectors + ROW + i, tl.load(vectors + BETA + i) * rest * norm)
    tl.store(vectors + COLUMN + i, norm / rest)
    tl.store(vectors + FROM_K + i, start * rest * norm)


@triton.jit
def store_queries(vectors, i, norm):
    """The same for queries."""
    row = tl.load(vectors + REST + i) * norm
    tl.store(vectors + FROM_Q + i, tl.exp2(tl.load(vectors + HIGH + i)) * row)
    return row


@triton.jit
def gated(product, vectors, i, j, row):
    """``product_ij`` times the decay from token j to token i and what else row i and key j take."""
    high = tl.load(vectors + HIGH + i)[:, None] - tl.load(vectors + HIGH + j)[None, :]
    decay = tl.exp2(tl.minimum(high, 100.0))  # finite above the diagonal too
    return product * (decay * row[:, None]) * tl.load(vectors + COLUMN + j)[None, :]


@triton.jit
def solve(aa, ba, bb, vectors, a, b):
    """T from the triangle of k."""
    row_a, row_b = tl.load(vectors + ROW + a), tl.load(vectors + ROW + b)
    aa = tl.where(a[:, None] > a[None, :], gated(aa, vectors, a, a, row_a), 0.0)
    bb = tl.where(b[:, None] > b[None, :], gated(bb, vectors, b, b, row_b), 0.0)
    Taa, Tbb = invert(aa, bb)
    Tba = -product3(Tbb, product3(gated(ba, vectors, b, a, row_b), Taa))
    beta_a, beta_b = tl.load(vectors + BETA + a)[None, :], tl.load(vectors + BETA + b)[None, :]
    return Taa * beta_a, Tba * beta_a, Tbb * beta_b


@triton.jit(do_not_specialize=["N", "null_slot", "columns"])
def prepare(
    q, k, g, beta, cu_seqlens, slots, work, vectors, null_slot, N, columns,
    q_row, q_head, k_row, k_head, g_row, beta_row, cu_stride, slot_stride,
    RQ: tl.constexpr, RK: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One chunk of one state head. RQ, RK: state heads to a head of q and of k. BC: columns of q and k at a time, a
    divisor of their number, which is known at run time only, so that no loop is unrolled into the next.
    """
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = sequence_of(cu_seqlens, cu_stride, N, place)
    begin = tl.load(cu_seqlens + sequence * cu_stride).to(tl.int64)
    end = tl.load(cu_seqlens + (sequence + 1) * cu_stride).to(tl.int64)
    first = begin + (place - (begin // 64 + sequence)) * 64
    if first >= end:
        return
    if slot_of(slots, slot_stride, tl.full([], 0, tl.int32) + sequence, null_slot) < 0:
        return
    a, c = tl.arange(0, 32), tl.arange(0, BC)  # a: the first 32 tokens, b: the last
    b = 32 + a
    chunk = place.to(tl.int64) * tl.num_programs(1) + head
    work += chunk * ((columns + 64) * 64)
    vectors += chunk * (8 * 64)

    all_high, all_rest = store_gates(vectors, g, beta, first, end, head, g_row, beta_row, LOG)

    # T, from the triangle of k.
    in_a, in_b = (first + a < end)[:, None], (first + b < end)[:, None]
    k_tile = k + first * k_row + (head // RK) * k_head + a.to(tl.int64)[:, None] * k_row + c[None, :]
    q_tile = q + first * q_row + (head // RQ) * q_head + a.to(tl.int64)[:, None] * q_row + c[None, :]
    aa, ba, bb, square_a, square_b = triangle(k_tile, k_tile, k_row, k_row, in_a, in_b, columns, BC, STAGES)
    tl.debug_barrier()
    store_keys(vectors, a, inverse_norm(square_a, NORM))
    store_keys(vectors, b, inverse_norm(square_b, NORM))
    tl.debug_barrier()
    Taa, Tba, Tbb = solve(aa, ba, bb, vectors, a, b)

    # P' = P T, a row of 64 behind those of X^T.
    tl.debug_barrier()  # here and below: so that nothing loaded so far is kept in registers for later
    aa, ba, bb, square_a, square_b = triangle(q_tile, k_tile, q_row, k_row, in_a, in_b, columns, BC, STAGES)
    row_a = store_queries(vectors, a, inverse_norm(square_a, NORM))
    row_b = store_queries(vectors, b, inverse_norm(square_b, NORM))
    aa = tl.where(a[:, None] >= a[None, :], gated(aa, vectors, a, a, row_a), 0.0).to(q.dtype.element_ty)
    bb = tl.where(b[:, None] >= b[None, :], gated(bb, vectors, b, b, row_b), 0.0).to(q.dtype.element_ty)
    ba = gated(ba, vectors, b, a, row_b).to(q.dtype.element_ty)
    p_tile = work + columns * 64 + a[:, None] * 64 + a[None, :]
    none = tl.zeros([32, 32], tl.float32)
    tl.store(p_tile, product2(aa, Taa, none).to(q.dtype.element_ty))
    tl.store(p_tile + 32, none.to(q.dtype.element_ty))
    tl.store(p_tile + 32 * 64, product2(bb, Tba, product2(ba, Taa, none)).to(q.dtype.element_ty))
    tl.store(p_tile + 32 * 64 + 32, product2(bb, Tbb, none).to(q.dtype.element_ty))

    # X^T, a row of 64 tokens for each column of k.
    tl.debug_barrier()
    end_a = tl.exp2(all_high - tl.load(vectors + HIGH + a)) * (tl.load(vectors + COLUMN + a) * all_rest)
    end_b = tl.exp2(all_high - tl.load(vectors + HIGH + b)) * (tl.load(vectors + COLUMN + b) * all_rest)
    Taa, Tba, Tbb = Taa * end_a[:, None], Tba * end_b[:, None], Tbb * end_b[:, None]
    none = tl.zeros([BC, 32], tl.float32)
    for at in tl.range(0, columns, BC, num_stages=STAGES):
        ka, kb = tl.load(k_tile + at, mask=in_a, other=0.0), tl.load(k_tile + at + 32 * k_row, mask=in_b, other=0.0)
        x_tile = work + (at + c[:, None]) * 64 + a[None, :]
        Xa = product2(tl.trans(kb), Tba, product2(tl.trans(ka), Taa, none))
        tl.store(x_tile, Xa.to(q.dtype.element_ty))
        tl.store(x_tile + 32, product2(tl.trans(kb), Tbb, none).to(q.dtype.element_ty))
