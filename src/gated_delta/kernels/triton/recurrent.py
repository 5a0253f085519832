"""Decode and several tokens: which kernel and which tile serve a call.

The tiles were measured on an H200 at K = V = 128 (docs/performance.md), by the size of the call in heads (rows times
HV) and the bytes of a number of the state. Other head sizes use the same ones. Where the size of the call chooses
among tiles, they sum over K in the same order, so that a row's bits do not depend on the batch: the same lanes share a
row of the state, and ``columns`` depends on the dtype alone.
"""

from typing import NamedTuple

from gated_delta.kernels.triton.launch import Launches, Start, power_of_2, strides
from gated_delta.kernels.triton.tokens import tokens
from gated_delta.kernels.triton.verify import verify
from gated_delta.library import Recurrent, tensors

MOST_AT_ONCE = 16
"""Tokens that :func:`verify` takes; calls of more go token by token."""
STREAMED_BYTES = 2**28
"""States of up to so many bytes are marked to leave the L2 first: it writes back earlier, and keeps all else longer."""
STREAMED_COLUMNS = 2**25
"""The same for K-major states of 16 bits, of which a program has half lines, and the L2 must keep them for another."""


class Tile(NamedTuple):
    """What a program owns and how it reads it."""

    values: int
    warps: int
    columns: int = 0
    """:func:`verify`: columns of the state that it multiplies at a time,"""
    stages: int = 0
    """so many of them on their way, and"""
    written: int = 0
    """columns that it updates at a time."""


def _token_tile(heads: int, width: int, v_first: bool, kept: bool) -> Tile:
    if not v_first:
        return Tile(64, 2) if width == 4 else Tile(32, 1)
    if width == 4:
        return Tile(4, 1) if heads <= 4096 or kept else Tile(16, 1)
    if heads <= 64:
        return Tile(4, 1)
    return Tile(16 if heads <= 8192 else 8, 1)  # two warps would sum the norms in another order


def _verify_tile(heads: int, width: int, update: bool, kept: bool) -> Tile:
    columns = 32 if width == 4 else 64
    if heads <= 64 or kept:
        return Tile(16, 1, columns, 3, 128)
    if update:
        return Tile(32, 1, columns, 3, 64)
    return Tile(32, 2, columns, 3, 32) if width == 4 and heads <= 1024 else Tile(64, 2, columns, 3, 32)


def bound_recurrent(call: Recurrent) -> Start:
    launches = Launches(*tensors(call))
    q, k, v, state, a, b, output, snapshots = (*call[:4], call.a, call.b, call.output, call.snapshots)
    read_slots, write_slots, token_slots = call.read_slots, call.write_slots, call.token_slots
    (rows, steps, heads, head_v), head_k = v.shape, q.shape[-1]
    width, v_first = state.element_size(), call.state_v_first
    kept = token_slots is not None or snapshots is not None
    # States of 4 bytes a number that are kept after every token keep the memory busy in either kernel, and going
    # token by token writes them in longer pieces.
    if not v_first or steps == 1 or steps > MOST_AT_ONCE or (kept and width == 4):
        kernel, tile = tokens, _token_tile(rows * heads, width, v_first, kept)
        # Late loads, between the products of others, suit rows of 512 bytes, and cost every other state 10 to 20 %.
        early = width == 2 or not v_first
        constants = {"SINGLE": steps == 1, "BK": power_of_2(head_k), "V_FIRST": v_first, "EARLY": early}
    else:
        kernel, tile = verify, _verify_tile(rows * heads, width, call.update_state, kept)
        divisor = head_k & -head_k  # the largest power of two
        constants = {
            "T": steps, "BT": 8 if steps <= 8 else 16, "STAGES": tile.stages, "KC": min(tile.columns, divisor),
            "KW": min(tile.written, divisor),
        }  # fmt: skip
    # With fewer values a row of a small K would be spread over other lanes than in larger tiles.
    block_v = min(max(tile.values, 512 // (head_k * width)), power_of_2(head_v))
    most = STREAMED_COLUMNS if width == 2 and not v_first else STREAMED_BYTES
    constants |= {
        "HV": heads, "R": heads // q.shape[2], "K": head_k, "V": head_v, "BV": block_v, "NORM": call.use_qk_l2norm,
        "NEG_EIGVAL": call.allow_neg_eigval, "UPDATE": call.update_state, "ZERO_PADDING": call.zero_padding,
        # Whether an offset inside one state may need more than 31 bits.
        "WIDE": any(x is not None and x.shape[-2] * x.stride(-2) >= 2**31 for x in (state, snapshots)),
        "EVICT": "evict_first" if rows * heads * head_v * head_k * width <= most else "",
    }  # fmt: skip
    args = (
        q, k, v, state, call.A_log, a, call.dt_bias, b, output, read_slots, write_slots, token_slots, snapshots,
        call.scale, call.null_slot, *strides(read_slots, 0), *strides(write_slots, 0), *strides(token_slots, 0, 1),
        *strides(q, 0, 1, 2), *strides(k, 0, 1, 2), *strides(v, 0, 1, 2), *strides(a, 0, 1), *strides(b, 0, 1),
        *strides(output, 0, 1, 2), *strides(state, 0, 1, 2), *strides(snapshots, 0, 1, 2, 3), steps,
    )  # fmt: skip
    launches.add(kernel, (-(-head_v // block_v) * heads * rows,), args, constants, warps=tile.warps)
    return launches.bound()
