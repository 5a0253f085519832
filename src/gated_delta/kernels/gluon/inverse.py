"""Inverses of unit triangular matrices of 64, as the chunks of Hopper's prefill need them.

``(I - N)^-1`` with N strictly upper triangular (what it has on and below its diagonal is not looked at). Diagonal
blocks of 8 are inverted by substitution in fp32, a thread a row, and joined to blocks of 16. What is to their right
follows from ``T (I - N) = I``, a column of blocks after the other: ``T_j = (I_j + sum over k < j of T_k N_kj) (I -
N)_jj^-1``. A warp has 16 rows, so all of T that it needs is its own, in registers, and no warp waits for another: these
are products of warps (mma), not of groups (wgmma). For bf16 activations they are fp16: every entry is at most 2, and 11
bits cost the error budget 2 %. For fp16 activations they have two parts.

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
CUBE = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1, 1], instr_shape=[1, 16, 8]))
"""Of ``[64, columns]`` and ``[4, 16, columns]`` results of a warp's own products: it has the same rows."""
HALVES = gl.constexpr(gl.SwizzledSharedLayout(8, 4, 2, [2, 1, 0]))
EIGHTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [2, 1, 0]))
"""Of ``[matrix, row, column]`` with 16 and with 8 columns of 16 bits: 8 rows' 16 bytes come from all banks."""
LINES = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [2, 0, 1]))
"""The same, and one row of 8 matrices."""


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
def room_for(COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr, FINE: gl.constexpr):
    """Room in shared memory for matrices of fp16, FINE: of two parts."""
    high = gl.allocate_shared_memory(gl.float16, [COUNT, ROWS, COLUMNS], LAYOUT)
    low = high
    if FINE:
        low = gl.allocate_shared_memory(gl.float16, [COUNT, ROWS, COLUMNS], LAYOUT)
    return high, low


@gluon.jit
def rooms(FINE: gl.constexpr):
    """For what :func:`put` leaves to :func:`inverse`: N by columns of blocks of 16; its blocks of 8 on the diagonal,
    transposed; what is to their right.
    """
    columns = room_for(4, 64, 16, HALVES, FINE)
    return columns, room_for(8, 8, 8, LINES, FINE), room_for(8, 8, 8, EIGHTS, FINE)


@gluon.jit
def halves(x, FINE: gl.constexpr):
    """fp32 as fp16, and FINE: what that leaves."""
    high = x.to(gl.float16)
    low = high
    if FINE:
        low = (x - high.to(gl.float32)).to(gl.float16)
    return high, low


@gluon.jit
def write(room, x, FINE: gl.constexpr):
    high, low = halves(x, FINE)
    room[0].store(high)
    if FINE:
        room[1].store(low)


@gluon.jit
def load(room, SHAPE: gl.constexpr, LAYOUT: gl.constexpr, FINE: gl.constexpr):
    """In fp32."""
    x = room[0].reshape(SHAPE).load(LAYOUT).to(gl.float32)
    if FINE:
        x += room[1].reshape(SHAPE).load(LAYOUT).to(gl.float32)
    return x


@gluon.jit
def add_product(z, x, y, SHAPE: gl.constexpr, ROW: gl.constexpr, FINE: gl.constexpr):
    """Sum of z and the product of x and 16 rows of y, of this shape, in fp16, FINE: of two parts each."""
    left: gl.constexpr = gl.DotOperandLayout(0, z.type.layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, z.type.layout, 2)
    high, low = x
    high, low = gl.convert_layout(high, left), gl.convert_layout(low, left)
    b = y[0].reshape(SHAPE).slice(ROW, 16, dim=len(SHAPE) - 2).load(right)
    z = mma_v2(high, b, z)
    if FINE:
        z = mma_v2(low, b, z)
        z = mma_v2(high, y[1].reshape(SHAPE).slice(ROW, 16, dim=len(SHAPE) - 2).load(right), z)
    return z


@gluon.jit
def beside(left, right, LAYOUT: gl.constexpr):
    """``[left, right]``; every thread keeps what it has."""
    x = gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [64, 2 * left.shape[1]])
    return gl.convert_layout(x, LAYOUT)


@gluon.jit
def is_upper(LAYOUT: gl.constexpr):
    """Rows of the upper half of a block of 16."""
    return (gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) // 8 % 2 == 0)[:, None]


