"""The rule token by token, for decode and wherever the state after every token is wanted.

A program owns BV values of one head of one row. The tile of the state stays in registers over all tokens, and one round
of reductions serves a token: with S the state before it,

    S_t k = alpha (S k),   u = beta (v - S_t k),   o = scale (alpha (S q) + u (k . q)),   S <- alpha S + u k^T
"""

import triton
import triton.language as tl

from gated_delta.kernels.triton.shared import SCALAR_POINTERS, SCALARS, gates, place_in_grid, slot_of


@triton.jit
def places(line, ov, ok, V_FIRST: tl.constexpr):
    """Offsets of a ``[BV, BK]`` tile in a state, ``[V, K]`` or ``[K, V]``, whose rows are ``line`` apart."""
    if V_FIRST:
        return ov[:, None] * line + ok[None, :]
    return ok[None, :] * line + ov[:, None]


@triton.jit
def inputs(q, k, v, a, b, mk, mv):
    """What a token brings, as it is stored."""
    v_t, a_t, b_t = tl.load(v, mask=mv, other=0.0), tl.load(a), tl.load(b)
    return tl.load(q, mask=mk, other=0.0), tl.load(k, mask=mk, other=0.0), v_t, a_t, b_t


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=SCALAR_POINTERS)
def tokens(
    q, k, v, state, A_log, a, dt_bias, b, output, read_slots, write_slots, token_slots, snapshots,
    scale, null_slot, read_stride, write_stride, ts_row, ts_token,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, a_row, a_token, b_row, b_token,
    o_row, o_token, o_head, s_slot, s_head, s_line, n_row, n_token, n_head, n_line, steps,
    SINGLE: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, V_FIRST: tl.constexpr, NORM: tl.constexpr, NEG_EIGVAL: tl.constexpr, UPDATE: tl.constexpr,
    WIDE: tl.constexpr, ZERO_PADDING: tl.constexpr, EARLY: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    tile, head, row = place_in_grid(tl.cdiv(V, BV), HV)
    slot = slot_of(read_slots, read_stride, row, null_slot)
    ok, ov = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    if WIDE:
        ok, ov = ok.to(tl.int64), ov.to(tl.int64)
    mk, mv = ok < K, ov < V
    q += row * q_row + head // R * q_head + ok
    k += row * k_row + head // R * k_head + ok
    v += row * v_row + head * v_head + ov
    output += row * o_row + head * o_head + ov
    a += row * a_row + head
    b += row * b_row + head
    T = 1 if SINGLE else steps
    q_token, k_token, v_token = tl.cast(q_token, tl.int64), tl.cast(k_token, tl.int64), tl.cast(v_token, tl.int64)
    o_token, n_token = tl.cast(o_token, tl.int64), tl.cast(n_token, tl.int64)
    if slot < 0:
        if ZERO_PADDING:
            for t in range(T):
                tl.store(output + t * o_token, tl.zeros([BV], output.dtype.element_ty), mask=mv)
        return
    inside = mv[:, None] & mk[None, :]
    if snapshots is not None:
        snapshots += row * n_row + head * n_head + places(n_line, ov, ok, V_FIRST)
    place = head * s_head + places(s_line, ov, ok, V_FIRST)
    S = tl.load(state + slot * s_slot + place, mask=inside, other=0.0, eviction_policy=EVICT)
    if EARLY:  # or else ptxas keeps back some of these loads until the registers of others are free
        tl.debug_barrier()
    A, bias = A_log, dt_bias
    if A_log is not None:
        A, bias = tl.load(A_log + head), tl.load(dt_bias + head)
    q_t, k_t, v_t, a_t, b_t = inputs(q, k, v, a, b, mk, mv)
    S = S.to(tl.float32)
    for t in range(T):
        bq, bk, bv = q_t.to(tl.float32), k_t.to(tl.float32), v_t.to(tl.float32)
        alpha, beta = gates(a_t, b_t, A, bias, NEG_EIGVAL)
        if not SINGLE and t + 1 < T:
            n = t + 1
            q_t, k_t, v_t, a_t, b_t = inputs(
                q + n * q_token, k + n * k_token, v + n * v_token, a + n * a_token, b + n * b_token, mk, mv
            )
        read_k, read_q = tl.split(tl.sum(tl.join(S * bk[None, :], S * bq[None, :]), axis=1))
        of_k, of_q = tl.split(tl.sum(tl.join(tl.join(bk * bk, bk * bq), tl.join(bq * bq, bk * bq)), axis=0))
        kk, kq = tl.split(of_k)
        qq, _ = tl.split(of_q)
        k_norm, q_scale = 1.0, scale
        if NORM:
            k_norm = tl.rsqrt(kk + 1e-6)
            q_scale = scale * tl.rsqrt(qq + 1e-6)
        # Fused by hand: which of two products the compiler would fuse may depend on the tile, and so would bits.
        u = (beta * k_norm) * tl.fma(-alpha * k_norm, read_k, bv)  # u of the formula times the norm that k lacks
        result = q_scale * tl.fma(alpha, read_q, u * kq)
        S = tl.fma(u[:, None], bk[None, :], alpha * S)
        tl.store(output + t * o_token, result.to(output.dtype.element_ty), mask=mv)
        if snapshots is not None:
            kept = S.to(snapshots.dtype.element_ty)
            tl.store(snapshots + t * n_token, kept, mask=inside, eviction_policy=EVICT)
        if token_slots is not None:
            to = slot_of(token_slots + t * ts_token, ts_row, row, null_slot)
            if to >= 0:
                kept = S.to(state.dtype.element_ty)
                tl.store(state + to * s_slot + place, kept, mask=inside, eviction_policy=EVICT)
    if UPDATE:
        if write_slots is not None:
            slot = slot_of(write_slots, write_stride, row, null_slot)
        if slot >= 0:
            final = S.to(state.dtype.element_ty)
            tl.store(state + slot * s_slot + place, final, mask=inside, eviction_policy=EVICT)
