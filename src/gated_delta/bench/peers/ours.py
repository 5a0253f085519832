"""Our own operators, as ``backend="auto"`` serves them, and FlashInfer's, whose names and layouts ours share (gates are
linear, states ``[V, K]``).
"""

from functools import partial
from importlib import import_module
from typing import Any

import gated_delta as gd
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, returning
from gated_delta.testing import oracle


def bind(case: Case, x: Inputs) -> Bound:
    if case.form.endswith(" core"):
        call = partial(x["layer"]._plain_rows, x["projected"], x["batch"], x["layer_state"], x["output"])
        return Bound(call, lambda: {"output": x["output"]})
    if case.operation == "layer":
        return returning(partial(x["layer"], x["hidden"], x["batch"], x["layer_state"]), lambda y: {"output": y})
    return calling(gd, case.operator, x)


def separate(case: Case, x: Inputs) -> Bound | None:
    """A layer's step by three operators and the copies between them."""
    return calling(gd, case.operator, {**x, "backend": "separate"}) if case.operation == "step" else None


def calling(operators: Any, name: str, x: Inputs) -> Bound:
    """One of our operators, or another of its name and signature, with the arguments that ours takes."""
    given = oracle.arguments(getattr(gd, name), x)
    return returning(partial(getattr(operators, name), **given), partial(oracle.results, name, given))


def flashinfer(case: Case, x: Inputs) -> Bound | None:
    """Its operator for several tokens takes fp32 states; bf16 ones go through the decode operator."""
    if case.heads[2:] != (128, 128):
        return None
    if case.operation == "prefill":
        return calling(import_module("flashinfer.gdn_prefill"), case.operator, x)
    bf16 = case.state == "bf16" and case.form not in ("K-major", "slots")
    if case.operation not in ("decode", "verify") or not (case.state == "fp32" or bf16):
        return None
    operator = "gated_delta_rule_decode_pretranspose" if case.operation == "verify" and bf16 else case.operator
    return calling(import_module("flashinfer.gdn_decode"), operator, x)
