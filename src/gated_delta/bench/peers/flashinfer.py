"""FlashInfer's GDN operators, whose names and layouts ours share; gates are linear, states ``[V, K]``."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, Contender
from gated_delta.bench.peers.ours import (
    RECURRENT,
    decode_with,
    prefill_with,
    recurrent_results,
    verify_options,
    verify_with,
)

PACKAGE = "flashinfer"
DISTRIBUTION = "flashinfer-python"
DEVICES = ("cuda",)


def contenders(case: Case, device: str) -> list[Contender]:
    if (case.heads.k, case.heads.v) != (128, 128):
        return []
    bind = {"prefill": _prefill, "decode": _decode, "verify": _verify}.get(case.operation)
    served = case.operation == "prefill" or (
        case.state == "fp32" or (case.state == "bf16" and case.form not in ("K-major", "slots"))
    )
    return [Contender("flashinfer", partial(bind, case))] if bind is not None and served else []


def _prefill(case: Case, x: Inputs) -> Bound:
    return prefill_with(import_module("flashinfer.gdn_prefill"), case, x)


def _decode(case: Case, x: Inputs) -> Bound:
    return decode_with(import_module("flashinfer.gdn_decode"), case, x)


def _verify(case: Case, x: Inputs) -> Bound:
    """Its operator for several tokens takes fp32 states; bf16 ones go through the decode operator."""
    gdn_decode = import_module("flashinfer.gdn_decode")
    if case.state == "fp32":
        return verify_with(gdn_decode, case, x)
    given = {name: x[name] for name in (*RECURRENT, "output")}
    call = partial(gdn_decode.gated_delta_rule_decode_pretranspose, **given, state=None, **verify_options(case, x))
    return Bound(call, lambda: recurrent_results(case, x, x["output"]))
