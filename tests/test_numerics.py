"""Limits that docs/numerics.md states, pinned so that the page stays true; gates at their ends."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.testing import oracle
from gated_delta.testing.budget import judge
from gated_delta.testing.inputs import BLIND_SPOTS


def test_stiff_chunks_need_float64_preparation() -> None:
    inputs = BLIND_SPOTS["similar keys, beta 2"]()
    plain, exact = (oracle.prefill(**inputs, dtype=dtype).state for dtype in (torch.float32, torch.float64))
    x, state, over = inputs, inputs["initial_state"], {}
    for prepare in (torch.float32, torch.float64):
        _, found, _ = reference.chunked(
            x["q"], x["k"], x["v"], x["g"].exp(), x["beta"], 1.0, state, [(0, 400)], prepare=prepare
        )
        verdict = judge("state", found, plain, exact)
        over[prepare] = verdict.error / verdict.budget
    assert over[torch.float64] < 1 < over[torch.float32]


@pytest.mark.parametrize("x", [-200.0, -100.0, -1.0, 0.0, 1.0, 100.0, 200.0])
@pytest.mark.parametrize(
    ("ours", "slope"),
    [
        (reference.softplus, torch.sigmoid),
        (reference.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
        (
            lambda x: reference.activate(x, "silu"),
            lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
        ),
    ],
    ids=["softplus", "sigmoid", "silu"],
)
def test_gradients_of_gates(x: float, ours: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> None:
    at = torch.tensor(x, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(at), at)
    torch.testing.assert_close(gradient, slope(at.detach()))


@pytest.mark.parametrize("A_log", [-110.0, 0.0, 100.0])
@pytest.mark.parametrize(("a", "dt_bias"), [(2e38, 2e38), (-2e38, -2e38), (-200.0, 0.0), (0.0, 200.0)])
def test_decay_is_never_nan(A_log: float, a: float, dt_bias: float) -> None:
    alpha = reference.decay(torch.tensor(A_log), torch.tensor(a), torch.tensor(dt_bias))
    assert 0 <= alpha <= 1
