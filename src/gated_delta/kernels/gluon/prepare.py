"""What a chunk of 64 tokens does, apart from the state that it starts from: for all chunks at once, on Hopper.

docs/maths.md writes a chunk as ``U = T (V - diag(d) K S)``, ``S' = d_C S + Kt^T U``, ``O = diag(d) Q S + P U``. T, P
and Kt need no state, so U need not be formed: with ``Y = V - diag(d) K S`` it is ``S' = d_C S + X^T Y`` and
``O = diag(d) Q S + P' Y``, where ``X = T^T Kt`` and ``P' = P T``. This kernel makes X and P' (rounded to q's dtype);
chain.py has two products left.

* ``T = (I + N)^-1 diag(beta)`` with N strictly lower triangular. All matrices are held transposed, so that T is the
  left operand of both products, from registers. The diagonal blocks of 16 of N are inverted by substitution in fp32, a
  thread a column; twice, pairs of blocks are then joined, ``[[A, C], [0, D]]^-1 = [[A^-1, -A^-1 C D^-1], [0, D^-1]]``.
  For bf16 activations these products are fp16: every entry is at most 2, and 11 bits cost the error budget 2 %. For
  fp16 activations they have two parts, and T itself enters products in two parts for both: one alone would exceed the
  budget where keys are similar.
* A decay between two tokens is ``2^(G_i - G_j)`` with G a running sum of logarithms, each split into a multiple of 1/8,
  whose sums and differences are exact, and a rest below 1/8: a strong decay costs the weak ones behind it nothing.
  alpha = 0 counts as 2^-160, which is 0 in fp32.
* The L2 norm is a factor of a row of q or k, and commutes with every product: q and k enter as they are stored.
* Slots: sequence i has the chunk slots from ``cu_seqlens[i] // 64 + i`` on. They are enough for any lengths, so the
  grid follows from shapes alone; a program whose slot is not used leaves.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Vectors of a chunk in memory: what multiplies rows of K S and of Q S, and the decay of the state, 64 times.
VECTORS = gl.constexpr(4 * 64)
FROM_K, FROM_Q, DECAY = gl.constexpr(0), gl.constexpr(64), gl.constexpr(128)
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Their names since Triton 3.8, or those before 3.9."""


@constexpr_function
def layout_of(columns: int) -> gl.NVMMADistributedLayout:
    """Of ``[64, columns]`` results of tensor cores: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


ACC = gl.constexpr(layout_of(64))
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
"""64 numbers, all in every warp."""
PLACE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def sequence_of(cu_seqlens, stride, N, place, size):
    """The sequence that has this place: the last one whose places begin at or before it. Sequence i has places from
    ``cu_seqlens[i] // size + i`` on, enough for any lengths. Every step looks at 128.
    """
    found = gl.to_tensor(0)
    width = N
    while width > 1:
        step = (width + 127) // 128
        i = found + step * gl.arange(0, 128, PLACE)
        base = gl.load(cu_seqlens + i.to(gl.int64) * stride, mask=i < N, other=0).to(gl.int64) // size + i
        found += step * (gl.sum(((base <= place) & (i < N)).to(gl.int32), axis=0) - 1)
        width = step
    return found


@gluon.jit
def slot_of(slots, stride, sequence, null_slot):
    """The slot of a sequence's state, negative for padding."""
    slot = sequence.to(gl.int64)
    if slots is not None:
        slot = gl.load(slots + slot * stride).to(gl.int64)
        slot = gl.where(slot == null_slot, -1, slot)
    return slot


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def gates_of(g, beta, length, g_row, beta_row, LOG: gl.constexpr):
    """log2 alpha and beta of a chunk's tokens; 0 where there is no token."""
    row = gl.arange(0, 64, LINE).to(gl.int64)
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
def substitute(N, sD):
    """Inverses of the diagonal blocks of 16 of ``I + N``; sD ``[block, row, column]``. N is not looked at on and below
    its diagonal.
    """
    sN = gl.allocate_shared_memory(gl.float32, [4, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    thin = gl.reshape(N, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 == axis_of(4, 1, layout)
    sN.reshape([64, 16]).store(gl.sum(gl.where(own, thin, 0.0), axis=1))
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 16], [2, 16, 1], [4, 1, 1], [2, 1, 0])  # a thread a column
    row = axis_of(16, 2, cube)
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :]
    x = gl.zeros([4, 16, 16], gl.float32, cube)  # [block, column, row]
    for i in gl.static_range(15, -1, -1):
        line = sN.slice(i, 1, dim=1).load(cube)
        new = gl.where(column == i, 1.0, 0.0) - gl.sum(gl.where(row > i, line * x, -0.0), axis=2)
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
def left_of(x, COLUMNS: gl.constexpr, FINE: gl.constexpr):
    """As left operand in fp16 of a product with so many columns, and FINE: what that leaves of x."""
    left: gl.constexpr = gl.DotOperandLayout(0, layout_of(COLUMNS), 2)
    high = x.to(gl.float16)
    low = high
    if FINE:
        low = (x - high.to(gl.float32)).to(gl.float16)
    return gl.convert_layout(high, left), gl.convert_layout(low, left)


