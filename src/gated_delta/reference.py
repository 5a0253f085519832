"""The operators in plain torch: any precision, any device, differentiable.

Two evaluations of the gated delta rule live here. :func:`recurrent` goes token by token and is the oracle; run it
in float64 to judge anything else. :func:`chunked` does the same with matrix products over chunks of tokens and is
what the CPU backend runs. Notation follows docs/contract.md: per state head, with state ``S[V, K]``,

    S <- alpha S;   u = beta (v - S k);   S <- S + u k^T;   o = scale S q

Head counts are written HQ, HK, HV for q, k, v and ``HS = max(HQ, HV)`` for state heads. Everything here computes in
the dtype that the caller passes as ``dtype`` and rounds nothing in between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

L2_EPS = 1e-6
CHUNK = 32
"""Tokens a chunk. Every product with the state costs the same at any chunk length, the triangles inside a chunk grow
with it, and the state is rewritten once a chunk: 32 was never slower than 16 and 64 (docs/performance.md).
It divides the contract's 64, so that checkpoints fall on chunk ends."""

_PREPARED_ELEMENTS = 1 << 18
"""Elements of one C x C gate matrix prepared ahead of the scan: enough that small heads are not all calls, little
enough that what is prepared is still in a cache when the scan reads it."""


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)`` without overflow, exact to rounding for every finite ``x``."""
    return 0.5 * x + 0.5 * x.abs() + torch.log1p(torch.exp(-x.abs()))  # not clamp: its gradient at 0 is 1


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + e^-x)``. On a CPU torch's own rounds differently in vector bodies and tails, so that an element's bits
    would depend on where in its tensor it stands.
    """
    positive = x >= 0
    small = torch.exp(torch.where(positive, -x, x))  # at most 1, so that neither it nor its gradient overflows
    return torch.where(positive, 1 / (1 + small), small / (1 + small))


