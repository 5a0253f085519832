"""Whether a contender is right: against float64 on a part of each case, and against a right one on all of it."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.testing import oracle

TOLERANCE = 1e-2
"""Largest relative error (Frobenius): inputs and some states are bf16, whose products err by a few 1e-3."""
ROWS = 8
"""Rows of a step that are evaluated in float64."""
PREFILL_CHUNK = 64

Results = dict[str, Tensor]
"""What a contender wrote: "output" ``[..., HV, V]``, "state" and "kept" ``[..., V, K]`` in our layouts."""


class Exact(NamedTuple):
    """The float64 results of a part of a case."""

    results: Results
    dim: int = 0
    part: Tensor | None = None
    """Indices along ``dim``: the part of what a contender writes that ``results`` holds; None for all."""


class Verdict(NamedTuple):
    """What checking gave."""

    error: float | None
    """The largest relative one, if there is something to compare with."""
    fault: str = ""
    """What is wrong, "" if nothing."""


def exact(case: Case, x: Inputs) -> Exact:
    """Evaluate in float64 before anything writes to the inputs; nothing of a whole layer, which ``gated-delta check``
    judges.
    """
    if case.operation == "prefill":
        return _exact_prefill(case, x)
    if case.operation in ("decode", "verify"):
        return _exact_recurrent(case, x)
    if case.operation == "conv":
        extended = reference.extend(x["x"].double(), x["conv_states"].double().transpose(1, 2), x["cu_seqlens"])
        output = reference.causal_conv1d(extended, x["weight"], None, "silu")
        window = extended.rows[extended.starts[1:, None] - torch.arange(3, 0, -1, device=output.device)]
        return Exact({"output": output, "state": window.transpose(1, 2)})
    if case.operation == "norm":
        return Exact({"output": reference.rms_norm_gated(x["x"], x["z"], x["weight"], 1e-6, dtype=torch.float64)})
    return Exact({})


def _exact_prefill(case: Case, x: Inputs) -> Exact:
    """Every token for the first and the last group of heads, which share q and k: by chunks, so that it takes
    milliseconds where the token loop would take minutes.
    """
    heads, device = case.heads, x["q"].device
    ratio = heads.hv // heads.h
    groups = torch.tensor(sorted({0, heads.h - 1}), device=device)
    values = (groups[:, None] * ratio + torch.arange(ratio, device=device)).flatten()
    q, k = (x[name].index_select(1, groups) for name in "qk")
    v, log_alpha, beta, state = (
        x[name].index_select(1, values) for name in ("v", "log_alpha", "beta", "initial_state")
    )
    spans = list(pairwise(x["cu_seqlens"].tolist()))
    found = reference.chunked(
        q, k, v, log_alpha.double().exp(), beta, heads.k**-0.5, state, spans, chunk=PREFILL_CHUNK, dtype=torch.float64
    )
    return Exact({"output": found.output, "state": found.state}, 1, values)


def _exact_recurrent(case: Case, x: Inputs) -> Exact:
    """The first rows, the last, and some between them, token by token."""
    rows = torch.linspace(0, case.batch - 1, min(ROWS, case.batch), device=x["q"].device).round().long()
    state = x["state"][x["slots"][rows].long()]
    if case.form == "K-major":
        state = state.transpose(-1, -2)
    part = {name: x[name][rows] for name in ("q", "k", "v", "a", "b")}
    found = oracle.recurrent(**part, state=state, A_log=x["A_log"], dt_bias=x["dt_bias"])
    results = {"output": found.output}
    if case.form in ("snapshots", "slots"):
        results["kept"] = torch.stack(found.kept, 1)
    elif case.form != "outputs":
        results["state"] = found.state
    return Exact(results, 0, rows)


def judge(truth: Exact, results: Results, right: Results | None = None) -> Verdict:
    """Compare what a contender wrote with the truth, and all of it with ``right``, what a right one wrote before."""
    for name in (*truth.results, *results):
        if name not in results:
            return Verdict(None, f"it gives no {name}")
        if not torch.isfinite(results[name]).all():
            return Verdict(None, f"{name} is not finite")
    errors: dict[str, float] = {}
    for name, expected in truth.results.items():
        own = results[name] if truth.part is None else results[name].index_select(truth.dim, truth.part)
        errors[f"{name} against float64"] = relative_error(own, expected)
        if right is not None and truth.part is not None:
            errors[f"{name} against a contender that is right"] = relative_error(results[name], right[name])
    if not errors:
        return Verdict(None)
    worst = max(errors, key=errors.__getitem__)
    wrong = f"{worst}: error {errors[worst]:.1e}, over {TOLERANCE:.0e}"
    return Verdict(errors[worst], wrong if errors[worst] > TOLERANCE else "")


def relative_error(x: Tensor, expected: Tensor) -> float:
    """``||x - expected|| / ||expected||``, on their device."""
    if x.shape != expected.shape:
        return float("inf")
    return ((x.to(expected.dtype) - expected).norm() / expected.norm()).nan_to_num(nan=torch.inf).item()
