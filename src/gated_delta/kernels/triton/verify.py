"""Several tokens in one pass over the state, where only the outputs and perhaps the last state are wanted.

The rule reads the state through k_t and q_t alone. So a program projects its tile S once on all of them,
``H = S [k_1 .. k_T, q_1 .. q_T]`` (one matrix product), and then runs the rule on H: a token decays H, gives
``u_t = beta_t (v_t - H[k_t])`` and adds ``u_t`` times the products of k_t with all the others. What H holds for q_t
after token t is the output. That is the triangular system of docs/maths.md solved by forward substitution, with every
decay a running product, so that alpha = 0 and any strength of decay are exact. States that must be written are made in
a second pass over the tile, now in the L2: ``S <- alpha_t S + u_t k_t^T``.

Tensor cores multiply what is stored as it is stored, and fp32 numbers as a sum of three bf16 ones: nothing is rounded
below fp32.
"""

import triton
import triton.language as tl

from gated_delta.kernels.triton.shared import SCALAR_POINTERS, SCALARS, gates, place_in_grid, slot_of, split3


@triton.jit
def dot_bf16(x, y, total):
    """``total + x @ y`` for bf16 y; x is bf16, fp16 (two bf16 parts hold it) or fp32 (three)."""
    if x.dtype == tl.bfloat16:
        total = tl.dot(x, y, total)
    else:
        high, middle, low = split3(x.to(tl.float32))
        if x.dtype == tl.float32:
            total = tl.dot(low, y, total)
        total = tl.dot(high, y, tl.dot(middle, y, total))
    return total


@triton.jit
def dot_exact(x, y, total):
    """``total + x @ y`` to fp32 for any dtypes."""
    if x.dtype == y.dtype and x.dtype != tl.float32:
        total = tl.dot(x, y, total)
    elif y.dtype == tl.bfloat16:
        total = dot_bf16(x, y, total)
    elif y.dtype == tl.float16:
        high, middle, _ = split3(y.to(tl.float32))
        total = dot_bf16(x, high, dot_bf16(x, middle, total))
    else:
        total = tl.dot(x.to(tl.float32), y, total, input_precision="ieee")
    return total


@triton.jit
def pick(x, index, t: tl.constexpr):
    """``x[t]`` of a small vector."""
    return tl.sum(tl.where(index == t, x, 0.0))


