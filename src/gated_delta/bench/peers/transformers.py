"""The torch reference that Transformers runs where no kernels are installed: equal sequences as a batch."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, Contender, returning

PACKAGE = "transformers"
DISTRIBUTION = "transformers"
DEVICES = ("cpu",)

MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"


def contenders(case: Case, device: str) -> list[Contender]:
    if case.operation == "prefill" and len(set(case.lengths)) == 1:
        return [Contender("transformers (torch)", partial(_prefill, case))]
    return []


def _prefill(case: Case, x: Inputs) -> Bound:
    rows = len(case.lengths)
    q, k = (reference.expand_heads(x[name], case.heads.hv) for name in "qk")
    q, k, v, g, beta = (y.unflatten(0, (rows, -1)) for y in (q, k, x["v"], x["log_alpha"], x["beta"]))
    initial = x["initial_state"].transpose(-1, -2).contiguous()
    call = partial(
        import_module(MODULE).torch_chunk_gated_delta_rule,
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=initial,
        output_final_state=True,
    )
    return returning(call, lambda o, state: {"output": o.flatten(0, 1), "state": state.transpose(-1, -2)})
