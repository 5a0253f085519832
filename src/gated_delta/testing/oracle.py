"""The rule token by token around the operators' own arguments: exact in float64, plain in fp32."""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gated_delta import reference
from gated_delta.testing.inputs import Inputs

AT_ONCE = 1 << 8
"""Rows times heads of a step evaluated together: what float64 takes must fit beside the rest."""

Results = dict[str, Tensor]
"""What a call leaves: "output" and, where it is asked for, "state" (the final ones), "kept" (those after every token or
at checkpoints), both ``[..., V, K]``, and "window" (those of a convolution)."""


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
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        inputs = torch.cat((history[i].to(dtype), x[start:end].to(dtype)))
        for tap in range(width):
            y[start:end] += inputs[tap : tap + end - start] * weight[:, tap].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y * torch.sigmoid(y) if activation else y


def arguments(function: Callable[..., Any], given: Inputs) -> Inputs:
    """Those of ``given`` that a function takes."""
    return {name: x for name, x in given.items() if name in signature(function).parameters}


def results(operator: str, given: Inputs, output: Tensor, final: Tensor | None = None) -> Results:
    """What a call of an operator of ours left in its arguments ``given``, and what it returned."""
    left, slots = {"output": output}, given.get("ssm_state_indices")
    kept = given.get("state_checkpoints", given.get("intermediate_states_buffer"))
    if slots is not None:
        kept = given["initial_state"][slots.long()]
    elif "A_log" in given and not given.get("disable_state_update"):
        left["state"] = _states(operator, given)
    elif "A_log" not in given and final is not None:
        left["state"] = final
    left |= {} if kept is None else {"kept": kept}
    return left | ({"window": _rows(given["conv_states"], given["state_indices"])} if "conv_states" in given else {})


def evaluate(
    operator: str, given: Inputs, *, dtype: torch.dtype = torch.float64, operands: torch.dtype | None = None
) -> Results:
    """The same as it should be, before the call. ``operands``: as for :func:`prefill`, which only that has."""
    if operator == "chunk_gated_delta_rule":
        output, state, kept = prefill(**arguments(prefill, given), dtype=dtype, operands=operands)
        return {"output": output, "state": state, **({"kept": torch.stack(kept)} if kept else {})}
    if operator == "rms_norm_gated":
        return {"output": _norm(**given, dtype=dtype)}
    if operator == "gated_delta_net_step":
        return _step(given, dtype)
    return _recurrent(operator, given, dtype) if "A_log" in given else _convolved(given, dtype)


def _rows(pool: Tensor, slots: Tensor | None) -> Tensor:
    return pool if slots is None else pool[slots.long()]


def _states(operator: str, given: Inputs) -> Tensor:
    """Of the rows of a step, as they are now: ``[B, HV, V, K]``."""
    pool = given["initial_state"] if given.get("state") is None else given["state"]
    state = _rows(pool, given.get("initial_state_indices", given.get("state_indices")))
    return state.mT if operator == "gated_delta_rule_decode" else state


def _norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, activation: str = "silu") -> Tensor:
    gate = getattr(functional, activation)(z.to(dtype))
    return functional.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps) * gate


def _convolved(given: Inputs, dtype: torch.dtype) -> Results:
    """Packed sequences, or rows of as many tokens each."""
    x, weight, states = given["x"], given["weight"], _rows(given["conv_states"], given["state_indices"])
    rows, past, accepted = x.flatten(0, -2), weight.shape[1] - 1, given.get("num_accepted_tokens")
    cu_seqlens = given.get("cu_seqlens", torch.arange(len(x) + 1) * (len(rows) // len(x)))
    first = [0] * len(states) if accepted is None else (accepted - 1).tolist()
    history = torch.stack([state[:, column : column + past].T for state, column in zip(states, first, strict=True)])
    output = conv(rows, weight, given.get("bias"), history, cu_seqlens, "silu", dtype=dtype)
    every = [torch.cat((h, rows[a:b])) for h, (a, b) in zip(history, pairwise(cu_seqlens.tolist()), strict=True)]
    window = torch.stack([own[len(own) - past if accepted is None else 1 :].T for own in every])
    return {"output": output.view(x.shape), "window": window.to(dtype)}


def _recurrent(operator: str, given: Inputs, dtype: torch.dtype) -> Results:
    """A few rows at a time."""
    rows, found = {"state": _states(operator, given), **{name: given[name] for name in "qkvab"}}, []
    for part in zip(*(x.split(max(1, AT_ONCE // given["v"].shape[2])) for x in rows.values()), strict=True):
        own = dict(zip(rows, part, strict=True))
        output, state, kept = recurrent(**own, A_log=given["A_log"], dt_bias=given["dt_bias"], dtype=dtype)
        left = {"output": output, "state": state, "kept": torch.stack(kept, 1)}
        found.append({name: left[name] for name in results(operator, given, output) if name in left})
    return {name: torch.cat([left[name] for left in found]) for name in found[0]}


def _step(given: Inputs, dtype: torch.dtype) -> Results:
    """A token a row: the parts one after the other, nothing rounded between them."""
    x = torch.cat([given[name].flatten(1) for name in "qkv"], -1)
    mixed = _convolved({**given, "x": x, "weight": given["conv_weight"]}, dtype)
    parts = mixed["output"][:, None].split([given[name][0].numel() for name in "qkv"], -1)
    heads = {n: y.unflatten(-1, (-1, given[n].shape[-1])) for n, y in zip("qkv", parts, strict=True)}
    gates = {name: given[name].flatten(1)[:, None] for name in "ab"}
    found, z = _recurrent("gated_delta_net_step", given | heads | gates, dtype), given["z"].flatten(1, 2)
    normed = _norm(found["output"][:, 0], z, given["norm_weight"], given["eps"], dtype)
    return {**found, "output": normed, "window": mixed["window"]}