@triton.jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=SCALAR_POINTERS)
def verify(
    q, k, v, state, A_log, a, dt_bias, b, output, read_slots, write_slots, token_slots, snapshots,
    scale, null_slot, read_stride, write_stride, ts_row, ts_token,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, a_row, a_token, b_row, b_token,
    o_row, o_token, o_head, s_slot, s_head, s_line, n_row, n_token, n_head, n_line, steps,
    T: tl.constexpr, BT: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KC: tl.constexpr, KW: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, NEG_EIGVAL: tl.constexpr,
    UPDATE: tl.constexpr, WIDE: tl.constexpr, ZERO_PADDING: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    tile, head, row = place_in_grid(tl.cdiv(V, BV), HV)
    slot = slot_of(read_slots, read_stride, row, null_slot)
    ok, ov = tl.arange(0, KC), tile * BV + tl.arange(0, BV)
    if WIDE:
        ov = ov.to(tl.int64)
    mv = (ov < V)[:, None]
    ox, ot = tl.arange(0, 2 * BT), tl.arange(0, BT)
    is_q, token = ox >= BT, (ox % BT).to(tl.int64)
    out = output + row * o_row + head * o_head + ov[:, None] + token[None, :] * o_token
    written = mv & (is_q & (token < T))[None, :]
    if slot < 0:
        if ZERO_PADDING:
            tl.store(out, tl.zeros([BV, 2 * BT], output.dtype.element_ty), mask=written)
        return
    k += row * k_row + head // R * k_head
    q += row * q_row + head // R * q_head
    place = head * s_head + ov[:, None] * s_line + ok[None, :]
    source = state + slot * s_slot + place
    x = tl.where(is_q[:, None], q + token[:, None] * q_token, k + token[:, None] * k_token) + ok[None, :]
    value = v + row * v_row + head * v_head + ov[:, None] + token[None, :] * v_token
    values = tl.load(value, mask=mv & (ox < T)[None, :], other=0.0)
    a = tl.load(a + row * a_row + ot * a_token + head, mask=ot < T, other=0.0)
    b = tl.load(b + row * b_row + ot * b_token + head, mask=ot < T, other=0.0)
    A, bias = A_log, dt_bias
    if A_log is not None:
        A, bias = tl.load(A_log + head), tl.load(dt_bias + head)
    WRITES: tl.constexpr = UPDATE or token_slots is not None or snapshots is not None
    H = tl.zeros([BV, 2 * BT], tl.float32)
    G = tl.zeros([2 * BT, 2 * BT], tl.float32)
    for c in tl.range(0, K, KC, num_stages=STAGES):
        S = tl.load(source + c, mask=mv, other=0.0)
        X = tl.load(x + c, mask=(token < T)[:, None], other=0.0)
        H = dot_exact(S, tl.trans(X), H)
        G = dot_exact(X, tl.trans(X), G)
    alphas, betas = gates(a, b, A, bias, NEG_EIGVAL)
    factor = tl.where(is_q, scale, 1.0)
    if NORM:
        diagonal = tl.where(ox[:, None] == ox[None, :], G, 0.0)
        factor *= tl.rsqrt(tl.sum(diagonal, axis=0) + 1e-6)
        G *= tl.rsqrt(tl.sum(diagonal, axis=1) + 1e-6)[:, None]
    H *= factor[None, :]
    G *= factor[None, :]
    us = ()
    for t in tl.static_range(T):
        done = is_q & (token < t)  # outputs of earlier tokens stay as they are
        alpha = pick(alphas, ot, t)
        # Fused by hand: which of two products the compiler would fuse may depend on the tile, and so would bits.
        missing = tl.where((ox == t)[None, :], tl.fma(H, -alpha, values.to(tl.float32)), 0.0)
        u = pick(betas, ot, t) * tl.sum(missing, axis=1)
        g = tl.sum(tl.where((ox == t)[:, None], G, 0.0), axis=0)
        H = tl.where(done[None, :], H, tl.fma(u[:, None], g[None, :], alpha * H))
        us += (u * pick(factor, ox, t),)
    tl.store(out, H.to(output.dtype.element_ty), mask=written)
    if WRITES:
        read = state + slot * s_slot
        if write_slots is not None:
            slot = slot_of(write_slots, write_stride, row, null_slot)
        ok = tl.arange(0, KW)
        place = head * s_head + ov[:, None] * s_line + ok[None, :]
        if snapshots is not None:
            snapshots += row * n_row + head * n_head + ov[:, None] * n_line + ok[None, :]
        for c in tl.range(0, K, KW):
            S = tl.load(read + place + c, mask=mv, other=0.0, eviction_policy=EVICT).to(tl.float32)
            for t in tl.static_range(T):
                key = tl.load(k + t * tl.cast(k_token, tl.int64) + c + ok).to(tl.float32)
                S = tl.fma(us[t][:, None], key[None, :], pick(alphas, ot, t) * S)
                if snapshots is not None:
                    kept = S.to(snapshots.dtype.element_ty)
                    tl.store(snapshots + t * tl.cast(n_token, tl.int64) + c, kept, mask=mv, eviction_policy=EVICT)
                if token_slots is not None:
                    to = slot_of(token_slots + t * ts_token, ts_row, row, null_slot)
                    kept = S.to(state.dtype.element_ty)
                    tl.store(state + to * s_slot + place + c, kept, mask=mv & (to >= 0), eviction_policy=EVICT)
            if UPDATE:
                final = S.to(state.dtype.element_ty)
                tl.store(state + slot * s_slot + place + c, final, mask=mv & (slot >= 0), eviction_policy=EVICT)
