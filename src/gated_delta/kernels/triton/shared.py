"""What several kernels share: slots, gates, and exact products of fp32 numbers on tensor cores."""

import triton
import triton.language as tl

SCALARS = [
    "scale", "null_slot", "read_stride", "write_stride", "ts_row", "ts_token", "a_row", "a_token", "b_row", "b_token",
    "steps",
]  # fmt: skip
"""Parameters of the recurrent kernels whose values must not make Triton compile anew: they place single numbers."""
SCALAR_POINTERS = ["A_log", "a", "dt_bias", "b", "read_slots", "write_slots", "token_slots"]
"""The same for the alignment of their pointers."""


@triton.jit
def place_in_grid(TILES: tl.constexpr, HEADS: tl.constexpr):
    """(tile, head, row) of this program, all in the first dimension of the grid: the others end at 65,535. Head and
    row are 64 bits, as whatever is multiplied by a stride.
    """
    program = tl.program_id(0)
    return program % TILES, (program // TILES % HEADS).to(tl.int64), (program // (TILES * HEADS)).to(tl.int64)


@triton.jit
def slot_of(slots, stride, row, null_slot):
    """Slot of a row as 64 bits, negative for padding. Without indices a row is its own slot."""
    slot = row.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + slot * stride).to(tl.int64)
        slot = tl.where(slot == null_slot, -1, slot)
    return slot


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` as a square, which takes no division; 0 where exp(-x) overflows."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def convolved(inputs, at: tl.constexpr, offset, taps, W: tl.constexpr, ACTIVATE: tl.constexpr):
    """Output of the token whose input is ``inputs[at + W - 1]``."""
    y = offset
    for j in tl.static_range(W):  # pyright: ignore[reportGeneralTypeIssues]
        y += inputs[at + j] * taps[j]
    if ACTIVATE:
        y *= sigmoid(y)
    return y


@triton.jit
def log_gates(a, b, A_log, dt_bias, NEG_EIGVAL: tl.constexpr):
    """The logarithm of alpha, and beta, in fp32: of raw gates (docs/contract.md section 1); without A_log a and b."""
    log_alpha, beta = a.to(tl.float32), b.to(tl.float32)
    if A_log is not None:
        x = log_alpha + dt_bias.to(tl.float32)
        y = tl.exp(-tl.abs(x))
        one_y = 1.0 + y  # log1p(y): the quotient makes up for what 1 + y rounds away
        softplus = tl.maximum(x, 0.0) + tl.where(one_y == 1.0, y, tl.log(one_y) * (y / (one_y - 1.0)))
        log_alpha, beta = -tl.exp(A_log) * softplus, sigmoid(beta)
        if NEG_EIGVAL:
            beta = 2.0 * beta
    return log_alpha, beta


@triton.jit
def gates(a, b, A_log, dt_bias, NEG_EIGVAL: tl.constexpr):
    """The gates alpha and beta."""
    log_alpha, beta = log_gates(a, b, A_log, dt_bias, NEG_EIGVAL)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.exp(log_alpha), beta


@triton.jit
def split3(x):
    """fp32 as a sum of three bf16 numbers: 24 significant bits in three times 8."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)
