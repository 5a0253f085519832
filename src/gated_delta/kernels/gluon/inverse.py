"""Inverses of unit triangular matrices of 64, as the chunks of Hopper's prefill need them.

``(I + N)^-1`` with N strictly upper triangular (what it has on and below its diagonal is not looked at): diagonal
blocks of 16 are inverted by substitution in fp32, a thread a row; twice, pairs of blocks are then joined,
``[[A, C], [0, D]]^-1 = [[A^-1, -A^-1 C D^-1], [0, D^-1]]``. For bf16 activations these products are fp16: every entry
is at most 2, and 11 bits cost the error budget 2 %. For fp16 activations they have two parts.

What follows from the places of rows and columns gets ``nothing`` added, a 0 that the compiler does not know inside a
loop: it would compute it before the loop, keep it in memory for want of registers, and wait for it.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@constexpr_function
def layout_of(columns: int) -> gl.NVMMADistributedLayout:
    """Of ``[64, columns]`` results of tensor cores: a warp has 16 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


ACC = gl.constexpr(layout_of(64))
BLOCKS = gl.constexpr(gl.SwizzledSharedLayout(4, 2, 4, [2, 1, 0]))
"""Of ``[block, row, column]`` where a thread writes a row: those of a warp go to all banks."""


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
def substitute(N, sD, nothing):
    """Inverses of the diagonal blocks of 16 of ``I + N``; sD ``[block, row, column]``. Column by column, so that what
    was found last enters a sum last, and nothing waits for the rest of it.
    """
    sN = gl.allocate_shared_memory(gl.float32, [4, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    thin = gl.reshape(N, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 + nothing == axis_of(4, 1, layout)
    blocks = gl.sum(gl.where(own, thin, 0.0), axis=1)
    sN.store(gl.permute(gl.reshape(blocks, [4, 16, 16]), (0, 2, 1)))  # [block, column, row]
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 16], [2, 16, 1], [4, 1, 1], [2, 1, 0])  # a thread a row of the inverse
    column = axis_of(16, 2, cube)
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :] + nothing
    x = gl.zeros([4, 16, 16], gl.float32, cube)
    for j in gl.static_range(16):
        line = sN.slice(j, 1, dim=1).load(cube)
        new = gl.where(row == j, 1.0, 0.0) - gl.sum(gl.where(column < j, line * x, -0.0), axis=2)
        x = gl.where(column == j, new[:, :, None], x)
    sD.store(x)


@gluon.jit
def spread(sD, LIKE, nothing):
    """The matrix with the four blocks of ``sD`` on its diagonal, laid out as another."""
    thin = gl.reshape(LIKE, [64, 4, 16])
    layout: gl.constexpr = thin.type.layout
    own = axis_of(64, 0, layout) // 16 + nothing == axis_of(4, 1, layout)
    blocks = sD.reshape([64, 16]).load(gl.SliceLayout(1, layout))[:, None, :]
    return gl.convert_layout(gl.reshape(blocks * gl.where(own, 1.0, 0.0), [64, 64]), ACC)


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
def lower(B: gl.constexpr, LAYOUT: gl.constexpr, nothing):
    """1 for rows in every second block of B rows, 0 for others."""
    block = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) // B + nothing
    return gl.where(block % 2 == 1, 1.0, 0.0)[:, None]


@gluon.jit
def beside(left, right):
    """``[left, right]``; every thread keeps what it has."""
    COLUMNS: gl.constexpr = 2 * left.shape[1]
    x = gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [64, COLUMNS])
    return gl.convert_layout(x, layout_of(COLUMNS))


@gluon.jit
def inverse(N, nothing, FINE: gl.constexpr):
    """``(I + N)^-1`` of N above its diagonal.

    Block diagonal matrices are kept folded, their blocks below each other: as a right operand, and in memory, they are
    as narrow as a block.
    """
    i = (gl.arange(0, 64, gl.SliceLayout(1, ACC)) // 16 + nothing)[:, None]
    j = (gl.arange(0, 64, gl.SliceLayout(0, ACC)) // 16)[None, :]
    sD = gl.allocate_shared_memory(gl.float32, [4, 16, 16], BLOCKS)
    substitute(N, sD, nothing)
    diagonal = left_of(spread(sD, N, nothing), 16, FINE)
    x = sD.reshape([64, 16]).load(layout_of(16))
    far = left_of(gl.where(i // 2 < j // 2, N, 0.0), 32, FINE)
    near = left_of(gl.where((i // 2 == j // 2) & (i < j), N, 0.0), 16, FINE)
    y = product(diagonal, product(near, x, 16, FINE), 16, FINE)
    below = lower(16, layout_of(16), nothing)
    x = beside(x - x * below, x * below - y * (1.0 - below))
    y = product(far, x, 32, FINE)
    below = lower(32, layout_of(32), nothing)
    above = x - x * below
    y = product(left_of(beside(above, gl.zeros([64, 32], gl.float32, layout_of(32))), 32, FINE), y, 32, FINE)
    return beside(above, x * below - y * (1.0 - below))
