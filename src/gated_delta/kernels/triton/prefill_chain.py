"""The scan over a sequence: over its chunks, for what :mod:`prefill_prepare` made of each, or over fp32 tokens.

A program keeps ``BV`` columns of one head's state, held as [K, V], in fp32 registers from the first token to the last.
A chunk is two dependent products, ``[K; Q] S`` and, with ``Y = V - d K S``, ``[X^T; P'] Y``; both times what was
computed (S, Y, rounded to q's dtype) is the right operand, which tensor cores of every generation read from shared
memory, and the left one comes straight from global memory. Everything loaded depends on the chunk's number alone, so
loads run ahead of the products.

Activations in fp32 go token by token, by the rule itself: tensor cores cannot hold fp32 operands, and products of parts
of them would cost what they save. There the columns are few enough for one warp, so that the two sums over K of a token
need no barrier.
"""

import triton
import triton.language as tl

from gated_delta.kernels.triton.shared import slot_of


@triton.jit
def state_place(base, slot, head, slot_stride, head_stride, line, k, v):
    """Pointers of a ``[V, K]`` state as [K, V]."""
    return base + slot * slot_stride + head * head_stride + v.to(tl.int64)[None, :] * line + k[:, None]


@triton.jit
def store_state(base, S, slot, head, slot_stride, head_stride, line, k, v, inside):
    place = state_place(base, slot, head, slot_stride, head_stride, line, k, v)
    tl.store(place, S.to(base.dtype.element_ty), mask=inside)


