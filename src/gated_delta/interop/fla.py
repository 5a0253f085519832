"""The gated delta rule and the causal convolution by the signatures of flash-linear-attention 0.6.0, for inference.

``[B, T, H, D]`` batches, or B = 1 and sequences cut by ``cu_seqlens``. g is the logarithm of the decay, or raw with
``use_gate_in_kernel`` (then A_log is needed); beta is itself, or raw with ``use_beta_sigmoid_in_kernel``, which
``allow_neg_eigval`` doubles; either is ones when None. States are ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with
``state_v_first``; final ones are fp32, an initial one is not written. What is in ``**kwargs`` there has a name here.
Every error is an ``ArgumentError``, which names the argument, what it is and what it must be.
"""

from typing import Any

import torch
from torch import Tensor

import gated_delta
from gated_delta import reference
from gated_delta.errors import OptionError, ShapeError
from gated_delta.interop import conv, judged
from gated_delta.interop.conv import equal_lengths, packed
from gated_delta.validation.arguments import Arguments

Result = tuple[Tensor, Tensor | None]
_TAKEN = (
    "q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias", "scale", "output_final_state",
    "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first",
)  # fmt: skip
"""What both forms of the rule take; other parameters change no result."""


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
    cp_context: object = None, *, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, chunk_size: int = 64, transpose_state_layout: object = None,
) -> Result:  # fmt: skip
    """Output ``[B, T, HV, V]`` and final states or None; cu_seqlens_cpu, chunk_indices, chunk_size change no result."""
    return _rule("fla.chunk_gated_delta_rule", locals())


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, gv: Tensor | None = None,
    beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    *, transpose_state_layout: object = None,
) -> Result:  # fmt: skip
    """Output ``[B, T, HV, V]`` and final states or None."""
    return _rule("fla.fused_recurrent_gated_delta_rule", locals())


def _rule(where: str, given: dict[str, Any]) -> Result:
    """Both functions, by their parameters: equal sequences may go to a recurrent operator."""
    q, k, v, g, beta, state, cu_seqlens, A_log, dt_bias, *options = [given[name] for name in _TAKEN]
    scale, keep, l2norm, raw_gate, raw_beta, doubled, v_first = options
    shapes = {"q": "B T H K", "k": "B T H K", "v": "B T HV V", "g": "?B T HV", "beta": "?B T HV", "cu_seqlens": "?N+1"}
    shapes["initial_state"] = f"?{'B' if cu_seqlens is None else 'N'} HV {'V K' if v_first else 'K V'}"
    judged(where, given, shapes)
    if cu_seqlens is not None and len(q) != 1:
        raise ShapeError(where, "q", f"of {len(q)} rows", "of 1 row, which cu_seqlens cuts into sequences")
    if doubled and not raw_beta:
        must = "False without use_beta_sigmoid_in_kernel=True, which computes the beta that it doubles"
        raise OptionError(where, "allow_neg_eigval", True, must)
    for name in ("g", "A_log") if raw_gate else ():
        Arguments(where).needed(name, given[name] is not None, "use_gate_in_kernel makes the decay from it")
    batch, tokens, heads, head_v = v.shape
    states = (batch if cu_seqlens is None else len(cu_seqlens) - 1, heads, head_v, q.shape[-1])
    state = state if state is None or v_first else state.mT
    if raw_gate:
        A_log, dt_bias = A_log.float(), torch.zeros_like(A_log) if dt_bias is None else dt_bias
    gated = given["g"] is not None and given["beta"] is not None and raw_gate == raw_beta
    if "recurrent" in where and gated and cu_seqlens is None and tokens:
        if state is None:
            final = v.new_zeros(states, dtype=torch.float32)
        else:  # the operator writes its states
            final = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        q, k, v, a, b = (y if y.stride(-1) == 1 else y.contiguous() for y in (q, k, v, g, beta))
        A_log, dt_bias = (A_log, dt_bias) if raw_gate else (None, None)
        output, _ = gated_delta.gated_delta_rule_decode_pretranspose(
            q, k, v, final, A_log, a, dt_bias, b, scale, use_qk_l2norm=l2norm, allow_neg_eigval=doubled
        )
        return output, (final if v_first else final.mT) if keep else None
    if raw_gate:
        g = reference.decay(A_log, g, dt_bias)
    if raw_beta and beta is not None:
        beta = reference.write_strength(beta, allow_neg_eigval=doubled)
    final = v.new_empty(states, dtype=torch.float32) if keep else None
    output = gated_delta.chunk_gated_delta_rule(
        packed(q), packed(k), packed(v), None if g is None else packed(g).float(),
        None if beta is None else packed(beta).float(), scale, None if state is None else packed(state[None]),
        cu_seqlens=equal_lengths(batch, tokens, q.device) if cu_seqlens is None else cu_seqlens,
        use_qk_l2norm_in_kernel=l2norm, output_state=final, g_space="linear" if raw_gate else "log",
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output.unflatten(0, (batch, tokens)), final if final is None or v_first else final.mT


def causal_conv1d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool | None = False, activation: str | None = None,
    backend: str | None = "triton", cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None, cp_context: object = None, *, seq_idx: Tensor | None = None,
) -> Result:  # fmt: skip
    """From x ``[B, T, D]`` (or ``[B, T, H, D / H]``) and states ``[N, D, W]`` the same two, the latter or None.

    residual is added behind the activation; backend, cu_seqlens_cpu and chunk_indices change no result.
    """
    shapes = {"weight": "D W", "x": "B T D", "cu_seqlens": "?N+1"}
    shapes["initial_state"] = "?B D W" if cu_seqlens is None else "?N D W"
    judged("fla.causal_conv1d", {**locals(), "x": x.flatten(2)}, shapes)
    assert weight is not None
    rows = packed(x.flatten(2))
    cu_seqlens = equal_lengths(x.shape[0], x.shape[1], x.device) if cu_seqlens is None else cu_seqlens
    states = rows.new_zeros(len(cu_seqlens) - 1, *weight.shape) if initial_state is None else initial_state
    y = conv.convolved(rows[None], weight, bias, states[..., 1:].clone(), activation, cu_seqlens).view(x.shape)
    y = y if residual is None else y + residual
    if not output_final_state:
        return y, None
    kept, starts, _ = reference.extend(rows, states.mT.to(rows.dtype), cu_seqlens)
    last = starts[1:, None] + torch.arange(-weight.shape[1], 0, device=x.device)
    return y, kept[last].mT


def causal_conv1d_update(
    x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token a row, ``[N, D]``, ``[1, N, D]`` or ``[N, 1, D]``; cache ``[N, D, W]`` is written, and returned."""
    judged("fla.causal_conv1d_update", locals(), {"weight": "D W", "cache": "N D W"})
    assert weight is not None
    rows = (x.flatten(2) if x.dim() > 3 else x).flatten(0, -2)
    y = conv.causal_conv1d_update(rows, cache, weight, bias, activation).view(x.shape)
    return y if residual is None else y + residual, cache