def decay(A_log: Tensor, a: Tensor, dt_bias: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``alpha = exp(-exp(A_log) softplus(a + dt_bias))``, shaped like ``a`` (``[..., HV]``)."""
    return torch.exp(log_decay(A_log, a, dt_bias, dtype=dtype))


def log_decay(A_log: Tensor, a: Tensor, dt_bias: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The logarithm of :func:`decay`."""
    largest = torch.finfo(dtype).max  # infinity times a closed gate, or zero times an infinite one, would be NaN
    rate = torch.exp(A_log.to(dtype)).clamp(max=largest)
    return -rate * softplus((a.to(dtype) + dt_bias.to(dtype)).clamp(-largest, largest))


def write_strength(b: Tensor, *, allow_neg_eigval: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """``beta = sigmoid(b)``, doubled where the transition may have negative eigenvalues (OLMo-hybrid)."""
    beta = sigmoid(b.to(dtype))
    return 2 * beta if allow_neg_eigval else beta


def resolve_scale(scale: float | None, head_k: int) -> float:
    """``K ** -0.5`` where none is given; any given number is honoured, 0.0 included."""
    return float(head_k) ** -0.5 if scale is None else float(scale)


def l2norm(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """``silu`` (also called ``swish``), ``sigmoid`` or nothing."""
    if activation in ("silu", "swish"):
        return x * sigmoid(x)
    return sigmoid(x) if activation == "sigmoid" else x


def rms_norm_gated(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str = "silu", *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``x rsqrt(mean(x^2) + eps) weight act(z)`` over the last dimension."""
    x = x.to(dtype)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * weight.to(dtype) * activate(z.to(dtype), activation)


def by_part(x: Tensor, head_k: int) -> Tensor:
    """Channels grouped by key head, ``[L, H, 2 head_k + values]`` -> all of q, then k, then v: ``[L, D]``."""
    return torch.cat([y.flatten(1) for y in x.split((head_k, head_k, x.shape[2] - 2 * head_k), dim=-1)], dim=-1)


def extend(x: Tensor, history: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put ``history [N, W-1, D]`` in front of the sequences packed in ``x [L, D]``: the rows, where each sequence is
    among them (``[N + 1]``), where each token is (``[L]``).
    """
    count, width, _ = history.shape
    starts = cu_seqlens.long() + torch.arange(count + 1, device=x.device) * width
    position, inner = torch.arange(x.shape[0], device=x.device), cu_seqlens[1:-1].long().contiguous()
    tokens = position + width * (1 + torch.searchsorted(inner, position, right=True))
    rows = x.new_zeros(x.shape[0] + count * width, x.shape[1], dtype=history.dtype)
    past = starts[:-1, None] + torch.arange(width, device=x.device)
    rows = rows.index_copy(0, past.flatten(), history.flatten(0, 1))
    return rows.index_copy(0, tokens, x.to(history.dtype)), starts, tokens


def causal_conv1d(rows: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Depthwise causal convolution of ``weight [D, W]`` over what :func:`extend` gives: the outputs of ``tokens``, in
    the dtype of the rows.
    """
    width, weight = weight.shape[1], weight.to(rows.dtype)
    y = rows.new_zeros(()) if bias is None else bias.to(rows.dtype)
    for tap in range(width):
        y = y + rows.index_select(0, tokens - (width - 1 - tap)) * weight[:, tap]
    return activate(y, activation)


def expand_heads(x: Tensor, heads: int, dim: int = -2) -> Tensor:
    """Repeat the heads of x along ``dim``, so that head ``i`` of the result is head ``i // (heads // H)`` of x."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, scale: float, state: Tensor, *, keep_every: int = 0,
    dtype: torch.dtype = torch.float32, operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The rule token by token: q ``[B, T, HQ, K]``, k ``[B, T, HK, K]``, v ``[B, T, HV, V]``, alpha and beta
    ``[B, T, HS]``, state ``[B, HS, V, K]``.

    ``operands``: where the state and u enter a product they are rounded to this dtype, as tensor cores need them.

    Returns the output ``[B, T, HS, V]``, the final state, and the states after every ``keep_every`` tokens (none for
    0).
    """

    def operand(x: Tensor) -> Tensor:
        return x if operands is None else x.to(operands).to(dtype)

    heads = alpha.shape[-1]
    q, k, v = (expand_heads(x.to(dtype), heads) for x in (q, k, v))
    alpha, beta, state = alpha.to(dtype), beta.to(dtype), state.to(dtype)
    outputs, kept = [v[:, :0]], []
    for t in range(q.shape[1]):
        state = state * alpha[:, t, :, None, None]
        # A sum over the last dimension gives a row the same bits in any batch; a batched product need not.
        u = beta[:, t, :, None] * (v[:, t] - (operand(state) * k[:, t, :, None]).sum(-1))
        state = state + operand(u)[..., :, None] * k[:, t, :, None, :]
        outputs.append(scale * (operand(state) * q[:, t, :, None]).sum(-1)[:, None])
        if keep_every and (t + 1) % keep_every == 0:
            kept.append(state)
    return torch.cat(outputs, dim=1), state, kept


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, valid: Tensor, scale: float, dtype: torch.dtype,
    prepare: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the scan needs of ``m`` chunks of C tokens, and what depends on no state: q, k ``[m, C, H, K]``, v
    ``[m, C, HS, V]``, alpha and beta ``[m, C, HS]``, valid ``[m, C]`` -> what :func:`_scan_chunk` takes.
    """
    heads, size = alpha.shape[-1], alpha.shape[1]

    def by_head(x: Tensor, to: torch.dtype = prepare) -> Tensor:
        return x.transpose(1, 2).to(to, memory_format=torch.contiguous_format)

    alpha = torch.where(valid[:, None], by_head(alpha), 1.0)
    beta = torch.where(valid[:, None], by_head(beta), 0.0)
    # gamma[i, j] = alpha[j+1] ... alpha[i]: a running product, never a quotient of two, so exact zeros are harmless.
    causal = torch.ones(size, size, dtype=torch.bool, device=alpha.device).tril()
    gamma = torch.where(causal.tril(-1), alpha[..., None], 1.0).cumprod(dim=-2)
    decay_in, decay_out = alpha.cumprod(-1)[..., None], gamma[..., -1, :, None]
    gamma = torch.where(causal, gamma, 0.0)
    k = by_head(k)
    qk = torch.cat((by_head(q) * scale, k), dim=-2)
    scores = expand_heads(qk @ k.transpose(-1, -2), heads, dim=1)
    lower = (scores[..., size:, :] * gamma * beta[..., None]).tril(-1)
    # By substitution: a product form such as (I - N)(I + N^2)... has powers that grow without bound for similar keys.
    solve = torch.linalg.solve_triangular(lower, torch.diag_embed(beta), upper=False, unitriangular=True)
    made = (qk, solve, scores[..., :size, :] * gamma, decay_in, decay_out)
    return by_head(v, dtype), *(x.to(dtype) for x in made)


def _plus_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``c + a @ b``, batched over the first two dimensions, in c's memory: c must be fresh."""
    return c.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1)).view_as(c)


def _scan_chunk(
    state: Tensor, v: Tensor, qk: Tensor, solve: Tensor, attend: Tensor, decay_in: Tensor, decay_out: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of every running sequence: state ``[n, HS, K, V]`` -> output ``[n, HS, C, V]`` and the next state.

    v ``[n, HS, C, V]``; qk ``[n, HK, 2C, K]``, queries over keys, so that one product reads the state for both; solve
    (T, from values to updates) and attend (P, from updates to outputs) ``[n, HS, C, C]``; the decays from the chunk's
    start to after each token, and from there to the chunk's end, ``[n, HS, C, 1]``.
    """
    size = v.shape[-2]
    qk = expand_heads(qk, state.shape[1], dim=1)
    read = qk @ state
    u = solve @ (v - decay_in * read[..., size:, :])
    output = _plus_product(decay_in * read[..., :size, :], attend, u)
    keys = qk[..., size:, :].transpose(-1, -2)
    return output, _plus_product(decay_in[..., -1:, :] * state, keys, decay_out * u)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, scale: float, state: Tensor,
    spans: Sequence[tuple[int, int]], *, checkpoint_every: int = 0, chunk: int = CHUNK, out: Tensor | None = None,
    dtype: torch.dtype = torch.float32, prepare: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:  # fmt: skip
    """The rule by chunks, for packed sequences: q ``[L, HQ, K]``, k ``[L, HK, K]``, v ``[L, HV, V]``, alpha and beta
    ``[L, HS]``, initial state ``[N, HS, V, K]``; sequence i is the tokens ``spans[i]``, first to one past the last;
    ``checkpoint_every`` is 0 or a multiple of ``chunk``. The output goes to ``out``, rounded to its dtype, if that is
    given (tokens of no span stay as they are), else to zeros in ``dtype``.

    Returns the output ``[L, HS, V]``, final states ``[N, HS, V, K]``, and of each sequence those after every
    ``checkpoint_every`` tokens.

    The state before a chunk enters through two products; inside the chunk the updates u solve a unit lower triangular
    system (docs/maths.md derives it). ``prepare`` is the precision in which that system is made and inverted, ``dtype``
    when None: with similar keys and beta above 1 it is worth float64 (docs/numerics.md).
    """
    heads = alpha.shape[-1]
    if k.shape[-2] < q.shape[-2]:  # GQA: many q heads share k and v. (In GVA q and k go together already.)
        k, v = expand_heads(k, heads), expand_heads(v, heads)
    lengths = [end - start for start, end in spans]
    final = state.to(dtype).transpose(-1, -2).clone()
    output = v.new_zeros(q.shape[0], heads, v.shape[-1], dtype=dtype) if out is None else out
    checkpoints: list[list[Tensor]] = [[] for _ in spans]
    done = 0
    while rows := [i for i, length in enumerate(lengths) if length > done]:
        # Some steps of all that still run; where a sequence ends before the others do, its last token stands in, and
        # changes nothing: its alpha is 1, its beta 0.
        most = max(1, _PREPARED_ELEMENTS // (heads * chunk**2 * len(rows)))
        steps = min(most, -(-(max(lengths) - done) // chunk))
        start, end = torch.tensor([spans[i] for i in rows], device=q.device)[..., None].unbind(1)
        tokens = start + done + torch.arange(steps * chunk, device=q.device).view(steps, 1, chunk)
        valid, tokens = tokens < end, torch.minimum(tokens, end - 1)
        parts = (x.index_select(0, tokens.flatten()).unflatten(0, (-1, chunk)) for x in (q, k, v, alpha, beta))
        prepared = _prepare(*parts, valid.flatten(0, 1), scale, dtype, prepare or dtype)
        running = final[rows]
        for place, live, *parts in zip(tokens, valid, *(x.split(len(rows)) for x in prepared), strict=True):
            result, running = _scan_chunk(running, *parts)
            done += chunk
            result = result.transpose(1, 2).to(output.dtype, memory_format=torch.contiguous_format)
            whole = all(lengths[i] >= done for i in rows)
            written = (place.flatten(), result.flatten(0, 1)) if whole else (place[live], result[live])
            output.index_copy_(0, *written)
            if checkpoint_every and done % checkpoint_every == 0:
                for i, after in zip(rows, running, strict=True):
                    if lengths[i] >= done:
                        checkpoints[i].append(after.transpose(-1, -2))
        final[rows] = running
    return output, final.transpose(-1, -2), checkpoints
