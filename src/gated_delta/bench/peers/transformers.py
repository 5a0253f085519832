"""The torch reference that Transformers runs where no kernels are installed."""

from __future__ import annotations

from importlib import import_module

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound
from gated_delta.bench.peers.fla import torch_reference

MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"


def bind(case: Case, x: Inputs) -> Bound | None:
    return torch_reference(lambda: import_module(MODULE).torch_chunk_gated_delta_rule, case, x)
