"""What a chunk of 64 tokens does, apart from the state that it starts from: for all chunks at once.

docs/maths.md writes a chunk as ``U = T (V - diag(d) K S)``, ``S' = d_C S + Kt^T U``, ``O = diag(d) Q S + P U`` (here
with S as [K, V], and Kt the keys decayed to the chunk's end). T, P and Kt need no state, so U need not be formed: with
``Y = V - diag(d) K S`` it is ``S' = d_C S + X^T Y`` and ``O = diag(d) Q S + P' Y``, where ``X = T^T Kt`` and
``P' = P T``. This kernel makes X^T and P' (rounded to q's dtype), the scan over chunks has two products left.

* One program has four warps, a warp 16 rows of every matrix of 64. What is computed is the left operand of a product in
  the registers that it was computed in, or the right one by way of shared memory, so nothing else is moved.
* A block diagonal matrix is kept "folded": its blocks below each other. As a right operand it is as narrow as a block,
  as a left one it is unfolded, in registers.
* The L2 norm is a factor of a row of q or k, and commutes with every product: q and k enter as they are stored.
* A decay between two tokens is ``2^(G_i - G_j)`` with G a running sum of logarithms. Each logarithm is split into a
  multiple of 1/8, whose sums and differences are exact, and a rest below 1/8, so a strong decay early in a chunk costs
  the weak ones behind it nothing. alpha = 0 counts as 2^-160, which is 0 in fp32.
* Slots: sequence i has the chunk slots from ``cu_seqlens[i] // 64 + i`` on. They are enough for any lengths, so the
  grid follows from shapes alone; a program whose slot is not used leaves.
"""

import triton
import triton.language as tl

from gated_delta.kernels.triton.shared import slot_of

CHUNK = 64
VECTORS = 8 * CHUNK
# Vectors of 64 numbers for each chunk. For the scan: what multiplies the rows of K S and Q S, and the decay of S.
FROM_K, FROM_Q, DECAY = tl.constexpr(0), tl.constexpr(64), tl.constexpr(128)
# For this kernel: G's exact part, 2^rest and its inverse, beta, and the factors that normalise k and q; that of q gives
# way to FROM_Q.
HIGH, REST, INVERSE, BETA = tl.constexpr(192), tl.constexpr(256), tl.constexpr(320), tl.constexpr(384)
NORM_K, NORM_Q = tl.constexpr(448), tl.constexpr(64)


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
    if dtype == tl.bfloat16:  # cut, not rounded: what is left is exact, and scalar conversions are slow
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        high = x.to(dtype).to(tl.float32)
    return high.to(dtype), (x - high).to(dtype)


@triton.jit
def product(x_high, x_low, y_high, y_low):
    """``x @ y`` in fp32 to about 16 bits, as three products of bf16 parts."""
    return tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high)))


@triton.jit
def product2(x, y, dtype: tl.constexpr):
    """``x @ y`` of x in 16 bits and fp32 y, which enters in two parts."""
    high, low = parts(y, dtype)
    return tl.dot(x, high, tl.dot(x, low))


