"""Our own operators, as ``backend="auto"`` serves them, and FlashInfer's, whose names and layouts ours share (gates are
linear, states ``[V, K]``).
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

import gated_delta as gd
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, returning


def bind(case: Case, x: Inputs) -> Bound:
    if case.operation == "prefill":
        return prefill(gd.chunk_gated_delta_rule, case, x)
    if case.operation in ("decode", "verify"):
        return recurrent(operator_of(gd, case), case, x)
    if case.operation == "step":
        return _step(x, "auto")
    if case.form.endswith(" core"):
        call = partial(x["layer"]._plain_rows, x["projected"], x["batch"], x["layer_state"], x["output"])
        return Bound(call, lambda: {"output": x["output"]})
    if case.operation == "norm":
        call = partial(gd.rms_norm_gated, x["x"], x["z"], x["weight"], 1e-6)
    elif case.operation == "layer":
        call = partial(x["layer"], x["hidden"], x["batch"], x["layer_state"])
    else:
        given = {name: x[name] for name in ("x", "weight", "conv_states")} | {"state_indices": None}
        packed = {"cu_seqlens": x["cu_seqlens"], "has_initial_state": None}
        whole = case.form == "prefill"
        call = partial(gd.causal_conv1d, **given, **packed) if whole else partial(gd.causal_conv1d_update, **given)
    state = {"state": x["conv_states"]} if case.operation == "conv" else {}
    return returning(lambda: (call(),), lambda y: {"output": y, **state})


def separate(case: Case, x: Inputs) -> Bound | None:
    """A layer's step by three operators and the copies between them."""
    return _step(x, "separate") if case.operation == "step" else None


def _step(x: Inputs, backend: str) -> Bound:
    names = (*"qkvzba", "conv_states", "conv_weight", "state", "A_log", "dt_bias", "norm_weight", "tickets", "output")
    given = {name: x[name] for name in names} | {"state_indices": x["slots"]}
    call = partial(gd.gated_delta_net_step, **given, eps=1e-6, backend=backend)
    return Bound(call, lambda: {"output": x["output"], "state": x["state"], "window": x["conv_states"]})


def prefill(operator: Callable[..., Any], case: Case, x: Inputs) -> Bound:
    """By our ``chunk_gated_delta_rule`` or another of its signature."""
    names = ("q", "k", "v", "beta", "initial_state", "cu_seqlens", "output", "output_state")
    given = {name: x[name] for name in names}
    call = partial(operator, g=x["alpha"], output_final_state=True, max_seqlen=max(case.lengths), **given)
    return Bound(call, lambda: {"output": x["output"], "state": x["output_state"]})


def operator_of(operators: Any, case: Case) -> Callable[..., Any]:
    """Which operator of ours, or of others with our names, does a form of decode or verify."""
    if case.operation == "verify":
        return operators.gated_delta_rule_mtp
    if case.form == "K-major":
        return operators.gated_delta_rule_decode
    return operators.gated_delta_rule_decode_pretranspose


def recurrent(operator: Callable[..., Any], case: Case, x: Inputs, **more: Any) -> Bound:
    """A step by one of our operators or another of its signature; ``more`` are arguments that the other wants."""
    given = {name: x[name] for name in ("q", "k", "v", "A_log", "a", "dt_bias", "b")} | more
    if case.operation == "verify" or case.form == "pool":
        given |= {"initial_state": x["state"], "initial_state_indices": x["slots"]}
    if case.operation == "verify":
        given["disable_state_update"] = case.form in ("outputs", "snapshots")
        given |= {"intermediate_states_buffer": x["snapshots"]} if case.form == "snapshots" else {}
        given |= {"ssm_state_indices": x["token_slots"]} if case.form == "slots" else {}
    else:
        given["state"] = None if case.form == "pool" else x["state"]
    return Bound(partial(operator, **given, output=x["output"]), lambda: {"output": x["output"], **_states(case, x)})


def _states(case: Case, x: Inputs) -> dict[str, Tensor]:
    """What a case of decode or verify asks for beside the outputs, read from where the operators write it."""
    if case.form == "outputs":
        return {}
    if case.form == "snapshots":
        return {"kept": x["snapshots"]}
    if case.form == "slots":
        return {"kept": x["state"][x["token_slots"].flatten().long()].unflatten(0, x["token_slots"].shape)}
    return {"state": x["state"].transpose(-1, -2) if case.form == "K-major" else x["state"]}


def flashinfer(case: Case, x: Inputs) -> Bound | None:
    """Its operator for several tokens takes fp32 states; bf16 ones go through the decode operator."""
    if case.heads[2:] != (128, 128):
        return None
    if case.operation == "prefill":
        return prefill(import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule, case, x)
    bf16 = case.state == "bf16" and case.form not in ("K-major", "slots")
    if case.operation not in ("decode", "verify") or not (case.state == "fp32" or bf16):
        return None
    operators = import_module("flashinfer.gdn_decode")
    if case.operation == "verify" and bf16:
        return recurrent(operators.gated_delta_rule_decode_pretranspose, case, x, state=None)
    return recurrent(operator_of(operators, case), case, x)
