"""flash-linear-attention: its Triton kernels on a GPU, its torch reference on a CPU. Logarithmic gates, a batch of one
for packed sequences, states ``[V, K]`` on request. FlashQLA's prefill and Transformers' reference have its signatures.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, returning

os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its own kernels, not FlashQLA's, which stand apart
RULE = "fla.ops.gated_delta_rule"
TRANSFORMERS = "transformers.models.qwen3_next.modeling_qwen3_next"


def bind(case: Case, x: Inputs) -> Bound | None:
    if not on_gpu(x):
        return torch_reference(lambda: import_module(f"{RULE}.naive").naive_chunk_gated_delta_rule, case, x)
    if case.operation == "prefill":
        return chunked(import_module(RULE).chunk_gated_delta_rule, x)
    if case.operation == "norm":
        norm = import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
        call = partial(norm, x["x"], x["z"], x["weight"], None, activation="swish", eps=1e-6)
        return returning(call, lambda y: {"output": y})
    if case.operation == "conv" and case.form == "prefill":
        return _conv(x)
    return _recurrent(case, x) if case.form in ("V-major", "K-major", "final") and case.state == "fp32" else None


def flashqla(case: Case, x: Inputs) -> Bound | None:
    """FlashQLA's prefill, for head size 128."""
    if case.operation != "prefill" or case.heads[2:] != (128, 128):
        return None
    return chunked(import_module("flash_qla").chunk_gated_delta_rule, x)


def transformers(case: Case, x: Inputs) -> Bound | None:
    """The torch reference that Transformers runs where no kernels are installed."""
    return torch_reference(lambda: import_module(TRANSFORMERS).torch_chunk_gated_delta_rule, case, x)


def on_gpu(x: Inputs) -> bool:
    return any(isinstance(y, torch.Tensor) and y.is_cuda for y in x.values())


def chunked(operator: Callable[..., Any], x: Inputs) -> Bound:
    """Prefill as FLA's signature has it, which FlashQLA shares."""
    q, k, v, g, beta = (x[name][None] for name in ("q", "k", "v", "log_g", "beta"))
    call = partial(
        operator, q, k, v, g, beta, initial_state=x["initial_state"], output_final_state=True, state_v_first=True,
        cu_seqlens=x["cu_seqlens"],
    )  # fmt: skip
    return returning(call, lambda output, state: {"output": output[0], "state": state})


def _recurrent(case: Case, x: Inputs) -> Bound:
    turned, state = case.form == "K-major", x["initial_state" if case.operation == "verify" else "state"]
    call = partial(
        import_module(RULE).fused_recurrent_gated_delta_rule, x["q"], x["k"], x["v"], g=x["a"], beta=x["b"],
        A_log=x["A_log"], dt_bias=x["dt_bias"], use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        use_qk_l2norm_in_kernel=True, initial_state=state, output_final_state=True, state_v_first=not turned,
    )  # fmt: skip
    return returning(call, lambda o, state: {"output": o, "state": state.transpose(-1, -2) if turned else state})


def _conv(x: Inputs) -> Bound:
    states = torch.nn.functional.pad(x["conv_states"], (1, 0))  # as many columns as taps; the first is not read
    call = partial(
        import_module("fla.modules.causal_conv1d.ops").causal_conv1d, x["x"][None], x["weight"], initial_state=states,
        output_final_state=True, activation="silu", cu_seqlens=x["cu_seqlens"],
    )  # fmt: skip
    return returning(call, lambda y, state: {"output": y[0], "window": state[..., 1:]})


def torch_reference(load: Callable[[], Callable[..., Any]], case: Case, x: Inputs) -> Bound | None:
    """FLA's prefill in torch, whose signature Transformers shares: equal sequences, heads repeated, ``[K, V]``."""
    if case.operation != "prefill" or len(set(case.lengths)) > 1:
        return None
    q, k = (reference.expand_heads(x[name], case.heads.hv) for name in "qk")
    given = (y.unflatten(0, (len(case.lengths), -1)) for y in (q, k, x["v"], x["log_g"], x["beta"]))
    initial = x["initial_state"].transpose(-1, -2).contiguous()
    call = partial(load(), *given, initial_state=initial, output_final_state=True)
    return returning(call, lambda o, state: {"output": o.flatten(0, 1), "state": state.transpose(-1, -2)})