@triton.jit
def beside(left, right):
    """``[left, right]``; every thread keeps what it has."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def odd(B: tl.constexpr):
    """Whether a row is in every second block of B rows."""
    return (tl.arange(0, 64) // B % 2 == 1)[:, None]


@triton.jit
def unfold(x, RIGHT: tl.constexpr):
    """``[64, 64]`` of pairs of blocks on the diagonal: 0 above, and below a block of x, to the left or right. The
    blocks of x that this leaves out are 0.
    """
    x = beside(tl.zeros_like(x), x) if RIGHT else beside(x, tl.zeros_like(x))
    if x.shape[1] == 32:
        x = beside(tl.where(odd(32), 0.0, x), tl.where(odd(32), x, 0.0))
    return parts(x, tl.bfloat16)


@triton.jit
def row_of(x, at: tl.constexpr):
    """``x[:, at]`` as a column."""
    return tl.sum(tl.where(tl.arange(0, 8)[None, :] == at, x, -0.0), axis=1)[:, None]


@triton.jit
def substitute(own, scratch):
    """``(I + N)^-1`` of four strictly lower triangular blocks N of 16, folded, by forward substitution.

    The inverse is held transposed, in two halves, so that two threads share a column. N goes through memory, transposed
    too, as each of its numbers is needed by all 16 columns.
    """
    n, m, r = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, 8)[None, :]
    tl.store(scratch + (n // 16 * 256 + n % 16)[:, None] + 16 * m[None, :], own)
    tl.debug_barrier()
    N = scratch + (n // 16 * 256)[:, None] + r
    top, bottom = tl.where(r == n[:, None] % 16, 1.0, 0.0), tl.where(r + 8 == n[:, None] % 16, 1.0, 0.0)
    for j in tl.static_range(15):
        if j < 8:
            row = row_of(top, j)
            top -= tl.load(N + 16 * j) * row
        else:
            row = row_of(bottom, j - 8)
        bottom -= tl.load(N + 16 * j + 8) * row
    X = tl.permute(tl.join(top, bottom), [0, 2, 1])  # [block and column, half, row of it]
    return tl.reshape(tl.permute(tl.reshape(X, [4, 16, 16]), [0, 2, 1]), [64, 16])


@triton.jit
def halves(x):
    """The left and the right half of x; every thread keeps what it has."""
    return tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]).split()


@triton.jit
def widen(x, C):
    """Inverses of blocks twice as wide, ``[[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]``, folded: from
    ``[[A^-1], [D^-1]]`` and ``[[0], [C]]``.
    """
    B: tl.constexpr = x.shape[1]
    x_high, x_low = parts(x, tl.bfloat16)
    left_high, left_low = unfold(C, 0)
    y = product(left_high, left_low, x_high, x_low)
    y_high, y_low = parts(y, tl.bfloat16)
    left_high, left_low = unfold(tl.where(odd(B), x, y), 1)  # y is 0 there, and lies as a left operand must
    y = product(left_high, left_low, y_high, y_low)
    return beside(tl.where(odd(B), -y, x), tl.where(odd(B), x, 0.0))


@triton.jit
def blocks_of(x):
    """What blocks of 32, of 16 and the diagonal have below each other in x, folded."""
    left, right = halves(x)
    C32 = tl.where(odd(32), left, 0.0)
    left, right = halves(tl.where(odd(32), right, left))
    return C32, tl.where(odd(16), left, 0.0), tl.where(odd(16), right, left)


@triton.jit
def invert(N, scratch):
    """``(I + N)^-1`` of strictly lower triangular N, whose diagonal is not looked at: blocks of 16, then pairs."""
    C32, C16, own = blocks_of(N)
    own = tl.where(tl.arange(0, 64)[:, None] % 16 > tl.arange(0, 16)[None, :], own, 0.0)
    return widen(widen(substitute(own, scratch), C16), C32)


@triton.jit
def store_gates(vectors, g, beta, first, length, head, g_row, beta_row, LOG: tl.constexpr):
    """Gates of a chunk from alpha or its natural logarithm, kept in memory so that every use has them where it needs
    them; where there is no token alpha is 1 and beta 0.
    """
    n = tl.arange(0, 64)
    log_alpha = tl.zeros([64], tl.float32)
    if g is not None:
        g += first * g_row + head + n * g_row
        log_alpha = tl.load(g, mask=n < length, other=0.0 if LOG else 1.0).to(tl.float32)
        if LOG:
            log_alpha *= 1.4426950408889634
        else:
            log_alpha = tl.where(log_alpha < 1e-37, -160.0, tl.log2(tl.maximum(log_alpha, 1e-37)))
    log_alpha = tl.maximum(log_alpha, -160.0)
    high = tl.floor(log_alpha * 8.0 + 0.5) * 0.125
    strength = tl.full([64], 1.0, tl.float32)
    if beta is not None:
        strength = tl.load(beta + first * beta_row + head + n * beta_row, mask=n < length, other=0.0).to(tl.float32)
    tl.store(vectors + BETA + n, tl.where(n < length, strength, 0.0))
    rest = tl.cumsum(log_alpha - high, axis=0)
    tl.store(vectors + REST + n, tl.exp2(rest))
    tl.store(vectors + INVERSE + n, tl.exp2(-rest))
    tl.store(vectors + HIGH + n, tl.cumsum(high, axis=0))


@triton.jit
def diagonal(x):
    """The diagonal of x, which lies in its diagonal blocks of 16."""
    _, _, own = blocks_of(x)
    return tl.sum(tl.where(tl.arange(0, 64)[:, None] % 16 == tl.arange(0, 16)[None, :], own, 0.0), axis=1)


@triton.jit(do_not_specialize=["N", "null_slot"])
def prepare(
    q, k, g, beta, cu_seqlens, slots, work, vectors, null_slot, N,
    q_row, q_head, k_row, k_head, g_row, beta_row, cu_stride, slot_stride,
    RQ: tl.constexpr, RK: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One chunk of one state head. RQ, RK: state heads to a head of q and of k. BC: columns of q and k at a time."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = sequence_of(cu_seqlens, cu_stride, N, place)
    begin = tl.load(cu_seqlens + sequence * cu_stride).to(tl.int64)
    end = tl.load(cu_seqlens + (sequence + 1) * cu_stride).to(tl.int64)
    first = begin + (place - (begin // 64 + sequence)) * 64
    if first >= end:
        return
    if slot_of(slots, slot_stride, tl.full([], 0, tl.int32) + sequence, null_slot) < 0:
        return
    n, c = tl.arange(0, 64), tl.arange(0, BC)
    i, j = n[:, None], n[None, :]
    chunk = place.to(tl.int64) * tl.num_programs(1) + head
    work += chunk * ((K + 64) * 64)
    vectors += chunk * (8 * 64)
    k_tile = k + first * k_row + (head // RK) * k_head + c[None, :] + n.to(tl.int64)[:, None] * k_row
    q_tile = q + first * q_row + (head // RQ) * q_head + c[None, :] + n.to(tl.int64)[:, None] * q_row
    length = tl.minimum(end - first, 64).to(tl.int32)
    inside = (n < length)[:, None]

    KK, QK = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    QQ = tl.zeros([64, 64], tl.float32)  # for its diagonal: cheaper than sums over rows
    for at in tl.static_range(0, K, BC):
        mask = inside & (at + c < K)[None, :] if at + BC > K else inside
        kt, qt = tl.load(k_tile + at, mask=mask, other=0.0), tl.load(q_tile + at, mask=mask, other=0.0)
        if at == 0:  # here, while q and k are on their way
            store_gates(vectors, g, beta, first, length, head, g_row, beta_row, LOG)
        if NORM:
            QQ = tl.dot(qt, tl.trans(qt), QQ)
        KK, QK = tl.dot(kt, tl.trans(kt), KK), tl.dot(qt, tl.trans(kt), QK)
    squares = tl.full([64, 2], 1.0, tl.float32)
    if NORM:
        squares = tl.rsqrt(tl.join(diagonal(KK), diagonal(QQ)) + 1e-6)
    tl.store(vectors + NORM_K + (NORM_Q - NORM_K) * tl.arange(0, 2)[None, :] + i, squares)
    tl.debug_barrier()

    # Triangles of k, and of q and k.
    high, rest = tl.load(vectors + HIGH + n), tl.load(vectors + REST + n)
    norm = tl.load(vectors + NORM_K + n)
    column = norm * tl.load(vectors + INVERSE + n)
    decay = tl.exp2(tl.where(i >= j, high[:, None] - high[None, :], -1000.0)) * column[None, :]  # 0 above the diagonal
    P = (QK * (decay * (tl.load(vectors + NORM_Q + n) * rest)[:, None])).to(q.dtype.element_ty)
    N = KK * (decay * (tl.load(vectors + BETA + n) * rest * norm)[:, None])
    T = invert(N, work.to(tl.pointer_type(tl.float32), bitcast=True))

    # For the scan, behind the barrier of invert: overwrites the factors that normalise q.
    start = tl.exp2(tl.load(vectors + HIGH + n)) * tl.load(vectors + REST + n)
    tl.store(vectors + FROM_K + n, start * tl.load(vectors + NORM_K + n))
    tl.store(vectors + FROM_Q + n, start * tl.load(vectors + NORM_Q + n))
    tl.store(vectors + DECAY, tl.exp2(tl.load(vectors + HIGH + 63)) * tl.load(vectors + REST + 63))

    # Here and below: loaded again rather than kept in registers.
    T *= tl.load(vectors + BETA + n)[None, :]

    # P' = P T, a row of 64 behind those of X^T.
    tl.store(work + K * 64 + i * 64 + j, product2(P, T, q.dtype.element_ty).to(q.dtype.element_ty))

    # X^T, a row of 64 tokens for each column of k.
    left = tl.exp2(tl.load(vectors + HIGH + 63) - tl.load(vectors + HIGH + n)) * tl.load(vectors + REST + 63)
    T *= (left * tl.load(vectors + NORM_K + n) * tl.load(vectors + INVERSE + n))[:, None]
    for at in tl.static_range(0, K, BC):
        if K > BC:
            mask = inside & (at + c < K)[None, :] if at + BC > K else inside
            kt = tl.load(k_tile + at, mask=mask, other=0.0)
        X = product2(tl.trans(kt), T, q.dtype.element_ty).to(q.dtype.element_ty)
        x_tile = work + (at + c[:, None]) * 64 + j
        if at + BC > K:
            tl.store(x_tile, X, mask=(at + c < K)[:, None])
        else:
            tl.store(x_tile, X)
