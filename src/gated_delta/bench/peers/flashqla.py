"""FlashQLA's prefill: batch of one, logarithmic gates, states ``[V, K]`` on request."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, Contender
from gated_delta.bench.peers.fla import chunked

PACKAGE = "flash_qla"
DISTRIBUTION = "flash-qla"
DEVICES = ("cuda",)


def contenders(case: Case, device: str) -> list[Contender]:
    if case.operation != "prefill" or (case.heads.k, case.heads.v) != (128, 128):
        return []
    return [Contender("flashqla", partial(_prefill, case))]


def _prefill(case: Case, x: Inputs) -> Bound:
    return chunked(import_module("flash_qla").chunk_gated_delta_rule, x)
