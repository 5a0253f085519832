"""The rule token by token in plain torch, in fp32 on the CPU."""

from functools import partial

import torch

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, returning
from gated_delta.testing import oracle

MOST_TOKENS = 4096
"""Of a sequence: a loop over more takes minutes."""


def bind(case: Case, x: Inputs) -> Bound | None:
    if case.operation == "prefill" and max(case.lengths) <= MOST_TOKENS:
        given = {name: x[name] for name in ("q", "k", "v", "beta", "initial_state", "cu_seqlens")}
        loop = partial(oracle.prefill, g=x["alpha"], **given, dtype=torch.float32)
        return returning(loop, lambda output, state, _: {"output": output, "state": state})
    if case.form not in ("V-major", "pool", "final"):
        return None

    def step() -> oracle.Evaluation:
        given = {name: x[name] for name in ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")}
        found = oracle.recurrent(**given, dtype=torch.float32)
        x["state"].copy_(found.state)
        return found

    return returning(step, lambda output, state, _: {"output": output, "state": state})
