"""What a chunk of 64 tokens does, apart from the state that it starts from: for all chunks at once, on Hopper.

docs/maths.md writes a chunk as ``U = T (V - diag(d) K S)``, ``S' = d_C S + Kt^T U``, ``O = diag(d) Q S + P U``. T, P
and Kt need no state, so U need not be formed: with ``Y = V - diag(d) K S`` it is ``S' = d_C S + X^T Y`` and
``O = diag(d) Q S + P' Y``, where ``X = T^T Kt`` and ``P' = P T``. This file makes X and P' (rounded to q's dtype);
chain.py has two products left. All matrices are held transposed, so that T is the left operand of both products, from
registers, in two parts: one alone would exceed the error budget where keys are similar.

* Decays inside a chunk only multiply rows and columns of what comes out: with ``E_i = 2^(G_i)``, G a running sum of
  log2 alpha, and ``M = I + tril(diag(beta) K K^T, -1)``, ``T = diag(E) M^-1 diag(beta / E)``, and E cancels inside of
  both products: ``X = diag(beta E_C / E) M^-T K``, ``P' = diag(E) tril(Q K^T) M^-1 diag(beta / E)``. For P', E is taken
  relative to the chunk's middle. Where a chunk decays by more than 2^-200 that would leave fp32: then every entry of P'
  gets its own decay.
* A running sum is split into multiples of 1/8, whose sums and differences are exact, and a rest: a strong decay costs
  the weak ones behind it nothing. alpha = 0 counts as 2^-160, which is 0 in fp32.
* The L2 norm is a factor of a row of q or k, and commutes with every product: q and k enter as they are stored.
* Slots: sequence i has the chunk slots from ``cu_seqlens[i] // 64 + i`` on. They are enough for any lengths, so the
  grid follows from shapes alone; a program whose slot is not used leaves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gated_delta.kernels.gluon.inverse import ACC, inverse, layout_of, put, rooms

# Vectors of a chunk in memory: what multiplies rows of K S and of Q S, and the decay of the state, 64 times.
VECTORS = gl.constexpr(4 * 64)
FROM_K, FROM_Q, DECAY = gl.constexpr(0), gl.constexpr(64), gl.constexpr(128)
# Behind these in shared memory, vectors that only this file looks at: store_vectors has them.
LINES = gl.constexpr(16 * 64)
HIGH, GROWN, SHRUNK, STRONG = gl.constexpr(192), gl.constexpr(256), gl.constexpr(320), gl.constexpr(384)
OF_K, OF_Q, ROWS_OF_P = gl.constexpr(512), gl.constexpr(576), gl.constexpr(640)
COLUMNS_OF_P, ROWS_OF_X, NORM_K = gl.constexpr(704), gl.constexpr(768), gl.constexpr(832)
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
"""Their names since Triton 3.8, or those before 3.9."""
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
"""64 numbers, all in every warp."""
PLACE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def wide(x):
    """A stride, for products that need 64 bits."""
    return gl.to_tensor(x).to(gl.int64)


@gluon.jit
def griddepcontrol(WHAT: gl.constexpr):
    """Between kernels that run side by side (programmatic dependent launch): launch_dependents lets the next one begin
    when all programs have come here, wait returns when the one before has ended. Nothing, where they do not.
    """
    gl.inline_asm_elementwise("griddepcontrol." + WHAT + "; // $0", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def narrow(x):
    """A coordinate for the copy engine."""
    return gl.to_tensor(x).to(gl.int32)


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
def clear_rows(tile, left):
    """Zeros from row ``left`` on, fenced: the copy engine brought rows of the next sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    for half in gl.static_range(0, 128, 64):
        columns = tile.slice(half, 64, dim=1)
        columns.store(gl.where(row < left, columns.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def gates_of(g, beta, length, g_row, beta_row, LOG: gl.constexpr):
    """Gates of a chunk's tokens as they are stored; where there is no token, nothing decays and beta is 0."""
    row = gl.arange(0, 64, LINE).to(gl.int64)
    x = gl.load(g + row * g_row, mask=row < length, other=0.0 if LOG else 1.0)
    return x.to(gl.float32), gl.load(beta + row * beta_row, mask=row < length, other=0.0).to(gl.float32)


@gluon.jit
def log2_of(x, LOG: gl.constexpr):
    """log2 alpha."""
    if LOG:
        x = x * 1.4426950408889634
    else:
        x = gl.where(x < 1e-37, -160.0, gl.log2(gl.maximum(x, 1e-37)))
    return gl.maximum(x, -160.0)


@gluon.jit
def running(log_alpha):
    """Running sums of the logarithms, as an exact part and 2^rest, and both for the whole chunk."""
    high = gl.floor(log_alpha * 8.0 + 0.5) * 0.125
    low = log_alpha - high
    rest = gl.associative_scan(low, 0, add)
    return gl.associative_scan(high, 0, add), gl.exp2(rest), gl.exp2(-rest), gl.sum(high, 0), gl.exp2(gl.sum(low, 0))


@gluon.jit
def line_of(vectors, WHICH: gl.constexpr):
    """One of a chunk's vectors."""
    return vectors.slice(WHICH, 64)


@gluon.jit
def rows_of(vectors, WHICH: gl.constexpr, COLUMNS: gl.constexpr = 64):
    return vectors.slice(WHICH, 64).load(gl.SliceLayout(1, layout_of(COLUMNS)))[:, None]


@gluon.jit
def columns_of(vectors, WHICH: gl.constexpr, FIRST: gl.constexpr = 0, COUNT: gl.constexpr = 64):
    return vectors.slice(WHICH + FIRST, COUNT).load(gl.SliceLayout(0, layout_of(COUNT)))[None, :]


@gluon.jit
def upper(FIRST: gl.constexpr, COUNT: gl.constexpr, nothing):
    """Which entries of COUNT columns from FIRST on are on the diagonal or above."""
    row = gl.arange(0, 64, gl.SliceLayout(1, layout_of(COUNT))) + nothing
    return FIRST + gl.arange(0, COUNT, gl.SliceLayout(0, layout_of(COUNT)))[None, :] >= row[:, None]


@gluon.jit
def decayed(PT, vectors, nothing, FIRST: gl.constexpr, FINE: gl.constexpr):
    """Columns of P'^T from FIRST on, of those without decays and beta."""
    COUNT: gl.constexpr = PT.shape[1]
    PT = PT * rows_of(vectors, ROWS_OF_P, COUNT)
    if FINE:
        PT = PT * columns_of(vectors, COLUMNS_OF_P, FIRST, COUNT)
    if gl.max(vectors.slice(STRONG, 1).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0) > 0:
        decays = gl.exp2(columns_of(vectors, HIGH, FIRST, COUNT) - rows_of(vectors, HIGH, COUNT))
        decays = gl.where(upper(FIRST, COUNT, nothing), decays, 0.0)
        PT = PT * decays * rows_of(vectors, SHRUNK, COUNT) * columns_of(vectors, GROWN, FIRST, COUNT)
    return PT


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
    """``(high + low) @ y``, under way."""
    COUNT: gl.constexpr = y.shape[1]
    zero = gl.zeros([64, COUNT], gl.float32, layout_of(COUNT))
    z = warpgroup_mma(low, y, zero, use_acc=False, is_async=True)
    return warpgroup_mma(high, y, z, is_async=True)


@gluon.jit
def vectors_in_shared(STAGES: gl.constexpr, LENGTH: gl.constexpr):
    """Room for a chunk's vectors, which every layout can be read from."""
    return gl.allocate_shared_memory(gl.float32, [STAGES, LENGTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def one_of(a, b, c, d):
    """Four lines, which every warp has: one for each, ``[warp, ..]``."""
    each: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    line: gl.constexpr = gl.SliceLayout(0, each)
    a, b = gl.convert_layout(a, line)[None, :], gl.convert_layout(b, line)[None, :]
    c, d = gl.convert_layout(c, line)[None, :], gl.convert_layout(d, line)[None, :]
    warp = gl.arange(0, 4, gl.SliceLayout(1, each))[:, None]
    return gl.where(warp < 2, gl.where(warp == 0, a, b), gl.where(warp == 2, c, d))


@gluon.jit
def store_vectors(gates, scale, vectors, LOG: gl.constexpr, FINE: gl.constexpr):
    """Put into shared memory what a chunk's matrices are multiplied with, and whether its decay is strong."""
    decays, strength = gates
    high, grown, shrunk, whole, rest = running(log2_of(decays, LOG))
    middle = gl.floor(whole * 4.0) * 0.125
    strong = whole < -200.0  # gates are at most 1: nothing before is lower
    all, start = gl.zeros([64], gl.float32, LINE), gl.exp2(high) * grown
    left, flag = gl.exp2(whole - high) * rest * shrunk, gl.where(strong, 1.0, 0.0) + all
    decay = gl.exp2(whole) * rest + all
    up = gl.where(strong, 1.0, gl.exp2(high - middle) * grown)
    down = gl.where(strong, strength, gl.exp2(middle - high) * shrunk * strength)
    of_q, of_p = up * scale, all
    if FINE:  # fp16 has no room for decays
        of_q, of_p = scale + all, up
    # At once: between two stores the compiler would have the group wait.
    first, second = one_of(-start, start * scale, decay, high), one_of(grown, shrunk, flag, all)
    third, fourth = one_of(strength, of_q, down, of_p), one_of(left * strength, all, all, all)
    LENGTH: gl.constexpr = vectors.shape[0]
    lines = gl.join(gl.join(first, second), gl.join(third, fourth))
    vectors.store(gl.reshape(gl.permute(lines, [3, 2, 0, 1]), [LENGTH]))


@gluon.jit
def row_norms(sX, line):
    """``1 / |x|`` of rows of a tile, by way of a vector in shared memory. ``convert_layout`` would go by way of room
    that the compiler takes from operands of products under way.
    """
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for first in gl.static_range(0, 64, 32):
        x = sX.slice(first, 32, dim=0).slice(0, 64, dim=1).load(rows).to(gl.float32)
        y = sX.slice(first, 32, dim=0).slice(64, 64, dim=1).load(rows).to(gl.float32)
        line.slice(first, 32).store(gl.rsqrt(gl.sum(x * x + y * y, axis=1) + 1e-6))
    return line.load(LINE)


@gluon.jit
def multiply(line, factor):
    line.store(line.load(LINE) * factor)


@gluon.jit
def normalise(sQ, sK, vectors):
    """Put the norms of rows of q and k into the vectors."""
    q_norm = row_norms(sQ, line_of(vectors, NORM_K))
    multiply(line_of(vectors, OF_Q), q_norm)
    multiply(line_of(vectors, FROM_Q), q_norm)
    k_norm = row_norms(sK, line_of(vectors, NORM_K))
    multiply(line_of(vectors, OF_K), k_norm)
    multiply(line_of(vectors, FROM_K), k_norm)


@gluon.jit
def pairs(sX, sK):
    """Products of rows of k and of another tile."""
    zero = gl.zeros([64, 64], gl.float32, ACC)
    z = warpgroup_mma(sK, sX.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(z,))


@gluon.jit
def put_keys(sK, room, vectors, nothing, NORM: gl.constexpr):
    """-N, without decays, into its room."""
    N = pairs(sK, sK) * -columns_of(vectors, OF_K)
    if NORM:
        N = N * rows_of(vectors, NORM_K)
    put(N, room, nothing, sK.dtype == gl.float16)


@gluon.jit
def put_queries(sQ, sK, sP, vectors, nothing, NORM: gl.constexpr):
    """P, without decays, into shared memory, fenced."""
    FINE: gl.constexpr = sP.dtype == gl.float16
    KQ = gl.where(upper(0, 64, nothing), pairs(sQ, sK), 0.0)
    KQ = KQ * columns_of(vectors, OF_Q)  # before it is rounded to fp16, which it may be too large or too small for
    if NORM and FINE:
        KQ = KQ * rows_of(vectors, NORM_K)
    sP.permute((1, 0)).store(KQ.to(sP.dtype))
    fence_async_shared()


@gluon.jit
def without_state(sK, sP, sX, room, vectors, signals, parity, nothing, NORM: gl.constexpr, WIDTH: gl.constexpr):
    """P' in the place of P, so many queries at once, and X, into shared memory, fenced; sX may be sK. ``signals``, if
    there are: the room is free again; P is there.
    """
    dtype: gl.constexpr = sP.dtype
    FINE: gl.constexpr = dtype == gl.float16
    T = inverse(room, nothing, FINE)
    if signals is not None:
        free, ready = signals
        mbarrier.arrive(free, count=1)
    if NORM and not FINE:
        T = T * columns_of(vectors, NORM_K)
    high, low = parts(T, dtype)
    if signals is not None:
        mbarrier.wait(ready, parity)
    for first in gl.static_range(0, 64, WIDTH):
        tile = sP.slice(first, WIDTH, dim=0).permute((1, 0))
        PT, high, low = warpgroup_mma_wait(0, deps=(product2(high, low, tile), high, low))
        tile.store(decayed(PT, vectors, nothing, first, FINE).to(dtype))
    if NORM and FINE:
        high, low = parts(T * columns_of(vectors, NORM_K), dtype)
    for half in gl.static_range(0, 128, 64):
        x = product2(high, low, sK.slice(half, 64, dim=1))
        X, high, low = warpgroup_mma_wait(0, deps=(x, high, low))
        sX.slice(half, 64, dim=1).store((X * rows_of(vectors, ROWS_OF_X)).to(dtype))
    fence_async_shared()


@gluon.jit(do_not_specialize=["N", "null_slot", "heads", "at", "count"])
def prepare(
    q, k, x, p, g, beta, cu_seqlens, slots, vectors, scale, null_slot, N, heads, at, count,
    q_head, k_head, g_row, g_head, beta_row, beta_head, cu_stride, slot_stride,
    RQ: gl.constexpr, RK: gl.constexpr, NORM: gl.constexpr, LOG: gl.constexpr,
):  # fmt: skip
    """One chunk of one state head, of ``count`` from the slot ``at`` on. RQ, RK: state heads to a head of q and of k.
    Heads of a chunk come one behind the other: they share tiles of q and k, and their gates lie next to each other.
    """
    if gl.program_id(0) >= count:  # one more, where chain runs beside: neither ends before both have
        griddepcontrol("wait")
        return
    place, head = at + gl.program_id(0) // heads, (gl.program_id(0) % heads).to(gl.int64)
    sequence = sequence_of(cu_seqlens, cu_stride, N, place, 64)
    begin = gl.load(cu_seqlens + sequence * cu_stride).to(gl.int64)
    end = gl.load(cu_seqlens + (sequence + 1) * cu_stride).to(gl.int64)
    first = begin + (place - (begin // 64 + sequence)) * 64
    if first >= end:
        return
    if slot_of(slots, slot_stride, sequence, null_slot) < 0:
        return
    length = gl.minimum(end - first, 64).to(gl.int32)
    dtype: gl.constexpr = q.dtype
    FINE: gl.constexpr = dtype == gl.float16
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], dtype)
    sQ = gl.allocate_shared_memory(dtype, [64, 128], tile)
    sK = gl.allocate_shared_memory(dtype, [64, 128], tile)
    sP = gl.allocate_shared_memory(dtype, [64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], dtype))
    own = vectors_in_shared(1, LINES).index(0)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    mbarrier.expect(landed.index(0), 2 * 64 * 256)
    copy_tile(k, [narrow(first), narrow(head // RK * k_head)], landed.index(0), sK)
    copy_tile(q, [narrow(first), narrow(head // RQ * q_head)], landed.index(0), sQ)
    g += first * g_row + head * g_head
    beta += first * beta_row + head * beta_head
    gates = gates_of(g, beta, length, g_row, beta_row, LOG)
    store_vectors(gates, scale, own, LOG, FINE)
    mbarrier.wait(landed.index(0), 0)
    if length < 64:
        clear_rows(sK, length)
    if NORM:
        normalise(sQ, sK, own)
    put_queries(sQ, sK, sP, own, 0, NORM)
    room = rooms(FINE)  # where q was
    put_keys(sK, room, own, 0, NORM)
    without_state(sK, sP, sK, room, own, None, 0, 0, NORM, 32)
    chunk = place.to(gl.int64) * heads + head
    store_tile(x, [narrow(chunk * 64), 0], sK)
    store_tile(p, [narrow(chunk * 64), 0], sP)
    gl.store(vectors + chunk * VECTORS + gl.arange(0, VECTORS, LINE), own.slice(0, VECTORS).load(LINE))
    tma.store_wait(0)
