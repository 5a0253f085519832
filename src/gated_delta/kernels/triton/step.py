"""The fused step: everything between a layer's two matrix products, in one launch.

A program owns one value head of one row, with the whole state of that head in registers, because the gated norm needs
all V values of a token. It convolves its own v channels and the q and k channels of its key head, so the R value heads
of a key head all read the same q and k windows, and one must shift these windows when no other still reads them.

Who does is decided by tickets. A program takes one, ``tickets[slot, key head] += 1``, when it has read its windows, and
the one that takes the last of R writes them and sets the ticket back to zero. No program waits for another.

* Reads come first: the norms of q and k are sums over all lanes, which pass through shared memory or shuffles, so what
  every lane read has arrived before the barrier in front of the ticket; the ticket is an acquire and a release.
* Writes come last: increments of a ticket are ordered. The last one sees those of all siblings, so their reads happened
  before it, and its writes happen after it.
* Two launches that share a slot race anyway, whatever they do with tickets; others touch other tickets. So tickets need
  no stream of their own, and no clearing between launches: a launch leaves zeros where it found zeros.

v windows belong to one program alone, which reads them before the barrier and writes them behind it.
"""

# Triton's functions and growing tuples have no types that a checker could follow.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from typing import Any

import torch
import triton
import triton.language as tl

from gated_delta.kernels.triton.launch import Launches, Start, power_of_2, strides
from gated_delta.kernels.triton.recurrent import STREAMED_BYTES
from gated_delta.kernels.triton.shared import gates, place_in_grid, sigmoid, slot_of
from gated_delta.library import GatedDeltaNetStep, tensors

_LINE = 128
"""Bytes of a row that neighbouring lanes share. Fewer lanes a row than a warp has make sums over K cheaper: three
shuffles for four rows instead of five for one."""


@triton.jit
def _window(states, column, x, x_token, t, back, inside, W: tl.constexpr):
    """``[WB, *channels]``: the last W inputs up to token t, oldest first, of the state and of the tokens.

    Two tensors, not W: Triton would load vectors that are shorter than a program again in every lane that wants a
    copy, and hold them all.
    """
    at = back.to(tl.int64) + t
    old = tl.load(states + at * column, mask=inside & (at < W - 1), other=0.0)
    return old, tl.load(x + (at - (W - 1)) * x_token, mask=inside & (at >= W - 1) & (at < W + t), other=0.0)


@triton.jit
def _joined(window):
    """Where one of the two tensors was loaded, the other has zeros."""
    return window[0].to(tl.float32) + window[1].to(tl.float32)


@triton.jit
def _taps(weight, channel, tap, inside, w_channel, w_tap, W: tl.constexpr):
    at = weight + channel.to(tl.int64) * w_channel + tap * w_tap
    return tl.load(at, mask=inside & (tap < W), other=0.0)


@triton.jit
def _convolved(window, taps):
    """Output of the convolution for the last input of a window."""
    y = tl.sum(window * taps.to(tl.float32), axis=0)
    return y * sigmoid(y)


@triton.jit
def _afresh(y, BLOCKS: tl.constexpr, SEGMENT: tl.constexpr):
    """The same values, without a say in how Triton lays out the state, which would leave the layout of its loads."""
    return tl.gather(y, tl.arange(0, SEGMENT)[None, :] + tl.zeros([BLOCKS, SEGMENT], tl.int32), axis=1)


@triton.jit
def _keep(states, column, window, x, x_token, count, back, inside, W: tl.constexpr):
    """The window after a step: all of the first token's but its oldest input, then the other tokens."""
    dtype: tl.constexpr = states.dtype.element_ty
    tl.store(
        states + (back - 1).to(tl.int64) * column, window.to(dtype), mask=inside & (back > 0) & (back < W) & (count > 0)
    )
    one = inside & (back == 0)
    for t in range(1, count):
        new = tl.load(x + t * x_token + back * 0, mask=one, other=0.0).to(dtype)
        tl.store(states + (back + t + W - 2).to(tl.int64) * column, new, mask=one)