@gluon.jit
def product(x, y, COLUMNS: gl.constexpr, FINE: gl.constexpr):
    """Of x and y by fp16 tensor cores, FINE: of two fp16 parts each; y has so many columns."""
    a, rest = x
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, COLUMNS], gl.float16)
    sX = gl.allocate_shared_memory(gl.float16, [64, COLUMNS], tile)
    high = y.to(gl.float16)
    sX.store(high)
    if FINE:
        sY = gl.allocate_shared_memory(gl.float16, [64, COLUMNS], tile)
        sY.store((y - high.to(gl.float32)).to(gl.float16))
    fence_async_shared()
    zero = gl.zeros([64, COLUMNS], gl.float32, layout_of(COLUMNS))
    z = warpgroup_mma(a, sX, zero, use_acc=False, is_async=True)
    if FINE:
        z = warpgroup_mma(a, sY, z, is_async=True)
        z = warpgroup_mma(rest, sX, z, is_async=True)
    z, a, rest = warpgroup_mma_wait(0, deps=(z, a, rest))
    return z


@gluon.jit
def lower(B: gl.constexpr, LAYOUT: gl.constexpr):
    """Whether a row is in every second block of B rows."""
    return (gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) // B % 2 == 1)[:, None]


@gluon.jit
def beside(left, right):
    """``[left, right]``; every thread keeps what it has."""
    COLUMNS: gl.constexpr = 2 * left.shape[1]
    x = gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [64, COLUMNS])
    return gl.convert_layout(x, layout_of(COLUMNS))