@triton.jit
def checkpoint_row(starts, stride, sequence, done, every):
    """Row of the state after ``done`` tokens."""
    return tl.load(starts + sequence.to(tl.int64) * stride).to(tl.int64) + (done // every - 1)


@triton.jit
def first_state(
    source, has_state, slot, sequence, head, slot_stride, head_stride, line, has_stride, k, v, inside,
):  # fmt: skip
    """The state that a sequence starts from, in fp32; what an unused slot holds (NaN) is not looked at."""
    S = tl.zeros([k.shape[0], v.shape[0]], tl.float32)
    if source is not None:
        if has_state is not None:
            inside = inside & (tl.load(has_state + sequence.to(tl.int64) * has_stride) != 0)
        place = state_place(source, slot, head, slot_stride, head_stride, line, k, v)
        S = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return S


@triton.jit
def zero_rows(output, begin, end, row_stride, v, V: tl.constexpr):
    """Zeros for these rows of one head of the output."""
    r = tl.arange(0, 64)
    rows = output + r.to(tl.int64)[:, None] * row_stride + v[None, :]
    for at in tl.range(begin, end, 64):
        mask = (at + r < end)[:, None] & (v < V)[None, :]
        tl.store(rows + at * row_stride, tl.zeros([64, v.shape[0]], output.dtype.element_ty), mask=mask)


@triton.jit
def exp(x):
    """To an ulp. The processor's own is off by four near 1, always in the same direction: weak decays add that up."""
    x = tl.maximum(x, -150.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.428606765330187e-06  # ln 2 in two parts: n times the first is exact
    y = 0.008333333333333333 + r * (0.001388888888888889 + r * 0.0001984126984126984)
    return (1.0 + r * (1.0 + r * (0.5 + r * (0.16666666666666666 + r * (0.041666666666666664 + r * y))))) * tl.exp2(n)


@triton.jit(do_not_specialize=["null_slot", "L", "N"])
def chain(
    q, k, v, g, beta, work, vectors, cu_seqlens, slots, source, has_state, final, checkpoints, checkpoint_starts,
    output, scale, null_slot, L, N, every,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, beta_row, o_row, o_head, cu_stride, slot_stride, has_stride,
    starts_stride, s_slot, s_head, s_line, f_slot, f_head, f_line, c_row, c_head, c_line,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, STAGES: tl.constexpr, ZERO_PADDING: tl.constexpr, NORM: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """BV columns of one state of one sequence; sequence N are the tokens behind the last one. With g and beta it goes
    over tokens, with ``work`` over chunks.
    """
    tile, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, ok, ov = tl.arange(0, 64), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    in_v = (ov < V)[None, :]
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
    inside = (ok < K)[:, None] & in_v
    S = first_state(source, has_state, slot, sequence, head, s_slot, s_head, s_line, has_stride, ok, ov, inside)
    if work is None:
        q += begin * q_row + (head // RQ) * q_head + ok
        k += begin * k_row + (head // RK) * k_head + ok
        v += begin * v_row + (head // RV) * v_head + ov
        output += begin * o_row + ov
        for t in tl.range(0, (end - begin).to(tl.int32), num_stages=STAGES):
            at = tl.cast(t, tl.int64)
            qt = tl.load(q + at * q_row, mask=ok < K, other=0.0)
            kt = tl.load(k + at * k_row, mask=ok < K, other=0.0)
            u = tl.load(v + at * v_row, mask=ov < V, other=0.0)
            if NORM:
                qt *= tl.rsqrt(tl.sum(qt * qt, axis=0) + 1e-6)
                kt *= tl.rsqrt(tl.sum(kt * kt, axis=0) + 1e-6)
            if g is not None:
                alpha = tl.load(g + (begin + at) * g_row + head)
                S *= exp(alpha) if LOG else alpha
            u -= tl.sum(S * kt[:, None], axis=0)
            if beta is not None:
                u *= tl.load(beta + (begin + at) * beta_row + head)
            # Said, since the compiler keeps S in two layouts: were it to round them differently, the one that is stored
            # would drift from the one that u comes from.
            S = tl.fma(kt[:, None], u[None, :], S)
            o = scale * tl.sum(S * qt[:, None], axis=0)
            tl.store(output + at * o_row, o.to(output.dtype.element_ty), mask=ov < V)
            if checkpoints is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, the other is not)
                if (t + 1) % every == 0:
                    kept = checkpoint_row(checkpoint_starts, starts_stride, sequence, t + 1, every)
                    store_state(checkpoints, S, kept, head, c_row, c_head, c_line, ok, ov, inside)
    else:
        row = n.to(tl.int64)[:, None]
        both = tl.arange(0, 128)[:, None]  # rows of k, then of q
        of_k, r = both < 64, (both % 64).to(tl.int64)
        kq_tile = tl.where(of_k, k + begin * k_row + (head // RK) * k_head, q + begin * q_row + (head // RQ) * q_head)
        kq_tile += tl.where(of_k, r * k_row, r * q_row) + ok[None, :]
        kq_chunk = tl.where(of_k, k_row, q_row).to(tl.int64) * 64
        v_tile = v + begin * v_row + (head // RV) * v_head + row * v_row + ov[None, :]
        o_tile = output + begin * o_row + row * o_row + ov[None, :]
        chunk = (begin // 64 + sequence) * tl.num_programs(1) + head
        x_tile = work + chunk * ((K + 64) * 64) + ok[:, None] * 64 + n[None, :]
        p_tile = work + chunk * ((K + 64) * 64) + K * 64 + n[:, None] * 64 + n[None, :]
        length = (end - begin).to(tl.int32)
        for c in tl.range(0, (length + 63) // 64, num_stages=STAGES):
            at = tl.cast(c, tl.int64)  # chunks behind the first
            in_row = (c * 64 + n < length)[:, None]
            in_kq = (c * 64 + both % 64 < length) & (ok < K)[None, :]
            kq = tl.load(kq_tile, mask=in_kq, other=0.0)
            kq_tile += kq_chunk
            vt = tl.load(v_tile + at * 64 * v_row, mask=in_row & in_v, other=0.0)
            X = tl.load(x_tile + at * tl.num_programs(1) * ((K + 64) * 64), mask=(ok < K)[:, None], other=0.0)
            P = tl.load(p_tile + at * tl.num_programs(1) * ((K + 64) * 64))
            factor = vectors + (chunk + at * tl.num_programs(1)) * (8 * 64)
            k_factor, q_factor, decay = tl.load(factor + n), tl.load(factor + 64 + n), tl.load(factor + 128)
            state = S.to(q.dtype.element_ty)
            KS, QS = tl.permute(tl.reshape(tl.dot(kq, state), [2, 64, BV]), [1, 2, 0]).split()
            Y = (vt.to(tl.float32) - k_factor[:, None] * KS).to(q.dtype.element_ty)
            S = tl.dot(X, Y, S * decay)
            out = tl.dot(P, Y, QS * q_factor[:, None]) * scale
            tl.store(o_tile + at * 64 * o_row, out.to(output.dtype.element_ty), mask=in_row & in_v)
            if checkpoints is not None:
                done = (c + 1) * 64
                if (done <= length) & (done % every == 0):
                    kept = checkpoint_row(checkpoint_starts, starts_stride, sequence, done, every)
                    store_state(checkpoints, S, kept, head, c_row, c_head, c_line, ok, ov, inside)
    if final is not None:
        store_state(final, S, slot, head, f_slot, f_head, f_line, ok, ov, inside)