_SCALARS = ["scale", "eps", "null_slot", "slots_row", "slots_column", "cu_stride", "accepted_stride", "w_tap", "N", "L"]
_SINGLE = ["b", "a", "A_log", "dt_bias", "slots", "tickets", "cu", "accepted"]
"""Pointers to single numbers: how they are aligned changes nothing."""


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_SINGLE)
def step_kernel(
    q, k, v, z, b, a, conv, weight, state, A_log, dt_bias, norm, output, slots, tickets, cu, accepted,
    scale, eps, null_slot, slots_row, slots_column, cu_stride, accepted_stride, q_token, q_head, k_token, k_head,
    v_token, v_group, v_head, z_token, z_group, z_head, b_token, b_group, b_head, a_token, a_group, a_head,
    c_slot, c_channel, c_column, w_channel, w_tap, s_slot, s_head, o_token, o_head, t_slot, N, L,
    HK: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    BLOCKS: tl.constexpr, SEGMENT: tl.constexpr, BV: tl.constexpr, NEG_EIGVAL: tl.constexpr, SILU: tl.constexpr,
    LINE: tl.constexpr, MOST: tl.constexpr, LANES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    _, head, row = place_in_grid(1, HK * R)
    group, sibling = head // R, head % R
    ok = tl.arange(0, BLOCKS)[None, :, None] * SEGMENT + tl.arange(0, SEGMENT)[None, None, :]
    ov = tl.arange(0, BV)
    mk, mv = ok < K, ov < V
    back, row_v, in_v = tl.arange(0, WB)[:, None], ov[None, :], mv[None, :]
    back_k = back[:, :, None]
    first, count = row, 1
    real = tl.minimum(row, N - 1)
    if cu is not None:
        first = tl.load(cu + row * cu_stride).to(tl.int64)
        count = (tl.where(row < N, tl.load(cu + (real + 1) * cu_stride), L) - first).to(tl.int32)
    slot = slot_of(slots, slots_row, real, null_slot)
    source, oldest = slot, tl.zeros([], tl.int64)
    if accepted is not None:
        oldest = tl.load(accepted + real * accepted_stride).to(tl.int64) - 1
        source = slot_of(slots + oldest * slots_column, slots_row, real, null_slot)
    output += first * o_token + head * o_head + ov
    o_token, z_token, v_token = tl.cast(o_token, tl.int64), tl.cast(z_token, tl.int64), tl.cast(v_token, tl.int64)
    q_token, k_token, c_column = tl.cast(q_token, tl.int64), tl.cast(k_token, tl.int64), tl.cast(c_column, tl.int64)
    if (slot < 0) | (source < 0) | (row >= N):
        for t in range(count):
            tl.store(output + t * o_token, tl.zeros([BV], output.dtype.element_ty), mask=mv)
        return
    q += first * q_token + group * q_head + ok
    k += first * k_token + group * k_head + ok
    v += first * v_token + group * v_group + sibling * v_head + row_v
    z += first * z_token + group * z_group + sibling * z_head + ov
    a += first * a_token + group * a_group + sibling * a_head
    b += first * b_token + group * b_group + sibling * b_head
    channel_q, channel_v = group * K + ok, 2 * HK * K + head * V + row_v
    conv += slot * c_slot
    conv_q, conv_v = conv + channel_q.to(tl.int64) * c_channel, conv + channel_v.to(tl.int64) * c_channel
    conv_k = conv_q + tl.cast(c_channel, tl.int64) * (HK * K)
    # All loads are on their way before any of them is used, the small ones first: what they take to arrive and to be
    # convolved passes while the state comes in.
    old_q, old_k, old_v = conv_q + oldest * c_column, conv_k + oldest * c_column, conv_v + oldest * c_column
    window_q = _window(old_q, c_column, q, q_token, 0, back_k, mk & (count > 0), W)
    window_k = _window(old_k, c_column, k, k_token, 0, back_k, mk & (count > 0), W)
    window_v = _window(old_v, c_column, v, v_token, 0, back, in_v & (count > 0), W)
    taps_q = _taps(weight, channel_q, back_k, mk, w_channel, w_tap, W)
    taps_k = _taps(weight, channel_q + HK * K, back_k, mk, w_channel, w_tap, W)
    taps_v = _taps(weight, channel_v, back, in_v, w_channel, w_tap, W)
    A, bias = tl.load(A_log + head), tl.load(dt_bias + head)
    gain = tl.load(norm + ov, mask=mv, other=0.0)
    place = ok + ov[:, None, None] * LINE
    state += head * s_head
    inside = mk & mv[:, None, None]
    S = tl.load(state + source * s_slot + place, mask=inside, other=0.0, eviction_policy=EVICT)
    tl.debug_barrier()  # or else ptxas keeps back some of these loads until the registers of others are free
    S = S.to(tl.float32)
    first_q, first_k, first_v = _joined(window_q), _joined(window_k), _joined(window_v)
    next_q, next_k, next_v = first_q, first_k, first_v
    lane = tl.arange(0, LANES)
    order = tl.zeros([LANES], tl.int32)
    for t in tl.static_range(MOST):
        here, more = t < count, t + 1 < count
        a_t = tl.load(a + t * tl.cast(a_token, tl.int64), mask=here, other=0.0)
        b_t = tl.load(b + t * tl.cast(b_token, tl.int64), mask=here, other=0.0)
        z_t = tl.load(z + t * z_token, mask=mv & here, other=0.0).to(tl.float32)
        y_q, y_k, y_v = _convolved(next_q, taps_q), _convolved(next_k, taps_k), _convolved(next_v, taps_v)
        y_k *= tl.rsqrt(tl.sum(y_k * y_k) + 1e-6)
        y_q *= tl.rsqrt(tl.sum(y_q * y_q) + 1e-6)
        if R > 1 and t == MOST - 1:  # no window is read any more
            tl.debug_barrier()
            order = tl.atomic_add(tickets + slot * t_slot + group + lane * 0, 1, mask=lane == 0)
        next_q = _joined(_window(old_q, c_column, q, q_token, t + 1, back_k, mk & more, W))
        next_k = _joined(_window(old_k, c_column, k, k_token, t + 1, back_k, mk & more, W))
        next_v = _joined(_window(old_v, c_column, v, v_token, t + 1, back, in_v & more, W))
        kq = tl.sum(y_k * y_q)
        if MOST > 1:
            y_k, y_q = _afresh(y_k, BLOCKS, SEGMENT), _afresh(y_q, BLOCKS, SEGMENT)
        y_k, y_q = y_k[None, :, :], y_q[None, :, :]
        alpha, beta = gates(a_t, b_t, A, bias, NEG_EIGVAL)
        if MOST > 1:  # a token that the row does not have changes nothing: its k is zero
            alpha = tl.where(here, alpha, 1.0)
        read_k = tl.sum(tl.sum(S * y_k, axis=1), axis=1)
        read_q = tl.sum(tl.sum(S * y_q, axis=1), axis=1)
        u = beta * tl.fma(-alpha, read_k, y_v)
        o = scale * tl.fma(alpha, read_q, u * kq)
        S = tl.fma(u[:, None, None], y_k, alpha * S)
        gate = sigmoid(z_t)
        if SILU:
            gate *= z_t
        y = o * tl.rsqrt(tl.sum(o * o) / V + eps) * gain.to(tl.float32) * gate
        tl.store(output + t * o_token, y.to(output.dtype.element_ty), mask=mv & here)
        to = slot_of(slots + t * tl.cast(slots_column, tl.int64), slots_row, real, null_slot)
        kept = S.to(state.dtype.element_ty)
        tl.store(state + to * s_slot + place, kept, mask=inside & (to >= 0) & here, eviction_policy=EVICT)
    _keep(conv_v, c_column, first_v, v, v_token, count, back, in_v, W)
    last = True
    if R > 1:
        last = tl.sum(tl.where(lane == 0, order, 0)) == R - 1
    if last:
        _keep(conv_q, c_column, first_q, q, q_token, count, back_k, mk, W)
        _keep(conv_k, c_column, first_k, k, k_token, count, back_k, mk, W)
        if R > 1:
            tl.store(tickets + slot * t_slot + group, 0)


def bound_gated_delta_net_step(call: GatedDeltaNetStep) -> Start:
    launches = Launches(*tensors(call))
    (
        q, k, v, z, b, a, conv_states, conv_weight, state, A_log, dt_bias, norm_weight, scale, eps, activation,
        allow_neg_eigval, state_indices, cu_seqlens, num_accepted_tokens, tickets, null_slot, output,
    ) = call  # fmt: skip
    rows, (tokens, groups, ratio, head_v), head_k = len(state_indices), v.shape, q.shape[-1]
    most, (by_row, by_column, *_) = 1 if cu_seqlens is None else state_indices.shape[1], (*state_indices.stride(), 0)
    by_accepted = strides(num_accepted_tokens, 0)
    if rows == 0:  # the kernel looks up a row of padding, too
        state_indices, num_accepted_tokens, by_row, by_column, by_accepted = cu_seqlens, cu_seqlens, 0, 0, (0,)
    if ratio == 1:
        tickets = None
    elif tickets is None:
        tickets = launches.scratch(len(conv_states), groups, dtype=torch.int32, zeros=True)
    keys, values = power_of_2(head_k), power_of_2(head_v)
    segment = min(keys, _LINE // state.element_size())
    warps = 8 if keys * values >= 2**13 else 4
    streamed = rows * groups * ratio * head_v * head_k * state.element_size() <= STREAMED_BYTES
    constants: dict[str, Any] = {
        "HK": groups, "R": ratio, "K": head_k, "V": head_v, "W": conv_weight.shape[1],
        "WB": power_of_2(conv_weight.shape[1]), "BLOCKS": keys // segment,
        "SEGMENT": segment, "BV": values, "NEG_EIGVAL": allow_neg_eigval, "SILU": activation != "sigmoid",
        "LINE": state.stride(-2), "MOST": most, "LANES": 32 * warps, "EVICT": "evict_first" if streamed else "",
    }  # fmt: skip
    args = (
        q, k, v, z, b, a, conv_states, conv_weight, state, A_log, dt_bias, norm_weight, output, state_indices,
        tickets, cu_seqlens, num_accepted_tokens, scale, eps, null_slot, by_row, by_column, *strides(cu_seqlens, 0),
        *by_accepted, *strides(q, 0, 1), *strides(k, 0, 1), *strides(v, 0, 1, 2), *strides(z, 0, 1, 2), *b.stride(),
        *a.stride(), *conv_states.stride(), *conv_weight.stride(), *strides(state, 0, 1), *strides(output, 0, 1),
        *strides(tickets, 0), rows, tokens,
    )  # fmt: skip
    grid = ((rows + (cu_seqlens is not None)) * groups * ratio,)
    registers = 128 if most == 1 and keys * values <= 2**14 else None
    launches.add(step_kernel, grid, args, constants, warps=warps, registers=registers)
    return launches.bound()
