"""For the whole suite: one torch thread (workers share the cores), fresh memory that is poisoned, and Triton kernels
on a GPU where there is one, in Triton's interpreter where there is none.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import interpreter

    interpreter.install()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what long runs came to, whichever worker they were in."""
    passed = terminalreporter.getreports("passed")
    runs = [value for report in passed for name, value in report.user_properties if name == "long run"]
    if runs:
        seeds, steps = {seed for seed, _ in runs}, sum(steps for _, steps in runs)
        terminalreporter.write_line(f"long run: {steps} steps in {len(runs)} runs, seeds {min(seeds)} to {max(seeds)}")


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Calls are judged anew: tests put other things in the place of what was launched."""
    from gated_delta import plans  # noqa: PLC0415 (it registers operators, which takes a while)

    plans._PLANS.clear()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
