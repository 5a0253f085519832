"""What stands around the rule in a prefill: channels in groups of a key head, gates, padding in the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta import reference
from gated_delta.errors import DtypeError, OptionError, ShapeError
from gated_delta.prefill import gates
from gated_delta.testing.budget import assert_within_budget
from helpers import DEVICE, nans, normal, same_bits, starts

pytest.importorskip("triton")
LENGTHS = (3, 0, 1, 20, 2, 0, 4)
SLOTS = (5, 2, 9, 0, 7, 4, 3)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("heads", "head_k", "values"), [(2, 32, 96), (3, 5, 7), (1, 8, 8)])
def test_channels_in_groups_of_a_key_head(backend: str, heads: int, head_k: int, values: int) -> None:
    """As interleaved projections give them, each group in front of what belongs to others: the same as flat."""
    device, group = DEVICE if backend == "triton" else "cpu", 2 * head_k + values
    x = nans(34, heads, group + 16)
    x[..., :group] = normal(34, heads, group)
    x = x.to(device)[..., :group]
    q, k, v = x.split((head_k, head_k, values), dim=-1)
    flat, results = torch.cat([y.flatten(1) for y in (q, k, v)], dim=-1), []
    for given, size in ((flat, 0), (x, head_k)):
        states = normal(11, heads * group, 3, seed=9).to(device)
        weight, bias = normal(heads * group, 4, seed=1).to(device), normal(heads * group, seed=2).to(device)
        y = gd.causal_conv1d(
            given, weight, bias, conv_states=states, cu_seqlens=starts(LENGTHS).to(device), head_k=size,
            state_indices=torch.tensor(SLOTS, device=device), has_initial_state=None, backend=backend,
        )  # fmt: skip
        results.append((y, states))
    assert results[1][0].shape == (34, heads * group)
    assert torch.equal(results[1][0], results[0][0])
    assert same_bits(results[1][1], results[0][1])


@pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)  # where unused
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gates(backend: str, dtype: torch.dtype, negative: bool) -> None:
    """More than a program takes, out of interleaved projections, and as extreme as 16 bits are."""
    device = DEVICE if backend == "triton" else "cpu"
    ba = normal(700, 3, 4, dtype=dtype) * torch.tensor([1.0, 1e-3, 20.0, 1e4], dtype=dtype)
    A_log, dt_bias = torch.linspace(-4, 3, 6), normal(6, seed=1)
    a, b = ba[..., 2:], ba[..., :2]
    given = [y.to(device) for y in (A_log, a, dt_bias, b)]
    found = gates(*given, allow_neg_eigval=negative, backend=backend)
    rows = a.flatten(1), b.flatten(1)
    for name, x, evaluate in (
        ("log alpha", found[0], lambda dtype: reference.log_decay(A_log, rows[0], dt_bias, dtype=dtype)),
        ("beta", found[1], lambda dtype: reference.write_strength(rows[1], allow_neg_eigval=negative, dtype=dtype)),
    ):
        assert x.dtype == torch.float32
        assert_within_budget(name, x.cpu(), evaluate(torch.float32), evaluate(torch.float64))
        torch.testing.assert_close(x.cpu().double(), evaluate(torch.float64), rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"A_log": torch.zeros(5)}, ShapeError, r"gates: A_log is of shape \[5\]; it must be \[HV\] with HV=6"),
        ({"A_log": torch.zeros(6).double()}, DtypeError, "gates: A_log is float64"),
        ({"dt_bias": torch.zeros(7)}, ShapeError, r"gates: dt_bias is of shape \[7\]"),
        ({"a": torch.zeros(8, 6)}, ShapeError, r"gates: a is of shape \[8, 6\]"),
        ({"b": torch.zeros(7, 3, 2)}, ShapeError, r"gates: b is of shape \[7, 3, 2\]"),
        ({"b": None}, DtypeError, "gates: b is None; it must be a tensor"),
        ({"allow_neg_eigval": 2}, DtypeError, "gates: allow_neg_eigval is a int; it must be True or False"),
    ],
)
def test_gates_that_cannot_be(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"A_log": torch.zeros(6), "dt_bias": torch.zeros(6)}
    given |= {"a": torch.zeros(8, 3, 2), "b": torch.zeros(8, 3, 2)}
    with pytest.raises(error, match=message):
        gates(**(given | changed))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_norm_of_padding_is_zero_whatever_the_gate(backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    x, z = normal(5, 64).to(device), normal(5, 64, seed=1).to(device)
    x[3], z[3], x[1, :7], x[2, 9] = 0.0, torch.nan, 0.0, torch.nan
    y = gd.rms_norm_gated(x, z, torch.ones(64, device=device), 1e-6, backend=backend)
    assert not y[3].any() and not y[1, :7].any()
    assert y[2].isnan().all()  # of a row that is no padding nothing is hidden


@pytest.mark.parametrize(
    ("head_k", "error", "message"),
    [
        (4, OptionError, "head_k is 4; it must be below half of the 8 channels of a group of x"),
        (-1, OptionError, "head_k is -1; it must be at least 0"),
        (0, ShapeError, "x is"),
    ],
)
def test_groups_that_cannot_be(head_k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gd.causal_conv1d(
            torch.ones(3, 2, 8), torch.ones(16, 4), conv_states=None, cu_seqlens=starts([3]), state_indices=None,
            has_initial_state=None, head_k=head_k,
        )  # fmt: skip
