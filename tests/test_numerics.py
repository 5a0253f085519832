"""Limits that docs/numerics.md states, pinned so that the page stays true."""

import torch

from gated_delta import reference
from gated_delta.testing import oracle
from gated_delta.testing.budget import relative_error
from gated_delta.testing.inputs import prefill_inputs


def test_stiff_chunks_lose_what_the_page_says() -> None:
    inputs = prefill_inputs([200], gates="weak", similar_keys=True)
    inputs["beta"] = 1.9 + 0.1 * inputs["beta"]
    exact = oracle.prefill(**inputs).state
    state, gates = torch.zeros(exact.shape), (inputs["g"].exp(), inputs["beta"])
    errors = {}
    for dtype in (torch.float32, torch.float64):
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        result = reference.chunked(q, k, v, *gates, 1.0, state, [(0, 200)], dtype=dtype)
        errors[dtype] = relative_error(result.state, exact)
    assert 1e-6 < errors[torch.float32] < 4e-6
    assert errors[torch.float64] < 1e-6  # g.exp() is fp32 here, so this is the gates' rounding
