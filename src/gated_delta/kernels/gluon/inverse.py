"""Inverses of unit triangular matrices of 64, as the chunks of Hopper's prefill need them.

``(I + N)^-1`` with N strictly upper triangular (what it has on and below its diagonal is not looked at): diagonal
blocks of 16 are inverted by substitution in fp32, a thread a row. What is beside them follows from ``T (I + N) = I``, a
column of blocks after the other: ``T_j = (I_j - sum over k < j of T_k N_kj) (I + N)_jj^-1``. A warp has 16 rows, so all
of T that it needs is its own: these are products of warps (mma), from registers, and no warp waits for another. For bf16
activations they are fp16: every entry is at most 2, and 11 bits cost the error budget 2 %. For fp16 activations they
have two parts.

What follows from the places of rows and columns gets ``nothing`` added, a 0 that the compiler does not know inside a
loop: it would compute it before the loop, keep it in memory for want of registers, and wait for it.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@constexpr_function
def layout_of(columns: int) -> gl.NVMMADistributedLayout:
    """Of ``[64, columns]`` results of tensor cores: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


ACC = gl.constexpr(layout_of(64))
SLIM = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]))
"""Of ``[64, 16]`` results of a warp's own products: a warp has the same rows."""
HALVES = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0]))
"""Of ``[matrix, row, column]``, 16 columns of 16 bits: 8 rows' 16 bytes come from all banks."""


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
def substitute(N, nothing):
    """Inverses of the diagonal blocks of 16 of ``I + N``, ``[block, row, column]``, a thread a row. Column by column, so
    that what was found last enters a sum last, and nothing waits for the rest of it.
    """
    sN = gl.allocate_shared_memory(gl.float32, [4, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    thin = gl.reshape(N, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 + nothing == axis_of(4, 1, layout)
    blocks = gl.sum(gl.where(own, thin, 0.0), axis=1)
    sN.store(gl.permute(gl.reshape(blocks, [4, 16, 16]), (0, 2, 1)))  # [block, column, row]
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 16], [2, 16, 1], [4, 1, 1], [2, 1, 0])
    column = axis_of(16, 2, cube)
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :] + nothing
    x = gl.zeros([4, 16, 16], gl.float32, cube)
    for j in gl.static_range(16):
        line = sN.slice(j, 1, dim=1).load(cube)
        new = gl.where(row == j, 1.0, 0.0) - gl.sum(gl.where(column < j, line * x, -0.0), axis=2)
        x = gl.where(column == j, new[:, :, None], x)
    return x


@gluon.jit
def halves(x, FINE: gl.constexpr):
    """fp32 as fp16, and FINE: what that leaves."""
    high = x.to(gl.float16)
    low = high
    if FINE:
        low = (x - high.to(gl.float32)).to(gl.float16)
    return high, low


@gluon.jit
def blocks_in_shared(x, FINE: gl.constexpr):
    """Matrices ``[matrix, row, column]`` of 16 columns below each other, as right operands."""
    ROWS: gl.constexpr = x.shape[0] * x.shape[1]
    high, low = halves(x, FINE)
    sX = gl.allocate_shared_memory(gl.float16, x.shape, HALVES, high).reshape([ROWS, 16])
    sY = sX
    if FINE:
        sY = gl.allocate_shared_memory(gl.float16, x.shape, HALVES, low).reshape([ROWS, 16])
    return sX, sY


@gluon.jit
def left_of(x, FINE: gl.constexpr):
    """A column of blocks as left operand."""
    left: gl.constexpr = gl.DotOperandLayout(0, SLIM, 2)
    high, low = halves(x, FINE)
    return gl.convert_layout(high, left), gl.convert_layout(low, left)


@gluon.jit
def add_product(z, x, y, row: gl.constexpr, FINE: gl.constexpr):
    """z and the product of a column of blocks and the block from a row on, FINE: of two fp16 parts each."""
    right: gl.constexpr = gl.DotOperandLayout(1, SLIM, 2)
    high, low = x
    Y, rest = y
    b = Y.slice(row, 16, dim=0).load(right)
    z = mma_v2(high, b, z)
    if FINE:
        z = mma_v2(low, b, z)
        z = mma_v2(high, rest.slice(row, 16, dim=0).load(right), z)
    return z


@gluon.jit
def beside(left, right):
    """``[left, right]``; every thread keeps what it has."""
    COLUMNS: gl.constexpr = 2 * left.shape[1]
    x = gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [64, COLUMNS])
    return gl.convert_layout(x, layout_of(COLUMNS))


@gluon.jit
def inverse(N, nothing, FINE: gl.constexpr):
    """``(I + N)^-1`` of N above its diagonal."""
    minus = blocks_in_shared(gl.permute(gl.reshape(-N, [64, 4, 16]), (1, 0, 2)), FINE)
    inverses = blocks_in_shared(substitute(N, nothing), FINE)
    D = inverses[0].load(SLIM).to(gl.float32)
    if FINE:
        D += inverses[1].load(SLIM).to(gl.float32)
    own = gl.arange(0, 64, gl.SliceLayout(1, SLIM))[:, None] // 16 + nothing
    columns = ()
    known = ()
    for j in gl.static_range(4):
        T = gl.where(own == j, D, 0.0)
        if j > 0:
            sum = gl.zeros([64, 16], gl.float32, SLIM)
            for k in gl.static_range(j):
                sum = add_product(sum, known[k], minus, 64 * j + 16 * k, FINE)
            T = add_product(T, left_of(sum, FINE), inverses, 16 * j, FINE)
        columns = columns + (T,)
        if j < 3:
            known = known + (left_of(T, FINE),)
    return beside(beside(columns[0], columns[1]), beside(columns[2], columns[3]))
