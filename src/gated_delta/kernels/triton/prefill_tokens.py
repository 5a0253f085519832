"""Prefill of fp32 activations: token by token, by the rule itself.

Tensor cores cannot hold fp32 operands, and products of parts of them would cost what they save. A program keeps ``BV``
columns of one head's state, held as [K, V], in registers, small enough for one warp, so that the two sums over K of a
token need no barrier. Loads run ahead.
"""

import triton
import triton.language as tl

from gated_delta.kernels.triton.prefill_chain import checkpoint_row, first_state, store_state, zero_rows
from gated_delta.kernels.triton.shared import slot_of


@triton.jit
def exp(x):
    """To an ulp. The processor's own is off by four near 1, always in the same direction: weak decays add that up."""
    x = tl.maximum(x, -150.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06  # ln 2 in two parts: n times the first is exact
    y = 0.008333333333333333 + r * (0.001388888888888889 + r * 0.0001984126984126984)
    return (1.0 + r * (1.0 + r * (0.5 + r * (0.16666666666666666 + r * (0.041666666666666664 + r * y))))) * tl.exp2(n)


@triton.jit(do_not_specialize=["null_slot", "L", "N"])
def by_tokens(
    q, k, v, g, beta, cu_seqlens, slots, source, has_state, final, checkpoints, checkpoint_starts, output,
    scale, null_slot, L, N, every,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, cu_stride, slot_stride, has_stride, starts_stride,
    s_slot, s_head, s_line, f_slot, f_head, f_line, c_row, c_head, c_line, g_row, beta_row,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, STAGES: tl.constexpr, ZERO_PADDING: tl.constexpr, NORM: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """BV columns of one state of one sequence; sequence N are the tokens behind the last one."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    ok, ov = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    in_k, in_v = ok < K, ov < V
    output += head * o_head
    begin = tl.load(cu_seqlens + sequence * cu_stride).to(tl.int64)
    if sequence == N:
        zero_rows(output, begin, tl.cast(L, tl.int64), o_row, ov, V)
        return
    end = tl.load(cu_seqlens + (sequence + 1) * cu_stride).to(tl.int64)
    slot = slot_of(slots, slot_stride, sequence, null_slot)
    if slot < 0:
        if ZERO_PADDING:
            zero_rows(output, begin, end, o_row, ov, V)
        return
    inside = in_k[:, None] & in_v[None, :]
    S = first_state(source, has_state, slot, sequence, head, s_slot, s_head, s_line, has_stride, ok, ov, inside)
    q += begin * q_row + (head // RQ) * q_head + ok
    k += begin * k_row + (head // RK) * k_head + ok
    v += begin * v_row + (head // RV) * v_head + ov
    output += begin * o_row + ov
    for t in tl.range(0, (end - begin).to(tl.int32), num_stages=STAGES):
        at = tl.cast(t, tl.int64)
        qt = tl.load(q + at * q_row, mask=in_k, other=0.0)
        kt = tl.load(k + at * k_row, mask=in_k, other=0.0)
        u = tl.load(v + at * v_row, mask=in_v, other=0.0)
        if NORM:
            qt *= tl.rsqrt(tl.sum(qt * qt, axis=0) + 1e-6)
            kt *= tl.rsqrt(tl.sum(kt * kt, axis=0) + 1e-6)
        if g is not None:
            alpha = tl.load(g + (begin + at) * g_row + head)
            S *= exp(alpha) if LOG else alpha
        u -= tl.sum(S * kt[:, None], axis=0)
        if beta is not None:
            u *= tl.load(beta + (begin + at) * beta_row + head)
        S += kt[:, None] * u[None, :]
        o = scale * tl.sum(S * qt[:, None], axis=0)
        tl.store(output + at * o_row, o.to(output.dtype.element_ty), mask=in_v)
        if checkpoints is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, the other is not)
            if (t + 1) % every == 0:
                kept = checkpoint_row(checkpoint_starts, starts_stride, sequence, t + 1, every)
                store_state(checkpoints, S, kept, head, c_row, c_head, c_line, ok, ov, inside)
    if final is not None:
        store_state(final, S, slot, head, f_slot, f_head, f_line, ok, ov, inside)