@gluon.jit
def inverse(N, FINE: gl.constexpr):
    """``(I + N)^-1`` of strictly upper triangular N, which is not looked at on and below its diagonal.

    Block diagonal matrices are kept folded, their blocks below each other: as a right operand, and in memory, they are
    as narrow as a block.
    """
    i, j = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None], gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    near = left_of(gl.where((i // 32 == j // 32) & (i // 16 < j // 16), N, 0.0), 16, FINE)
    far = left_of(gl.where(i // 32 < j // 32, N, 0.0), 32, FINE)
    sD = gl.allocate_shared_memory(gl.float32, [4, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    substitute(N, sD)
    diagonal = left_of(spread(sD, N), 16, FINE)
    x = sD.reshape([64, 16]).load(layout_of(16))
    y = product(diagonal, product(near, x, 16, FINE), 16, FINE)
    below = lower(16, layout_of(16))
    x = beside(gl.where(below, 0.0, x), gl.where(below, x, -y))
    y = product(far, x, 32, FINE)
    below = lower(32, layout_of(32))
    above = gl.where(below, 0.0, x)
    y = product(left_of(beside(above, gl.zeros([64, 32], gl.float32, layout_of(32))), 32, FINE), y, 32, FINE)
    return beside(above, gl.where(below, x, -y))


@gluon.jit
def running(log_alpha):
    """Running sums of the logarithms, as an exact part and 2^rest, and both for the whole chunk."""
    high = gl.floor(log_alpha * 8.0 + 0.5) * 0.125
    low = log_alpha - high
    rest = gl.associative_scan(low, 0, add)
    return gl.associative_scan(high, 0, add), gl.exp2(rest), gl.exp2(-rest), gl.sum(high, 0), gl.exp2(gl.sum(low, 0))


@gluon.jit
def decays(high, of_row):
    """``2^(G_i - G_j)`` but for a factor of its column; zero below the diagonal. Vectors in shared memory."""
    r: gl.constexpr = gl.SliceLayout(1, ACC)
    c: gl.constexpr = gl.SliceLayout(0, ACC)
    i, j = gl.arange(0, 64, r)[:, None], gl.arange(0, 64, c)[None, :]
    difference = high.load(c)[None, :] - high.load(r)[:, None]
    return gl.exp2(gl.where(i <= j, difference, -1000.0)) * of_row.load(r)[:, None]


@gluon.jit
def parts(x, DTYPE: gl.constexpr):
    """fp32 as a sum of two numbers of 16 bits, as left operands."""
    left: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    if gl.bfloat16 == DTYPE:  # cut, not rounded: what is left is exact, and scalar conversions are slow
        high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    else:
        high = x.to(DTYPE).to(gl.float32)
    return gl.convert_layout(high.to(DTYPE), left), gl.convert_layout((x - high).to(DTYPE), left)


@gluon.jit
def product2(high, low, y):
    """``(high + low) @ y``"""
    z = warpgroup_mma(low, y, gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True)
    return warpgroup_mma(high, y, z, is_async=True)


@gluon.jit
def store_square(base, x, LINE_LENGTH: gl.constexpr):
    """``[64, 64]`` in the dtype of base, lines of so many numbers."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n, d = gl.arange(0, 64, gl.SliceLayout(1, rows))[:, None], gl.arange(0, 64, gl.SliceLayout(0, rows))[None, :]
    gl.store(base + n * LINE_LENGTH + d, gl.convert_layout(x.to(base.dtype.element_ty), rows))


@gluon.jit
def both(sX, sY):
    """``X @ Y^T`` of tiles in two halves."""
    z = gl.zeros([64, 64], gl.float32, ACC)
    z = warpgroup_mma(sX.index(0), sY.index(0).permute((1, 0)), z, use_acc=False, is_async=True)
    return warpgroup_mma(sX.index(1), sY.index(1).permute((1, 0)), z, is_async=True)


@gluon.jit
def row_norms(sX, line):
    """``1 / |x|`` of rows of a tile in two halves, by way of a vector in shared memory. ``convert_layout`` would go
    by way of room that the compiler takes from operands of products under way.
    """
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x, y = sX.index(0).load(rows).to(gl.float32), sX.index(1).load(rows).to(gl.float32)
    line.store(gl.rsqrt(gl.sum(x * x + y * y, axis=1) + 1e-6))
    return line.load(LINE)


@gluon.jit
def line_in_shared():
    """Room for a vector, which every layout can be read from."""
    return gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit(do_not_specialize=["N", "null_slot"])
def prepare(
    q, k, g, beta, cu_seqlens, slots, x, p, vectors, scale, null_slot, N,
    q_row, q_head, k_row, k_head, g_row, g_head, beta_row, beta_head, cu_stride, slot_stride,
    RQ: gl.constexpr, RK: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr,
):  # fmt: skip
    """One chunk of one state head. RQ, RK: state heads to a head of q and of k."""
    place, head = gl.program_id(0), gl.program_id(1).to(gl.int64)
    sequence = sequence_of(cu_seqlens, cu_stride, N, place, 64)
    begin = gl.load(cu_seqlens + sequence * cu_stride).to(gl.int64)
    end = gl.load(cu_seqlens + (sequence + 1) * cu_stride).to(gl.int64)
    first = begin + (place - (begin // 64 + sequence)) * 64
    if first >= end:
        return
    if slot_of(slots, slot_stride, sequence, null_slot) < 0:
        return
    length = gl.minimum(end - first, 64).to(gl.int32)
    dtype: gl.constexpr = q.dtype.element_ty
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    sQ = gl.allocate_shared_memory(dtype, [2, 64, 64], square)
    sK = gl.allocate_shared_memory(dtype, [2, 64, 64], square)
    # Here, before products run: the compiler takes q's room for free as soon as they have been issued.
    sP = gl.allocate_shared_memory(dtype, [64, 64], square)
    s_high, s_of_row, s_of_k = line_in_shared(), line_in_shared(), line_in_shared()
    s_of_q, s_left, s_strength = line_in_shared(), line_in_shared(), line_in_shared()
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=128)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    n, c = gl.arange(0, 64, gl.SliceLayout(1, rows))[:, None], gl.arange(0, 64, gl.SliceLayout(0, rows))[None, :]
    g += first * g_row + head * g_head
    beta += first * beta_row + head * beta_head
    log_alpha, strength = gates_of(g, beta, length, g_row, beta_row, LOG)
    q += first * q_row + head // RQ * q_head
    k += first * k_row + head // RK * k_head
    for half in gl.static_range(2):
        copy_async(sK.index(half), k + (n * k_row + (c + 64 * half)), mask=n < length)
        copy_async(sQ.index(half), q + (n * q_row + (c + 64 * half)), mask=n < length)
    async_copy.mbarrier_arrive(landed.index(0), increment_count=False)
    high, grown, shrunk, whole, rest = running(log_alpha)
    mbarrier.wait(landed.index(0), 0)
    fence_async_shared()

    kk, kq = both(sK, sK), both(sK, sQ)
    # What multiplies columns of N^T and of P^T, rows of both, and columns of T on their way into X; for the chain.
    start, left = gl.exp2(high) * grown, gl.exp2(whole - high) * rest * shrunk
    of_k, of_q = grown * strength, grown * scale
    from_k, from_q = -start, start * scale
    if NORM:
        k_norm, q_norm = row_norms(sK, s_of_k), row_norms(sQ, s_of_q)
        of_k, of_q, shrunk, left = of_k * k_norm, of_q * q_norm, shrunk * k_norm, left * k_norm
        from_k, from_q = from_k * k_norm, from_q * q_norm
    s_high.store(high)
    s_of_row.store(shrunk)
    s_of_k.store(of_k)
    s_of_q.store(of_q)
    s_left.store(left)
    s_strength.store(strength)

    KK, KQ = warpgroup_mma_wait(0, deps=(kk, kq))
    decay = decays(s_high, s_of_row)
    sP.store((KQ * (decay * s_of_q.load(gl.SliceLayout(0, ACC))[None, :])).to(dtype))
    T = inverse(KK * (decay * s_of_k.load(gl.SliceLayout(0, ACC))[None, :]), dtype == gl.float16)
    T = T * s_strength.load(gl.SliceLayout(1, ACC))[:, None]
    high_T, low_T = parts(T, dtype)
    PT, high_T, low_T = warpgroup_mma_wait(0, deps=(product2(high_T, low_T, sP), high_T, low_T))
    # Writes to memory come after the last fence, which would wait for them.
    chunk = place.to(gl.int64) * gl.num_programs(1) + head
    x, p, vectors = x + chunk * (64 * 128), p + chunk * (64 * 64), vectors + chunk * VECTORS
    line = gl.arange(0, 64, LINE)
    gl.store(vectors + FROM_K + line, from_k)
    gl.store(vectors + FROM_Q + line, from_q)
    gl.store(vectors + DECAY + line, gl.exp2(whole) * rest + gl.zeros([64], gl.float32, LINE))
    store_square(p, PT, 64)
    high_T, low_T = parts(T * s_left.load(gl.SliceLayout(0, ACC))[None, :], dtype)
    for half in gl.static_range(2):
        X = product2(high_T, low_T, sK.index(half))
        X, high_T, low_T = warpgroup_mma_wait(0, deps=(X, high_T, low_T))
        store_square(x + 64 * half, X, 128)
