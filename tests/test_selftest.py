"""Every operator and the layer inside the error budget, on friendly inputs and on the known blind spots."""

import pytest

from gated_delta.testing.selftest import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}: {case.name}")
def test_within_budget(case: Case) -> None:
    over = [verdict for verdict in case.run("cpu") if not verdict.within]
    assert not over, over
