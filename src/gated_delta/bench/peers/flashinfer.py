"""FlashInfer's GDN operators, whose names and layouts ours share; gates are linear, states ``[V, K]``."""

from importlib import import_module

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, ours


def bind(case: Case, x: Inputs) -> Bound | None:
    """Its operator for several tokens takes fp32 states; bf16 ones go through the decode operator."""
    if case.heads[2:] != (128, 128):
        return None
    if case.operation == "prefill":
        return ours.prefill(import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule, case, x)
    bf16 = case.state == "bf16" and case.form not in ("K-major", "slots")
    if case.operation not in ("decode", "verify") or not (case.state == "fp32" or bf16):
        return None
    operators = import_module("flashinfer.gdn_decode")
    if case.operation == "verify" and bf16:
        return ours.recurrent(operators.gated_delta_rule_decode_pretranspose, case, x, state=None)
    return ours.recurrent(ours.operator_of(operators, case), case, x)
