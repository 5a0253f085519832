"""Decode and several tokens: which kernel and which tile serve a call.

The tiles were measured on an H200 at K = V = 128 (docs/performance.md), by the size of the call in heads (rows times
HV) and the bytes of a number of the state. Other head sizes use the same ones. Where the size of the call chooses
among tiles, they sum over K in the same order, so that a row's bits do not depend on the batch: the same lanes share a
row of the state, and ``columns`` depends on the dtype alone.
"""

from typing import Any, NamedTuple

from torch import Tensor

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


def _choice(
    heads: int, steps: int, head_k: int, state: Tensor, v_first: bool, update: bool, kept: bool
) -> tuple[Any, Tile, dict[str, int]]:
    """Kernel, tile, and the constants that only this kernel has."""
    width = state.element_size()
    # States of 4 bytes a number that are kept after every token keep the memory busy in either kernel, and going
    # token by token writes them in longer pieces.
    if not v_first or steps == 1 or steps > MOST_AT_ONCE or (kept and width == 4):
        # Late loads, between the products of others, suit rows of 512 bytes, and cost every other state 10 to 20 %.
        early = width == 2 or not v_first
        keys = power_of_2(head_k)
        constants = {"SINGLE": steps == 1, "BK": keys, "V_FIRST": v_first, "EARLY": early}
        return tokens, _token_tile(heads, width, v_first, kept), constants
    tile = _verify_tile(heads, width, update, kept)
    constants = {
        "T": steps, "BT": 8 if steps <= 8 else 16, "STAGES": tile.stages, "KC": _divisor(head_k, tile.columns),
        "KW": _divisor(head_k, tile.written),
    }  # fmt: skip
    return verify, tile, constants


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(most, size & -size)


def _is_wide(states: Tensor | None) -> bool:
    """Whether an offset inside one state may need more than 31 bits."""
    return states is not None and states.shape[-2] * states.stride(-2) >= 2**31


def bound_recurrent(call: Recurrent) -> Start:
    launches = Launches(*tensors(call))
    q, k, v, state, a, b, output, snapshots = (*call[:4], call.a, call.b, call.output, call.snapshots)
    read_slots, write_slots, token_slots = call.read_slots, call.write_slots, call.token_slots
    rows, steps, heads, head_v = v.shape
    kept = token_slots is not None or snapshots is not None
    kernel, tile, constants = _choice(
        rows * heads, steps, q.shape[-1], state, call.state_v_first, call.update_state, kept
    )
    # With fewer values a row of a small K would be spread over other lanes than in larger tiles.
    block_v = min(max(tile.values, 512 // (q.shape[-1] * state.element_size())), power_of_2(head_v))
    most = STREAMED_COLUMNS if state.element_size() == 2 and not call.state_v_first else STREAMED_BYTES
    streamed = rows * heads * head_v * q.shape[-1] * state.element_size() <= most
    constants |= {
        "HV": heads, "R": heads // q.shape[2], "K": q.shape[-1], "V": head_v, "BV": block_v,
        "NORM": call.use_qk_l2norm, "NEG_EIGVAL": call.allow_neg_eigval, "UPDATE": call.update_state,
        "WIDE": _is_wide(state) or _is_wide(snapshots), "ZERO_PADDING": call.zero_padding,
        "EVICT": "evict_first" if streamed else "",
    }  # fmt: skip
    args = (
        q, k, v, state, call.A_log, a, call.dt_bias, b, output, read_slots, write_slots, token_slots, snapshots,
        call.scale, call.null_slot, *strides(read_slots, 0), *strides(write_slots, 0), *strides(token_slots, 0, 1),
        *strides(q, 0, 1, 2), *strides(k, 0, 1, 2), *strides(v, 0, 1, 2), *strides(a, 0, 1), *strides(b, 0, 1),
        *strides(output, 0, 1, 2), *strides(state, 0, 1, 2), *strides(snapshots, 0, 1, 2, 3), steps,
    )  # fmt: skip
    launches.add(kernel, (-(-head_v // block_v) * heads * rows,), args, constants, warps=tile.warps)
    return launches.bound()
