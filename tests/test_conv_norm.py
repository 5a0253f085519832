"""The convolution, its state, and the gated norm (docs/contract.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import FLOATS, nans, normal, same_bits, starts, strided

D = 24
WIDTHS = (2, 3, 4, 5)
LENGTHS = (3, 0, 1, 20, 2, 0, 4)
SLOTS: tuple[int, ...] = (5, 2, 9, 0, 7, 4, 3)
every_width = pytest.mark.parametrize("width", WIDTHS)
both_layouts = pytest.mark.parametrize("contiguous", ["D", "W"])


class States:
    """A pool of convolution states ``[P, D, C]``, random, between NaN, with either dimension contiguous."""

    def __init__(self, slots: int, columns: int, contiguous: str = "W", dtype: torch.dtype = torch.float32) -> None:
        shape = (slots, D + 3, columns + 2) if contiguous == "W" else (slots, columns + 2, D + 3)
        self._contiguous, self.page = contiguous, nans(*shape, dtype=dtype)
        self.view = self._cut(self.page)
        self.view.copy_(normal(slots, D, columns, seed=9))
        self.before, self._page_before = self.view.clone(), self.page.clone()

    def _cut(self, page: Tensor) -> Tensor:
        return page[:, 2:-1, 1:-1] if self._contiguous == "W" else page[:, 1:-1, 2:-1].transpose(1, 2)

    def assert_now(self, expected: Tensor) -> None:
        """The pool is ``expected``, and nothing around it has changed."""
        page = self._page_before.clone()
        self._cut(page).copy_(expected)
        assert same_bits(self.page, page)


class Layer(NamedTuple):
    """A random convolution."""

    weight: Tensor
    bias: Tensor | None
    activation: str | None = "silu"

    def judge(self, y: Tensor, x: Tensor, history: Tensor, cu: Tensor) -> None:
        """Judge ``y [L, D]``; ``history [N, W-1, D]`` oldest first."""
        plain, exact = (
            oracle.conv(x, self.weight, self.bias, history, cu, self.activation, dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        assert_within_budget("output", y, plain, exact)


def layer(width: int, *, bias: bool = True, activation: str | None = "silu") -> Layer:
    return Layer(normal(D, width, seed=1), normal(D, seed=2) if bias else None, activation)


def tokens(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """``[count, D]`` inputs as rows of a wider buffer."""
    wide = nans(count, D + 5, dtype=dtype)
    wide[:, 2:-3] = normal(count, D, seed=seed)
    return wide[:, 2:-3]


def last(history: Tensor, new: Tensor, keep: int) -> Tensor:
    """The last ``keep`` inputs of ``history [C, D]`` and ``new [n, D]``, as a state ``[D, keep]``."""
    both = torch.cat((history, new.to(history.dtype)))
    return both[len(both) - keep :].T


# --- prefill ----------------------------------------------------------------------------------------------------------


@every_width
@both_layouts
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_prefill_keeps_the_last_inputs(width: int, contiguous: str, extra: int, dtype: torch.dtype) -> None:
    """Any length, columns for speculation untouched, sequences without a history over NaN."""
    past, conv = width - 1, layer(width)
    states, x, cu = States(11, past + extra, contiguous, dtype), tokens(sum(LENGTHS), dtype), starts(LENGTHS)
    has = [True, False, False, True, False, True, True]
    stale = [slot for slot, there in zip(SLOTS, has, strict=True) if not there]
    states.view[stale] = torch.nan
    history, expected = torch.zeros(len(SLOTS), past, D, dtype=dtype), states.view.clone()
    for i, slot in enumerate(SLOTS):
        if has[i]:
            history[i] = states.before[slot, :, :past].T
        expected[slot, :, :past] = last(history[i], x[int(cu[i]) : int(cu[i + 1])], past)
    y = gd.causal_conv1d(
        x, conv.weight, conv.bias, conv_states=states.view, cu_seqlens=cu,
        state_indices=strided(SLOTS, torch.int32), has_initial_state=strided(has, torch.bool),
    )  # fmt: skip
    assert (y.shape, y.dtype) == (x.shape, dtype)
    conv.judge(y, x, history, cu)
    states.assert_now(expected)


@every_width
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("stateless", [True, False])
def test_prefill_options(width: int, bias: bool, activation: str | None, stateless: bool) -> None:
    conv, x, cu = layer(width, bias=bias, activation=activation), tokens(30, torch.bfloat16), starts(LENGTHS)
    states = None if stateless else States(7, width - 1)
    history = torch.zeros(7, width - 1, D) if states is None else states.before.transpose(1, 2)
    inputs = [t.clone() for t in (x, conv.weight, conv.bias) if t is not None]
    y = gd.causal_conv1d(
        x, conv.weight, conv.bias, conv_states=None if states is None else states.view, cu_seqlens=cu.long(),
        state_indices=None, has_initial_state=None, activation=activation,
    )  # fmt: skip
    conv.judge(y, x, history, cu)
    assert all(map(torch.equal, inputs, [t for t in (x, conv.weight, conv.bias) if t is not None]))


@pytest.mark.parametrize("null_slot", [None, 0])
def test_prefill_padding(null_slot: int | None) -> None:
    """Padding rows and tokens behind the last sequence: zero output, no state touched, NaN kept in."""
    conv, cu = layer(4), starts(LENGTHS)
    padding = -3 if null_slot is None else null_slot
    slots, padded = list(SLOTS), [1, 3, 4]
    slots[3] = 8
    for i in padded:
        slots[i] = padding
    states, x = States(11, 3), tokens(34)
    states.view[0] = torch.nan
    expected, spans = states.view.clone(), [slice(int(a), int(b)) for a, b in pairwise(cu)]
    for i in padded:
        x[spans[i]] = torch.nan
    x[30:] = torch.nan
    live = [i for i in range(7) if i not in padded]
    for i in live:
        expected[slots[i]] = last(states.before[slots[i]].T, x[spans[i]], 3)
    y = gd.causal_conv1d(
        x, conv.weight, conv.bias, conv_states=states.view, cu_seqlens=cu, state_indices=torch.tensor(slots),
        has_initial_state=None, null_slot=null_slot,
    )  # fmt: skip
    silent = torch.cat([y[30:], *(y[spans[i]] for i in padded)])
    assert bool((silent == 0).all())
    states.assert_now(expected)
    own = torch.cat([y[spans[i]] for i in live]), torch.cat([x[spans[i]] for i in live])
    history = states.before[[slots[i] for i in live]].transpose(1, 2)
    conv.judge(*own, history, starts([LENGTHS[i] for i in live]))


# --- update -----------------------------------------------------------------------------------------------------------


def update(conv: Layer, x: Tensor, states: States, **options: Any) -> Tensor:
    given = {"activation": conv.activation, "state_indices": None, **options}
    return gd.causal_conv1d_update(x, states.view, conv.weight, conv.bias, **given)


@every_width
@both_layouts
@pytest.mark.parametrize("shape", ["[N, D]", "[N, 1, D]", "[N, 2, D]", "[N, 6, D]", "ragged"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_update_without_speculation(width: int, contiguous: str, shape: str, dtype: torch.dtype) -> None:
    """The history is columns 0 to W-2, which hold the last W-1 inputs afterwards; columns behind stay."""
    past, conv = width - 1, layer(width)
    each = {"[N, D]": 1, "[N, 1, D]": 1, "[N, 2, D]": 2, "[N, 6, D]": 6}
    lengths = list(LENGTHS) if shape == "ragged" else [each[shape]] * 7
    states, cu = States(11, past + 2, contiguous, dtype), starts(lengths)
    packed = tokens(sum(lengths), dtype)
    x = packed.unflatten(0, (7, -1)) if shape.count(",") == 2 else packed
    expected = states.before.clone()
    for i, slot in enumerate(SLOTS):
        expected[slot, :, :past] = last(states.before[slot, :, :past].T, packed[int(cu[i]) : int(cu[i + 1])], past)
    y = update(conv, x, states, state_indices=strided(SLOTS, torch.int32), cu_seqlens=cu if shape == "ragged" else None)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    conv.judge(y.reshape(-1, D), packed, states.before[list(SLOTS), :, :past].transpose(1, 2), cu)
    states.assert_now(expected)


def window(before: Tensor, accepted: int, new: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """The history ``[W-1, D]`` and the window afterwards of a speculative step over the columns ``[D, C]``."""
    history = before[:, accepted - 1 : accepted - 1 + past].T
    after = before.clone()
    kept = torch.cat((history[1:], new.to(history.dtype))).T
    after[:, : kept.shape[1]] = kept
    return history, after


@every_width
@both_layouts
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("lengths", "ragged"), [((1, 4, 2, 3, 4, 1, 2), True), ((4,) * 7, True), ((4,) * 7, False), ((1,) * 7, False)]
)
def test_speculative_window(
    width: int, contiguous: str, dtype: torch.dtype, lengths: Sequence[int], ragged: bool
) -> None:
    """Up to three draft tokens: history from column accepted - 1, left-aligned by the real number of tokens."""
    accepted, past, conv = [1, 2, 3, 4, 2, 1, 4], width - 1, layer(width)
    states, cu = States(11, past + 3, contiguous, dtype), starts(lengths)
    packed = tokens(sum(lengths), dtype)
    expected, histories = states.before.clone(), []
    for i, slot in enumerate(SLOTS):
        history, expected[slot] = window(states.before[slot], accepted[i], packed[int(cu[i]) : int(cu[i + 1])], past)
        histories.append(history)
    y = update(
        conv, packed if ragged else packed.unflatten(0, (7, -1)), states, state_indices=torch.tensor(SLOTS),
        num_accepted_tokens=strided(accepted, torch.int32), cu_seqlens=cu if ragged else None,
    )  # fmt: skip
    conv.judge(y.reshape(-1, D), packed, torch.stack(histories), cu)
    states.assert_now(expected)


def test_speculative_steps_follow_the_accepted_tokens() -> None:
    """Steps of drafts, of which a few are accepted, give what the accepted tokens give in one prefill."""
    conv, states, true = layer(4, bias=False), States(1, 6), tokens(16)
    history, position, count, outputs = states.before[:, :, :3].transpose(1, 2), 0, 1, []
    for accepted in (4, 1, 3, 2, 4, 2):
        drafts = tokens(4, seed=position + 50).clone()
        drafts[:accepted] = true[position : position + accepted]
        y = update(conv, drafts[None], states, num_accepted_tokens=torch.tensor([count]))
        outputs.append(y[0, :accepted])
        position, count = position + accepted, accepted
    conv.judge(torch.cat(outputs), true, history, starts([16]))


@pytest.mark.parametrize("null_slot", [None, 0])
@pytest.mark.parametrize("accepted", [None, [1, 3, 2]])
@pytest.mark.parametrize("lengths", [(2, 3, 1), (2, 0, 3)])
def test_update_padding(null_slot: int | None, accepted: list[int] | None, lengths: tuple[int, ...]) -> None:
    conv, states, x = layer(3), States(6, 5), tokens(sum(lengths) + 2)
    cu, slots = starts(lengths), [4, -1 if null_slot is None else null_slot, 2]
    states.view[0] = torch.nan
    spans = [slice(int(a), int(b)) for a, b in pairwise(cu)]
    x[spans[1]] = torch.nan
    x[spans[2].stop :] = torch.nan
    expected, histories = states.view.clone(), []
    for i in (0, 2):
        old = states.before[slots[i]]
        history, after = window(old, 1 if accepted is None else accepted[i], x[spans[i]], 2)
        if accepted is None:
            after = torch.cat((last(history, x[spans[i]], 2), old[:, 2:]), 1)
        expected[slots[i]] = after
        histories.append(history)
    y = update(
        conv, x, states, state_indices=torch.tensor(slots, dtype=torch.int32), null_slot=null_slot, cu_seqlens=cu,
        num_accepted_tokens=None if accepted is None else torch.tensor(accepted),
    )  # fmt: skip
    assert bool((torch.cat((y[spans[1]], y[spans[2].stop :])) == 0).all())
    seen, given = (torch.cat((t[spans[0]], t[spans[2]])) for t in (y, x))
    conv.judge(seen, given, torch.stack(histories), starts([lengths[0], lengths[2]]))
    states.assert_now(expected)


@every_width
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_update_options_and_inputs_unchanged(width: int, bias: bool, activation: str | None) -> None:
    conv, states, x = layer(width, bias=bias, activation=activation), States(5, width - 1), tokens(5, torch.bfloat16)
    inputs = [t.clone() for t in (x, conv.weight, conv.bias) if t is not None]
    y = update(conv, x, states)
    conv.judge(y, x, states.before.transpose(1, 2), starts([1] * 5))
    assert all(map(torch.equal, inputs, [t for t in (x, conv.weight, conv.bias) if t is not None]))


@every_width
@pytest.mark.parametrize("dtype", FLOATS)
def test_updates_token_by_token_equal_one_prefill(width: int, dtype: torch.dtype) -> None:
    conv, x = layer(width), tokens(12, dtype)
    one, many = States(1, width - 1, dtype=dtype), States(1, width - 1, dtype=dtype)
    gd.causal_conv1d(
        x, conv.weight, conv.bias, conv_states=one.view, cu_seqlens=starts([12]), state_indices=None,
        has_initial_state=None,
    )  # fmt: skip
    y = torch.cat([update(conv, token[None], many) for token in x])
    conv.judge(y, x, one.before.transpose(1, 2), starts([12]))
    assert torch.equal(one.view, many.view)


# --- the gated norm ---------------------------------------------------------------------------------------------------


def norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, activation: str, dtype: torch.dtype) -> Tensor:
    x, z, weight = x.to(dtype), z.to(dtype), weight.to(dtype)
    gate = 1 / (1 + torch.exp(-z)) * (1 if activation == "sigmoid" else z)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * gate


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
@pytest.mark.parametrize("shape", [(32,), (7, 96), (3, 1, 128), (2, 0, 64), (2, 3, 5, 192)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm(dtype: torch.dtype, activation: str, shape: tuple[int, ...], eps: float) -> None:
    wide = [nans(*shape[:-1], shape[-1] + 8, dtype=dtype) for _ in range(2)]
    x, z = (buffer[..., 3:-5] for buffer in wide)
    x.copy_(0.1 * normal(*shape))
    z.copy_(3 * normal(*shape, seed=1))
    weight = normal(shape[-1], seed=2, dtype=torch.bfloat16)
    before = x.clone(), z.clone(), weight.clone()
    y = gd.rms_norm_gated(x, z, weight, eps, activation)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    plain, exact = (norm(*before, eps, activation, dtype=t) for t in (torch.float32, torch.float64))
    assert_within_budget("output", y, plain, exact)
    assert all(map(torch.equal, (x, z, weight), before))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_norm_of_zeros_and_extreme_gates(activation: str) -> None:
    x = torch.cat((torch.zeros(1, 64), normal(3, 64)))
    z = torch.tensor([1.0, -1e4, 1e4, 0.0])[:, None].expand(4, 64).contiguous()
    y = gd.rms_norm_gated(x, z, torch.ones(64), 1e-6, activation)
    assert bool(y.isfinite().all())
    assert bool((y[:2] == 0).all())
    assert bool((y[3] == 0).all()) == (activation == "silu")
