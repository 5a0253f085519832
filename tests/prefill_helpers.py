"""What the tests of prefill on GPUs share: calls, the judge, and inputs that friendly data would not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gated_delta import library, plans
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, to_device
from helpers import DEVICE, prefill


def spread(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """An index tensor with a stride, on the device."""
    return torch.tensor(values, dtype=dtype, device=DEVICE).repeat_interleave(3)[::3]


def serve(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let this module's ``prefill`` serve the calls of any backend, each judged anew. (The operators keep what they
    have looked up, and plans what was launched.)
    """
    others = library._implementation
    monkeypatch.setattr(plans, "TensorGuards", None)
    monkeypatch.setattr(
        library,
        "_implementation",
        lambda operator, name: getattr(backend, operator, None) if "prefill" in operator else others(operator, name),
    )


def run(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and final state, on the CPU."""
    output, state = prefill(to_device({**inputs, **options}, DEVICE), backend="triton")
    return output.cpu(), state.cpu()


def rounded(inputs: Inputs, every: int = 0) -> oracle.Evaluation:
    """The plain evaluation with what tensor cores multiply rounded to the activations' dtype."""
    return oracle.prefill(**inputs, checkpoint_every_n_tokens=every, dtype=torch.float32, operands=inputs["q"].dtype)


def assert_right(inputs: Inputs, output: Tensor, state: Tensor) -> None:
    plain, exact = rounded(inputs), oracle.prefill(**inputs)
    assert_within_budget("output", output.cpu(), plain.output, exact.output)
    assert_within_budget("state", state.cpu(), plain.state, exact.state)


def every_fifth(inputs: Inputs, name: str, *values: float) -> Inputs:
    changed = inputs[name].clone()
    for i, row in enumerate(range(2, len(changed), 5)):
        changed[row] = values[i % len(values)]
    return {**inputs, name: changed}


def constant(inputs: Inputs, name: str, value: float) -> Inputs:
    return {**inputs, name: torch.full_like(inputs[name], value)}


def unit(inputs: Inputs, factor: float) -> Inputs:
    """Q and k of another length, for the operator to normalise."""
    return {**inputs, **{name: inputs[name] * factor for name in "qk"}, "use_qk_l2norm_in_kernel": True}