@gluon.jit
def put(N, room, nothing, FINE: gl.constexpr):
    """N into its room."""
    columns, eights, between = room
    thin = gl.reshape(N, [64, 4, 16])
    write(columns, gl.permute(thin, (1, 0, 2)), FINE)
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 + nothing == axis_of(4, 1, layout)
    blocks = gl.convert_layout(gl.sum(gl.where(own, thin, 0.0), axis=1), SLIM)
    first, second = gl.split(gl.permute(gl.reshape(blocks, [64, 2, 8]), (0, 2, 1)))
    half: gl.constexpr = first.type.layout
    diagonal = gl.where(is_upper(half), first, second)
    write(eights, gl.permute(gl.reshape(diagonal, [8, 8, 8]), (0, 2, 1)), FINE)
    write(between, gl.reshape(gl.where(is_upper(half), second, 0.0), [8, 8, 8]), FINE)


@gluon.jit
def substitute(N, FINE: gl.constexpr):
    """``(I - N)^-1`` of blocks of 8, ``[block, row, column]``, from the transpose of N: a thread a row, column by
    column, so that what was found last enters a sum last, and nothing waits for the rest of it.
    """
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    column = axis_of(8, 2, cube)
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :]
    x = gl.zeros([8, 8, 8], gl.float32, cube)
    for j in gl.static_range(8):
        line = N[0].slice(j, 1, dim=1).load(cube).to(gl.float32)
        if FINE:
            line += N[1].slice(j, 1, dim=1).load(cube).to(gl.float32)
        new = gl.where(row == j, 1.0, 0.0) + gl.sum(gl.where(column < j, line * x, -0.0), axis=2)
        x = gl.where(column == j, new[:, :, None], x)
    return x


@gluon.jit
def joined(eights, between, FINE: gl.constexpr):
    """Inverses of blocks of 16 below each other: ``[[I - A, -C], [0, I - D]]^-1`` has ``(I - A)^-1 C (I - D)^-1`` in
    its corner.
    """
    inverses = room_for(8, 8, 8, EIGHTS, FINE)
    write(inverses, substitute(eights, FINE), FINE)
    x = load(inverses, [64, 8], SLIM, FINE)
    upper, zero = is_upper(SLIM), gl.zeros([4, 16, 8], gl.float32, CUBE)
    A, D = gl.where(upper, x, 0.0), gl.where(upper, 0.0, x)
    left = gl.reshape(beside(A, D, SLIM), [4, 16, 16])
    y = add_product(zero, halves(left, FINE), between, [4, 16, 8], 0, FINE)
    y = gl.convert_layout(gl.reshape(y, [64, 8]), SLIM)
    left = gl.reshape(beside(gl.zeros([64, 8], gl.float32, SLIM), y, SLIM), [4, 16, 16])
    y = add_product(zero, halves(left, FINE), inverses, [4, 16, 8], 0, FINE)
    return beside(A, D + gl.convert_layout(gl.reshape(y, [64, 8]), SLIM), SLIM)


@gluon.jit
def inverse(room, nothing, FINE: gl.constexpr):
    """``(I - N)^-1`` of N above its diagonal, from what :func:`put` made of it."""
    N, eights, between = room
    D = joined(eights, between, FINE)
    inverses = room_for(4, 16, 16, HALVES, FINE)
    write(inverses, gl.reshape(D, [4, 16, 16]), FINE)
    own = gl.arange(0, 64, gl.SliceLayout(1, SLIM))[:, None] // 16 + nothing
    columns = ()
    known = ()
    for j in gl.static_range(4):
        T = gl.where(own == j, D, 0.0)
        if j > 0:
            sum = gl.zeros([64, 16], gl.float32, SLIM)
            for k in gl.static_range(j):
                sum = add_product(sum, known[k], N, [256, 16], 64 * j + 16 * k, FINE)
            T = add_product(T, halves(sum, FINE), inverses, [64, 16], 16 * j, FINE)
        columns = columns + (T,)  # noqa: RUF005 (Triton knows no starred tuples)
        known = known + (halves(T, FINE),)  # noqa: RUF005
    half: gl.constexpr = layout_of(32)
    return beside(beside(columns[0], columns[1], half), beside(columns[2], columns[3], half), ACC)
