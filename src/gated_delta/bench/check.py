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
    part: tuple[int, Tensor] | None
    """Dimension and indices: the part of "output" that ``results`` holds; None for all."""
    words: str
    """What was compared, for the record."""


class Verdict(NamedTuple):
    """What checking gave."""

    ok: bool
    error: float
    words: str


def exact(case: Case, inputs: Inputs) -> Exact | None:
    """Evaluate in float64 before anything writes to the inputs; None for what has no reference (a whole layer is
    judged by ``gated-delta check``).
    """
    if case.operation == "prefill":
        return _exact_prefill(case, inputs)
    if case.operation in ("decode", "verify"):
        return _exact_recurrent(case, inputs)
    if case.operation == "conv":
        history = inputs["conv_states"].double().transpose(1, 2)
        extended = reference.extend(inputs["x"].double(), history, inputs["cu_seqlens"])
        output = reference.causal_conv1d(extended, inputs["weight"], None, "silu")
        window = extended.rows[extended.starts[1:, None] - torch.arange(3, 0, -1, device=output.device)]
        return Exact({"output": output, "state": window.transpose(1, 2)}, None, "float64")
    if case.operation == "norm":
        x, z, weight = inputs["x"], inputs["z"], inputs["weight"]
        output = reference.rms_norm_gated(x, z, weight, 1e-6, dtype=torch.float64)
        return Exact({"output": output}, None, "float64")
    return None


def _exact_prefill(case: Case, inputs: Inputs) -> Exact:
    """Every token for the first and the last group of heads, which share q and k: by chunks, so that it takes
    milliseconds where the token loop would take minutes.
    """
    heads, device = case.heads, inputs["q"].device
    ratio = heads.hv // heads.h
    groups = torch.tensor(sorted({0, heads.h - 1}), device=device)
    values = (groups[:, None] * ratio + torch.arange(ratio, device=device)).flatten()
    q, k = (inputs[name].index_select(1, groups) for name in "qk")
    v, log_alpha, beta, state = (
        inputs[name].index_select(1, values) for name in ("v", "log_alpha", "beta", "initial_state")
    )
    bounds = inputs["cu_seqlens"].tolist()
    spans = list(pairwise(bounds))
    found = reference.chunked(
        q, k, v, log_alpha.double().exp(), beta, heads.k**-0.5, state, spans, chunk=PREFILL_CHUNK, dtype=torch.float64
    )
    words = f"float64 on {len(values)} of {heads.hv} heads, the rest against a contender that is right"
    return Exact({"output": found.output, "state": found.state}, (1, values), words)


def _exact_recurrent(case: Case, inputs: Inputs) -> Exact:
    """The first rows, the last, and some between them, token by token."""
    rows = torch.linspace(0, case.batch - 1, min(ROWS, case.batch), device=inputs["q"].device).round().long()
    part = {name: inputs[name][rows] for name in ("q", "k", "v", "a", "b")}
    state = inputs["state"][inputs["slots"][rows].long()]
    if case.form == "K-major":
        state = state.transpose(-1, -2)
    found = oracle.recurrent(**part, state=state, A_log=inputs["A_log"], dt_bias=inputs["dt_bias"])
    results = {"output": found.output}
    if case.operation == "decode" or case.form == "final":
        results["state"] = found.state
    if case.form in ("snapshots", "slots"):
        results["kept"] = torch.stack(found.kept, 1)
    words = f"float64 on {len(rows)} of {case.batch} rows, the rest against a contender that is right"
    return Exact(results, (0, rows), words)


def judge(truth: Exact | None, results: Results, right: Results | None) -> Verdict:
    """Compare what a contender wrote with the truth, and all of it with ``right``, what a right one wrote before."""
    for name, x in results.items():
        if not torch.isfinite(x).all():
            return Verdict(False, float("nan"), f"{name} is not finite")
    if truth is None:
        return Verdict(True, float("nan"), "only that it is finite")
    worst, said = 0.0, ""
    for name, expected in truth.results.items():
        if name not in results:
            return Verdict(False, float("nan"), f"it gives no {name}")
        whole = results[name]
        own = whole if truth.part is None else whole.index_select(truth.part[0], truth.part[1])
        pairs = [(f"{name} against float64", own, expected)]
        if right is not None and truth.part is not None:
            pairs.append((f"{name} against a contender that is right", whole, right[name]))
        for words, actual, wanted in pairs:
            error = relative_error(actual, wanted)
            if not error <= worst:
                worst, said = error, words
    ok = worst <= TOLERANCE
    return Verdict(ok, worst, truth.words if ok else f"{said}: error {worst:.1e}, over {TOLERANCE:.0e}")


def relative_error(x: Tensor, expected: Tensor) -> float:
    """``||x - expected|| / ||expected||``, on their device."""
    if x.shape != expected.shape:
        return float("inf")
    return ((x.to(expected.dtype) - expected).norm() / expected.norm()).item()
