"""The rule token by token around the operators' own arguments: exact in float64, plain in fp32."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gated_delta import reference


class Evaluation(NamedTuple):
    """What an operator should give."""

    output: Tensor
    """``[L, HS, V]`` or ``[B, T, HV, V]``"""
    state: Tensor
    """``[N, HS, V, K]`` or ``[B, HV, V, K]``: final states."""
    kept: list[Tensor]
    """Prefill: all checkpoints, each ``[HS, V, K]``. Steps: the states after each token, ``[B, HV, V, K]``."""


def prefill(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, *, cu_seqlens: Tensor,
    scale: float | None = None, initial_state: Tensor | None = None, use_qk_l2norm_in_kernel: bool = False,
    g_space: str = "linear", checkpoint_every_n_tokens: int = 0, dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> Evaluation:  # fmt: skip
    """``chunk_gated_delta_rule`` on packed sequences. In fp32 (the plain evaluation) normalised q and k are rounded
    to the activation dtype, which is where a tensor-core kernel must hold them; with ``operands`` what enters a
    product otherwise (the state, u) is rounded to that dtype, too.
    """
    stored = q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if use_qk_l2norm_in_kernel:
        q, k = reference.l2norm(q), reference.l2norm(k)
        if dtype != torch.float64:
            q, k = q.to(stored).to(dtype), k.to(stored).to(dtype)
    heads = max(q.shape[1], v.shape[1])
    ones = torch.ones(q.shape[0], heads, dtype=dtype)
    alpha = ones if g is None else g.to(dtype).exp() if g_space == "log" else g.to(dtype)
    beta = ones if beta is None else beta.to(dtype)
    factor = reference.resolve_scale(scale, q.shape[-1])
    empty = torch.zeros(heads, v.shape[-1], q.shape[-1], dtype=dtype)
    found = []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own, state = slice(start, end), empty if initial_state is None else initial_state[i].to(dtype)
        found.append(reference.recurrent(
            q[None, own], k[None, own], v[None, own], alpha[None, own], beta[None, own], factor, state[None],
            keep_every=checkpoint_every_n_tokens, dtype=dtype, operands=operands,
        ))  # fmt: skip
    outputs, states, kept = zip(*found, strict=True)
    return Evaluation(torch.cat(outputs, dim=1)[0], torch.cat(states), [x[0] for each in kept for x in each])


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor,
    scale: float | None = None, *, use_qk_l2norm: bool = True, allow_neg_eigval: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Evaluation:  # fmt: skip
    """Decode and several tokens, one state ``[B, HV, V, K]`` a row."""
    q, k = q.to(dtype), k.to(dtype)
    if use_qk_l2norm:
        q, k = reference.l2norm(q), reference.l2norm(k)
    alpha = reference.decay(A_log, a, dt_bias, dtype=dtype)
    beta = reference.write_strength(b, allow_neg_eigval=allow_neg_eigval, dtype=dtype)
    factor = reference.resolve_scale(scale, q.shape[-1])
    return Evaluation(*reference.recurrent(q, k, v, alpha, beta, factor, state, keep_every=1, dtype=dtype))


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, cu_seqlens: Tensor, activation: str | None, *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Causal convolution by its definition, one tap at a time; history ``[N, W-1, D]`` -> ``[L, D]``."""
    width = weight.shape[1]
    y = torch.zeros(x.shape, dtype=dtype)
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        inputs = torch.cat((history[i].to(dtype), x[start:end].to(dtype)))
        for tap in range(width):
            y[start:end] += inputs[tap : tap + end - start] * weight[:, tap].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y * torch.sigmoid(y) if activation else y
