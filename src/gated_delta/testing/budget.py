"""The error budget (docs/numerics.md): no hand-set tolerances.

A result is right when its error against a float64 evaluation is at most twice the error of a plain evaluation of the
same rule on the same inputs (token by token, fp32 arithmetic, rounded where a kernel must store) plus one ulp of the
dtype that it is stored in.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """One result judged."""

    name: str
    error: float
    budget: float

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.error <= self.budget


def relative_error(x: Tensor, exact: Tensor) -> float:
    """``||x - exact|| / ||exact||``, or ``||x||`` if exact is 0; infinite for another shape, NaN if x is anywhere."""
    if x.shape != exact.shape:
        return math.inf
    scale = exact.norm().item()
    return (x.detach().to(exact) - exact).norm().item() / (scale if scale > 0 else 1.0)


def judge(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> Verdict:
    """Judge ``actual`` by its own dtype; ``plain`` is rounded to that first, ``exact`` is float64."""
    allowed = 2 * relative_error(plain.to(actual.dtype), exact) + torch.finfo(actual.dtype).eps
    return Verdict(name, relative_error(actual, exact), allowed)


def assert_within_budget(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Raises:
    AssertionError: the error is over the budget, or a value is not finite.
    """
    verdict = judge(name, actual, plain, exact)
    if not verdict.within:
        raise AssertionError(f"{name}: error {verdict.error:.3e} is over its budget of {verdict.budget:.3e}")
