"""Our own operators, as ``backend="auto"`` serves them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import OURS, Bound, Contender, returning

PACKAGE = None
DISTRIBUTION = "gated-delta"
DEVICES = ("cpu", "cuda")

RECURRENT = ("q", "k", "v", "A_log", "a", "dt_bias", "b")


def contenders(case: Case, device: str) -> list[Contender]:
    of_rule = {"prefill": prefill_with, "decode": decode_with, "verify": verify_with}
    if case.operation in of_rule:
        return [Contender(OURS, partial(of_rule[case.operation], gd, case))]
    found = [Contender(OURS, partial({"conv": _conv, "norm": _norm, "layer": _layer}[case.operation], case))]
    return found if case.operation != "layer" else [*found, *_parts(case)]


def prefill_with(operators: Any, case: Case, x: Inputs) -> Bound:
    """By ``operators.chunk_gated_delta_rule``, ours or another of its signature."""
    names = ("q", "k", "v", "beta", "initial_state", "cu_seqlens", "output", "output_state")
    call = partial(
        operators.chunk_gated_delta_rule, g=x["alpha"], output_final_state=True, max_seqlen=max(case.lengths),
        **{name: x[name] for name in names},
    )  # fmt: skip
    return Bound(call, lambda: {"output": x["output"], "state": x["output_state"]})


def recurrent_results(case: Case, x: Inputs, output: Tensor) -> dict[str, Tensor]:
    """What a case of decode or verify asks for, read from where the operators write it."""
    results, state = {"output": output}, x["state"]
    if case.operation == "decode" or case.form == "final":
        results["state"] = state.transpose(-1, -2) if case.form == "K-major" else state
    if case.form == "snapshots":
        results["kept"] = x["snapshots"]
    if case.form == "slots":
        results["kept"] = state[x["token_slots"].flatten().long()].unflatten(0, x["token_slots"].shape)
    return results


def decode_with(operators: Any, case: Case, x: Inputs) -> Bound:
    """By ``operators.gated_delta_rule_decode`` and ``.._pretranspose``, ours or others of their signatures."""
    given: dict[str, Any] = {name: x[name] for name in RECURRENT}
    if case.form == "V-major allocated":
        call = partial(operators.gated_delta_rule_decode_pretranspose, **given, state=x["state"])
        return returning(call, lambda output, _: recurrent_results(case, x, output))
    given["output"] = x["output"]
    if case.form == "K-major":
        call = partial(operators.gated_delta_rule_decode, **given, state=x["state"])
    elif case.form == "pool":
        pool = {"state": None, "initial_state": x["state"], "initial_state_indices": x["slots"]}
        call = partial(operators.gated_delta_rule_decode_pretranspose, **given, **pool)
    else:
        call = partial(operators.gated_delta_rule_decode_pretranspose, **given, state=x["state"])
    return Bound(call, lambda: recurrent_results(case, x, x["output"]))


def verify_with(operators: Any, case: Case, x: Inputs) -> Bound:
    """By ``operators.gated_delta_rule_mtp``, ours or another of its signature."""
    given = {name: x[name] for name in (*RECURRENT, "output")}
    return Bound(
        partial(operators.gated_delta_rule_mtp, **given, **verify_options(case, x)),
        lambda: recurrent_results(case, x, x["output"]),
    )


def verify_options(case: Case, x: Inputs) -> dict[str, Any]:
    """The pool, and the options that make a form of verification."""
    options = {"initial_state": x["state"], "initial_state_indices": x["slots"]}
    options["disable_state_update"] = case.form in ("outputs", "snapshots")
    if case.form == "snapshots":
        options["intermediate_states_buffer"] = x["snapshots"]
    if case.form == "slots":
        options["ssm_state_indices"] = x["token_slots"]
    return options


def _conv(case: Case, x: Inputs) -> Bound:
    if case.form == "prefill":
        call = partial(
            gd.causal_conv1d, x["x"], x["weight"], conv_states=x["conv_states"], cu_seqlens=x["cu_seqlens"],
            state_indices=None, has_initial_state=None,
        )  # fmt: skip
    else:
        call = partial(gd.causal_conv1d_update, x["x"], x["conv_states"], x["weight"], state_indices=None)
    return returning(lambda: (call(),), lambda y: {"output": y, "state": x["conv_states"]})


def _norm(case: Case, x: Inputs) -> Bound:
    call = partial(gd.rms_norm_gated, x["x"], x["z"], x["weight"], 1e-6)
    return returning(lambda: (call(),), lambda y: {"output": y})


def _layer(case: Case, x: Inputs) -> Bound:
    call = partial(x["layer"], x["hidden"], x["batch"], x["layer_state"])
    return returning(lambda: (call(),), lambda y: {"output": y})


def _parts(case: Case) -> list[Contender]:
    """What a layer consists of, each alone: its matrix products, convolution, rule with its gates, and norm."""

    def bind(part: str, x: Inputs) -> Bound:
        layer, batch, state = x["layer"], x["batch"], x["layer_state"]
        p = layer.project(x["hidden"])
        core, weight = torch.empty_like(p.z), layer.conv1d.weight[:, 0]
        slots = batch.non_spec_state_indices

        def products() -> object:
            return layer.project(x["hidden"]), layer.out_proj(core.flatten(1))

        def conv() -> object:
            if case.form == "decode":
                return gd.causal_conv1d_update(p.qkv, state.conv, weight, state_indices=slots)
            return gd.causal_conv1d(
                p.qkv, weight, conv_states=state.conv, cu_seqlens=batch.non_spec_query_start_loc, state_indices=slots,
                has_initial_state=batch.has_initial_state,
            )  # fmt: skip

        def conv_and_rule() -> object:
            return layer._plain_rows(p.qkv, p.a, p.b, batch, state, core)

        def norm() -> object:
            return gd.rms_norm_gated(core, p.z, layer.norm.weight, layer.config.norm_eps, layer.config.output_gate)

        core.copy_(p.z)
        calls = {"products": products, "conv": conv, "conv + rule": conv_and_rule, "norm": norm}
        return Bound(calls[part], lambda: {"output": core})

    return [Contender(f"of it: {part}", partial(bind, part)) for part in ("products", "conv", "conv + rule", "norm")]
