"""The causal convolutions. A thread owns a few neighbouring channels and slides over tokens, so every input is read and
converted once; the last W - 1 inputs stay in registers.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Triton's static_range and growing tuples are not what they seem to be in Python.

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gated_delta.kernels.triton.launch import Launches, Start, power_of_2, strides
from gated_delta.kernels.triton.shared import convolved, slot_of
from gated_delta.library import CausalConv1d, CausalConv1dUpdate, tensors

_MASK = 32
"""Most tokens of a program of prefill: the bits of its masks."""
_GROUP = tl.constexpr(4)
"""Tokens that a program of prefill loads at once, while it computes those before; at least the largest W less 1."""
_VECTORS = 512
"""Bytes of a token that a warp takes: 16 a thread."""
_PROGRAMS = 2048
"""Programs of one warp that keep a large GPU busy; with fewer, each takes fewer tokens."""


@triton.jit
def _place(channel, group, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Where the input of a channel is. With H, groups of C channels stand ``group`` apart: K of q, K of k, and v."""
    place = channel.to(tl.int64)
    if H > 0:
        value = channel - 2 * H * K
        of_key = (channel // K % H).to(tl.int64) * group + channel // (H * K) * K + channel % K
        of_value = (value // (C - 2 * K)).to(tl.int64) * group + 2 * K + value % (C - 2 * K)
        place = tl.where(channel < 2 * H * K, of_key, of_value)
    return place


@triton.jit
def _bias_and_taps(weight, w_channel, w_tap, bias, block, D, W: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr):
    """Bias and the W taps of a block of channels, in fp32.

    FLAT (contiguous weight, W 2 or 4) reads channels and taps as one run of memory. Tap by tap, every load of a warp
    would touch many lines of memory for little of each, and in decode there is one row to make up for it.
    """
    channel = block * BD + tl.arange(0, BD)
    inside = channel < D
    offset = tl.zeros([BD], tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    taps = ()
    if FLAT:
        index = block * BD * W + tl.arange(0, BD * W)
        pairs = tl.reshape(tl.load(weight + index, mask=index < D * W, other=0.0), [BD, W // 2, 2])
        if W == 2:
            pairs = tl.reshape(pairs, [BD, 2])
            first, second = tl.split(pairs)
            taps = (first.to(tl.float32), second.to(tl.float32))
        else:
            even, odd = tl.split(pairs)
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            taps = (first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32))
    else:
        for j in tl.static_range(W):
            tap = tl.load(weight + channel.to(tl.int64) * w_channel + j * w_tap, mask=inside, other=0.0)
            taps += (tap.to(tl.float32),)
    return offset, taps


@triton.jit(do_not_specialize=["null_slot", "N", "L", "search", "span"])
def _prefill_kernel(
    x, x_row, group, weight, w_channel, w_tap, bias, states, s_slot, s_channel, s_column, cu, cu_stride, slots,
    slots_stride, has, has_stride, output, null_slot, N, L, D, search, span,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr, ACTIVATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program a sequence, for what needs its old state: its first W - 1 outputs and its new state, which is in the
    hands of this program alone, and read before it is written. Then one a block of tokens, for all other outputs and
    the zeros of padding.
    """
    blocks = tl.cdiv(D, BD)
    unit, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if unit < N:
        slot = slot_of(slots, slots_stride, unit, null_slot)
        if slot >= 0:
            channel = block * BD + tl.arange(0, BD)
            inside = channel < D
            start = tl.load(cu + unit.to(tl.int64) * cu_stride).to(tl.int64)
            count = (tl.load(cu + (unit.to(tl.int64) + 1) * cu_stride) - start).to(tl.int32)
            inputs = ()
            column = tl.zeros([], tl.int64)  # 64 bits for what it is multiplied by
            if states is not None:
                s_at = states + slot * s_slot + channel.to(tl.int64) * s_channel
                known = inside
                if has is not None:
                    known = inside & tl.load(has + unit.to(tl.int64) * has_stride)
                for j in tl.static_range(W - 1):
                    old = tl.load(s_at + (column + j) * s_column, mask=known, other=0.0)
                    inputs += (old.to(tl.float32),)
            else:
                for _ in tl.static_range(W - 1):
                    inputs += (tl.zeros([BD], tl.float32),)
            place = _place(channel, group, H, K, C)
            x_at = x + start * x_row + place
            for j in tl.static_range(W - 1):
                inputs += (tl.load(x_at + j * x_row, mask=inside & (j < count), other=0.0).to(tl.float32),)
            kept = ()
            if states is not None:
                x_end = x + (start + count) * x_row + place
                for j in tl.static_range(W - 1):  # column j is input count + j, history included
                    fresh = inside & (count + j >= W - 1)
                    new = tl.load(x_end + (j + 1 - W) * x_row, mask=fresh, other=0.0).to(tl.float32)
                    for k in tl.static_range(j, W - 1):
                        new = tl.where(count + j == k, inputs[k], new)
                    kept += (new,)
            offset, taps = _bias_and_taps(weight, w_channel, w_tap, bias, block, D, W, BD, FLAT)
            for j in tl.static_range(W - 1):
                y = convolved(inputs, j, offset, taps, W, ACTIVATE).to(output.dtype.element_ty)
                tl.store(output + (start + j) * D + channel, y, mask=inside & (j < count))
            if states is not None:
                tl.debug_barrier()  # a state may be written by other threads than have read it
                for j in tl.static_range(W - 1):
                    tl.store(s_at + (column + j) * s_column, kept[j].to(states.dtype.element_ty), mask=inside)
    else:
        first = (unit - N) * span
        channel = block * BD + tl.arange(0, BD)
        inside = channel < D
        end = tl.minimum(first + span, L)
        x_at = x + first.to(tl.int64) * x_row + _place(channel, group, H, K, C)
        o_at = output + first.to(tl.int64) * D + channel
        past = ()
        for j in tl.static_range(1 - W, 0):
            past += (tl.load(x_at + j * x_row, mask=inside & (first > 0), other=0.0).to(tl.float32),)
        now = ()
        for j in tl.static_range(_GROUP):
            now += (tl.load(x_at + j * x_row, mask=inside & (first + j < end), other=0.0),)
        offset, taps = _bias_and_taps(weight, w_channel, w_tap, bias, block, D, W, BD, FLAT)
        # Bit masks of the tokens to compute here, and of those whose output is zero; the first W - 1 tokens of a
        # sequence are in neither.
        bit = tl.arange(0, SIZE)
        token = first + bit
        row = tl.zeros([SIZE], tl.int32)
        step = search
        while step > 0:  # towards the last row that starts at or before the token
            later = row + step
            start = tl.load(cu + later.to(tl.int64) * cu_stride, mask=later < N, other=0)
            row = tl.where((later < N) & (start <= token), later, row)
            step = step // 2
        live = (token < tl.load(cu + N.to(tl.int64) * cu_stride)) & (slot_of(slots, slots_stride, row, null_slot) >= 0)
        own = live & (token - tl.load(cu + row.to(tl.int64) * cu_stride) >= W - 1)
        one = tl.full([SIZE], 1, tl.int32) << bit  # a sum of different bits is their union
        own = tl.sum(tl.where(own & (token < end), one, 0), 0)
        silent = tl.sum(tl.where((token < end) & (live == 0), one, 0), 0)
        if own != 0:
            for i in range(0, span, _GROUP):
                x_at += _GROUP * x_row
                ahead = ()
                for j in tl.static_range(_GROUP):
                    ahead += (tl.load(x_at + j * x_row, mask=inside & (first + i + _GROUP + j < end), other=0.0),)
                inputs = past
                for j in tl.static_range(_GROUP):
                    inputs += (now[j].to(tl.float32),)
                for j in tl.static_range(_GROUP):
                    y = convolved(inputs, j, offset, taps, W, ACTIVATE).to(output.dtype.element_ty)
                    tl.store(o_at + j * D, y, mask=inside & (((own >> (i + j)) & 1) != 0))
                o_at += _GROUP * D
                past = inputs[_GROUP:]
                now = ahead
        if silent != 0:
            nothing = tl.zeros([BD], output.dtype.element_ty)
            for i in range(span):
                at = output + (first + i).to(tl.int64) * D + channel
                tl.store(at, nothing, mask=inside & (((silent >> i) & 1) != 0))


@triton.jit(do_not_specialize=["null_slot", "N", "T", "L"])
def _update_kernel(
    x, x_row, x_token, states, s_slot, s_channel, s_column, weight, w_channel, w_tap, bias, slots, slots_stride,
    accepted, accepted_stride, cu, cu_stride, output, o_row, o_token, null_slot, N, T, L, D,
    W: tl.constexpr, BD: tl.constexpr, FLAT: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """A program a row, and one (row N) for the tokens behind the last row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = block * BD + tl.arange(0, BD)
    inside = channel < D
    start, count = tl.zeros([], tl.int64), T
    if cu is not None:
        start = tl.load(cu + row * cu_stride).to(tl.int64)
        end = L.to(tl.int64)
        if row < N:
            end = tl.load(cu + (row + 1) * cu_stride).to(tl.int64)
        count = (end - start).to(tl.int32)
    o_at = output + row * o_row + start * o_token + channel
    if row == N:
        for _ in range(count):
            tl.store(o_at, tl.zeros([BD], output.dtype.element_ty), mask=inside)
            o_at += o_token
    else:
        x_at = x + row * x_row + start * x_token + channel
        ahead = tl.load(x_at, mask=inside & (count > 0), other=0.0)
        slot = slot_of(slots, slots_stride, row, null_slot)
        live = inside & (slot >= 0)
        column = tl.zeros([], tl.int64)  # 64 bits for what it is multiplied by
        oldest = column
        if accepted is not None:
            oldest = tl.load(accepted + row * accepted_stride).to(tl.int64) - 1
        s_at = states + slot * s_slot + channel.to(tl.int64) * s_channel
        past = ()
        for j in tl.static_range(W - 1):
            past += (tl.load(s_at + (oldest + j) * s_column, mask=live, other=0.0).to(tl.float32),)
        offset, taps = _bias_and_taps(weight, w_channel, w_tap, bias, block, D, W, BD, FLAT)
        tl.debug_barrier()  # a state may be written by other threads than have read it
        if accepted is not None:
            for j in tl.static_range(1, W - 1):
                old = past[j].to(states.dtype.element_ty)
                tl.store(s_at + (column + j - 1) * s_column, old, mask=live & (count > 0))
        for t in range(count):
            x_at += x_token
            inputs = past
            inputs += (ahead.to(tl.float32),)
            ahead = tl.load(x_at, mask=inside & (t + 1 < count), other=0.0)
            y = tl.where(slot >= 0, convolved(inputs, 0, offset, taps, W, ACTIVATE), 0.0)
            tl.store(o_at, y.to(output.dtype.element_ty), mask=inside)
            if accepted is not None:
                new = inputs[W - 1].to(states.dtype.element_ty)
                tl.store(s_at + (column + t + W - 2) * s_column, new, mask=live)
            o_at += o_token
            past = inputs[1:]
        if accepted is None:
            for j in tl.static_range(W - 1):
                new = past[j].to(states.dtype.element_ty)
                tl.store(s_at + (column + j) * s_column, new, mask=live & (count > 0))


def _constants(weight: Tensor, activate: bool, channels: int) -> dict[str, Any]:
    """Constants of both kernels for blocks of at most so many channels."""
    size, width = weight.shape
    flat = weight.is_contiguous() and width in (2, 4)
    block = min(channels, power_of_2(max(1, size)))
    return {"W": width, "BD": block, "FLAT": flat, "ACTIVATE": activate}


def bound_causal_conv1d(call: CausalConv1d) -> Start:
    launches = Launches(*tensors(call))
    x, weight, bias, conv_states, cu_seqlens, state_indices, has_initial_state = call[:7]
    activate, null_slot, head_k, output = call[7:]
    rows, (tokens, channels) = len(cu_seqlens) - 1, output.shape
    if rows == 0:  # the kernel looks up a row of padding, too
        state_indices = None
    constants = _constants(weight, activate, _VECTORS // x.element_size())
    blocks = -(-channels // constants["BD"])
    span = _MASK
    while span > 8 and -(-tokens // span) * blocks < _PROGRAMS:
        span //= 2
    constants |= {"H": x.shape[1] if head_k else 0, "K": head_k, "C": x.shape[-1], "SIZE": _MASK}
    args = (
        x, *(x.stride()[:2] if head_k else (x.stride(0), 0)), weight, *weight.stride(), bias, conv_states,
        *strides(conv_states, 0, 1, 2), cu_seqlens, cu_seqlens.stride(0), state_indices, *strides(state_indices, 0),
        has_initial_state, *strides(has_initial_state, 0), output, null_slot, rows, tokens, channels,
        power_of_2(rows) // 2, span,
    )  # fmt: skip
    launches.add(_prefill_kernel, ((rows - (-tokens // span)) * blocks,), args, constants, warps=1)
    return launches.bound()


def bound_causal_conv1d_update(call: CausalConv1dUpdate) -> Start:
    launches = Launches(*tensors(call))
    x, conv_states, weight, bias, activate, state_indices, accepted, cu_seqlens, null_slot, output = call
    if cu_seqlens is not None:
        rows, programs, tokens = len(cu_seqlens) - 1, len(cu_seqlens), 0
        x_strides, o_strides = (0, x.stride(0)), (0, output.stride(0))
    else:
        rows, programs, tokens = x.shape[0], x.shape[0], 1 if x.dim() == 2 else x.shape[1]
        x_strides, o_strides = ((y.stride(0), 0 if y.dim() == 2 else y.stride(1)) for y in (x, output))
    # Where the columns of a channel lie together, a load of one column reads little of each line: fewer channels a
    # thread keep the lanes of a warp close.
    channels, warps = (2 * _VECTORS // x.element_size(), 2) if conv_states.stride(1) == 1 else (256, 4)
    constants = _constants(weight, activate, channels)
    args = (
        x, *x_strides, conv_states, *conv_states.stride(), weight, *weight.stride(), bias, state_indices,
        *strides(state_indices, 0), accepted, *strides(accepted, 0), cu_seqlens, *strides(cu_seqlens, 0), output,
        *o_strides, null_slot, rows, tokens, x.shape[0], x.shape[-1],
    )  # fmt: skip
    launches.add(_update_kernel, (programs, -(-x.shape[-1] // constants["BD"])), args, constants, warps=warps)
    return launches.bound()
