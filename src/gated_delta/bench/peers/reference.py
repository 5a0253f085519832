"""The rule in plain torch on the CPU: token by token, and by chunks as the CPU backend does it but all in fp32."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.bench.peers import Bound, Contender, returning
from gated_delta.testing import oracle

PACKAGE = None
DISTRIBUTION = None
DEVICES = ("cpu",)

MOST_TOKENS = 4096
"""Of a sequence: a loop over more takes minutes."""


def contenders(case: Case, device: str) -> list[Contender]:
    if case.operation == "prefill" and max(case.lengths) <= MOST_TOKENS:
        return [Contender("token loop", partial(_loop, case)), Contender("chunks in fp32", partial(_chunks, case))]
    if case.operation in ("decode", "verify") and case.form in ("V-major", "pool", "final"):
        return [Contender("token loop", partial(_steps, case))]
    return []


def _loop(case: Case, x: Inputs) -> Bound:
    names = ("q", "k", "v", "beta", "initial_state", "cu_seqlens")
    call = partial(oracle.prefill, g=x["alpha"], **{name: x[name] for name in names}, dtype=torch.float32)
    return returning(call, _results)


def _chunks(case: Case, x: Inputs) -> Bound:
    spans, scale = list(pairwise(x["cu_seqlens"].tolist())), case.heads.k**-0.5
    given = [x[name] for name in ("q", "k", "v", "alpha", "beta")]
    return returning(partial(reference.chunked, *given, scale, x["initial_state"], spans), _results)


def _steps(case: Case, x: Inputs) -> Bound:
    names = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
    call = partial(oracle.recurrent, **{name: x[name] for name in names}, dtype=torch.float32)

    def step() -> oracle.Evaluation:
        found = call()
        x["state"].copy_(found.state)
        return found

    return returning(step, _results)


def _results(output: Tensor, state: Tensor, *_: object) -> dict[str, Tensor]:
    return {"output": output, "state": state}
