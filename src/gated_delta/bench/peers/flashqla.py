"""FlashQLA's prefill: batch of one, logarithmic gates, states ``[V, K]`` on request."""

from __future__ import annotations

from importlib import import_module

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound
from gated_delta.bench.peers.fla import chunked


def bind(case: Case, x: Inputs) -> Bound | None:
    if case.operation != "prefill" or case.heads[2:] != (128, 128):
        return None
    return chunked(import_module("flash_qla").chunk_gated_delta_rule, x)
