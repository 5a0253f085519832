"""Whether a contender is right: all that it writes, against float64."""

from itertools import pairwise

import torch

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.testing import oracle
from gated_delta.testing.budget import relative_error
from gated_delta.testing.inputs import Inputs
from gated_delta.testing.oracle import Results

TOLERANCE = 1e-2
"""Largest relative error (Frobenius): inputs and some states are bf16, whose products err by a few 1e-3."""


def exact(case: Case, x: Inputs) -> Results:
    """A case in float64, before anything writes to its inputs; not a layer, which ``gated-delta check`` judges."""
    if case.operation == "layer":
        return {}
    if case.operation != "prefill":
        return {name: result.float() for name, result in oracle.evaluate(case.operator, x).items()}
    output, state, _ = reference.chunked(  # by chunks, which take milliseconds where the token loop would take minutes
        x["q"], x["k"], x["v"], x["g"].double(), x["beta"], case.heads.k**-0.5, x["initial_state"],
        list(pairwise(x["cu_seqlens"].tolist())), chunk=64, out=torch.empty_like(x["v"], dtype=torch.float32),
        dtype=torch.float64,
    )  # fmt: skip
    return {"output": output, "state": state.float()}


def judge(truth: Results, results: Results) -> tuple[float | None, str]:
    """The largest relative error of what a contender wrote, None if that is unknown, and what is wrong, if anything."""
    worst = None
    for name in (*truth, *(results.keys() - truth.keys())):
        if name not in results:
            return None, f"it gives no {name}"
        if not torch.isfinite(results[name]).all():
            return None, f"{name} is not finite"
        if name in truth:
            error = relative_error(results[name], truth[name])
            if not error <= TOLERANCE:
                return error, f"{name}: relative error {error:.1e}, over {TOLERANCE:.0e}"
            worst = max(error, worst or 0.0)
    return worst, ""
