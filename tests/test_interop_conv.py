"""``gated_delta.interop.conv`` against the convolution's definition, through causal-conv1d's own arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from gated_delta.errors import ArgumentError
from gated_delta.interop.conv import causal_conv1d_fn, causal_conv1d_update
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import normal, same_bits, starts

WIDTH = 4


def test_signatures_are_theirs() -> None:
    """Of causal-conv1d 1.7.0."""
    names = "x weight bias seq_idx initial_states return_final_states final_states_out activation"
    assert " ".join(inspect.signature(causal_conv1d_fn).parameters) == names
    names = "x conv_state weight bias activation cache_seqlens conv_state_indices"
    assert " ".join(inspect.signature(causal_conv1d_update).parameters) == names


def assert_convolved(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, act: Any) -> None:
    """``y [B, D, T]`` is what x gives after ``history [B, D, W-1]``."""
    rows, _, tokens = x.shape
    given = (x.mT.flatten(0, 1), weight, bias, history.mT, starts([tokens] * rows), act)
    plain, exact = (oracle.conv(*given, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert_within_budget("y", y.mT.flatten(0, 1), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("rows", "tokens"), [(3, 1), (3, 2), (1, 9), (3, 9)])
def test_prefill(dtype: torch.dtype, channels_last: bool, activation: str | None, rows: int, tokens: int) -> None:
    x = normal(rows, 8, tokens, dtype=dtype)
    x = x.mT.contiguous().mT if channels_last else x
    weight, bias = normal(8, WIDTH, seed=1), normal(8, seed=2)
    nothing, some = torch.zeros(rows, 8, WIDTH - 1), normal(rows, 8, WIDTH - 1, seed=3, dtype=dtype)
    y = causal_conv1d_fn(x, weight, activation=activation)
    assert isinstance(y, Tensor)
    assert_convolved(y, x, weight, None, nothing, activation)
    kept = some.clone()
    y, final = causal_conv1d_fn(x, weight, bias, None, some, True, activation=activation)
    assert_convolved(y, x, weight, bias, some, activation)
    assert same_bits(some, kept)
    assert same_bits(final, torch.cat((some, x), -1)[..., -WIDTH + 1 :])
    given = torch.full_like(some, torch.nan)
    y, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=given)
    assert final is given
    assert same_bits(final, torch.cat((nothing.to(dtype), x), -1)[..., -WIDTH + 1 :])


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("tokens", [None, 1, 2, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_update(columns: int, tokens: int | None, activation: str | None) -> None:
    x = normal(3, 8) if tokens is None else normal(3, 8, tokens)
    weight, bias, state = normal(8, WIDTH, seed=1), normal(8, seed=2), normal(3, 8, columns, seed=3)
    before = state.clone()
    y = causal_conv1d_update(x, state, weight, bias, activation)
    assert y.shape == x.shape
    new = x[..., None] if tokens is None else x
    assert_convolved(y.view(new.shape), new, weight, bias, before[..., -WIDTH + 1 :], activation)
    assert same_bits(state, torch.cat((before, new), -1)[..., -columns:])


def test_update_of_a_pool() -> None:
    x, weight, pool = normal(3, 8), normal(8, WIDTH, seed=1), normal(5, 8, WIDTH - 1, seed=3)
    before, slots = pool.clone(), torch.tensor([4, -1, 0])
    y = causal_conv1d_update(x, pool, weight, conv_state_indices=slots)
    assert_convolved(y[[0, 2], :, None], x[[0, 2], :, None], weight, None, before[[4, 0]], None)
    expected = before.clone()
    expected[[4, 0]] = torch.cat((before[[4, 0]], x[[0, 2], :, None]), -1)[..., 1:]
    assert same_bits(pool, expected)


def test_what_is_not_served_is_named() -> None:
    x, weight = normal(2, 8, 5), normal(8, WIDTH)
    with pytest.raises(ArgumentError, match="seq_idx is given; it must be left out"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 5, dtype=torch.int32))
    state = normal(2, 8, WIDTH)
    with pytest.raises(ArgumentError, match="cache_seqlens is given; it must be left out"):
        causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="conv_state is of 4 columns; it must be of 3 columns with"):
        causal_conv1d_update(x, state, weight, conv_state_indices=torch.arange(2))
    with pytest.raises(ArgumentError, match="conv_states is of 2 columns; it must be of at least 3"):
        causal_conv1d_update(x, state[..., :2], weight)
