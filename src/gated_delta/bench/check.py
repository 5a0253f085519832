"""Whether a contender is right: all that it writes, against float64."""

from itertools import pairwise

import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.testing import oracle
from gated_delta.testing.budget import relative_error

TOLERANCE = 1e-2
"""Largest relative error (Frobenius): inputs and some states are bf16, whose products err by a few 1e-3."""
AT_ONCE = 1 << 8
"""Rows times heads of a step evaluated together: what float64 takes must fit beside the rest."""

Results = dict[str, Tensor]
"""What a contender wrote: "output" ``[..., HV, V]``, "state" and "kept" ``[..., V, K]`` in our layouts."""


def exact(case: Case, x: Inputs) -> Results:
    """A case in float64, before anything writes to its inputs; not a layer, which ``gated-delta check`` judges."""
    rules = {"prefill": _prefill, "decode": _recurrent, "verify": _recurrent, "step": _step}
    if case.operation in rules:
        return rules[case.operation](case, x)
    if case.operation == "conv":
        return _convolved(x["x"], x["conv_states"], x["weight"], x["cu_seqlens"])
    if case.operation == "norm":
        return {"output": reference.rms_norm_gated(x["x"], x["z"], x["weight"], 1e-6, dtype=torch.float64)}
    return {}


def _convolved(x: Tensor, conv_states: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Results:
    extended = reference.extend(x.double(), conv_states.double().transpose(1, 2), cu_seqlens)
    output = reference.causal_conv1d(extended, weight, None, "silu")
    window = extended.rows[extended.starts[1:, None] - torch.arange(3, 0, -1, device=output.device)]
    return {"output": output, "state": window.transpose(1, 2)}


def _step(case: Case, x: Inputs) -> Results:
    """The parts one after the other, nothing rounded between them."""
    inputs, starts = torch.cat([x[name].flatten(1) for name in "qkv"], -1), torch.arange(case.batch + 1)
    mixed = _convolved(inputs, x["conv_states"], x["conv_weight"], starts.to(inputs.device))
    keys = case.heads.h * case.heads.k
    parts = mixed["output"][:, None].split((keys, keys, case.heads.hv * case.heads.v), dim=-1)
    sizes = zip("qkv", parts, (case.heads.k, case.heads.k, case.heads.v), strict=True)
    heads = {name: y.unflatten(-1, (-1, size)) for name, y, size in sizes}
    found = _recurrent(case, x | heads | {name: x[name].flatten(1)[:, None] for name in "ab"})
    gate, weight = x["z"].flatten(1, 2), x["norm_weight"]
    normed = reference.rms_norm_gated(found["output"][:, 0], gate, weight, 1e-6, dtype=torch.float64)
    return {"output": normed, "state": found["state"], "window": mixed["state"]}


def _prefill(case: Case, x: Inputs) -> Results:
    """By chunks, which take milliseconds where the token loop would take minutes."""
    spans, decay = list(pairwise(x["cu_seqlens"].tolist())), x["log_alpha"].double().exp()
    found = reference.chunked(
        x["q"], x["k"], x["v"], decay, x["beta"], case.heads.k**-0.5, x["initial_state"], spans, chunk=64,
        out=torch.empty_like(x["v"], dtype=torch.float32), dtype=torch.float64,
    )  # fmt: skip
    return {"output": found.output, "state": found.state.float()}


def _recurrent(case: Case, x: Inputs) -> Results:
    """Token by token, a few rows at a time."""
    found = []
    few = max(1, AT_ONCE // case.heads.hv)
    for rows in torch.arange(case.batch, device=x["q"].device).split(few):
        state = x["state"][x["slots"][rows].long()]
        state = state.transpose(-1, -2) if case.form == "K-major" else state
        part = {name: x[name][rows] for name in ("q", "k", "v", "a", "b")}
        output, final, kept = oracle.recurrent(**part, state=state, A_log=x["A_log"], dt_bias=x["dt_bias"])
        wanted = torch.stack(kept, 1) if case.form in ("snapshots", "slots") else final
        found.append((output.float(), wanted.float()))
    output, state = (torch.cat(parts) for parts in zip(*found, strict=True))
    if case.form == "outputs":
        return {"output": output}
    return {"output": output, "kept" if case.form in ("snapshots", "slots") else "state": state}


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
