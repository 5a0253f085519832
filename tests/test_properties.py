"""Properties that hold for every shape, split and order: what engines rely on when they batch and schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gated_delta as gd
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import GATES, Inputs, prefill_inputs, recurrent_inputs, with_state
from helpers import (
    FLOATS,
    ROUTES,
    Pool,
    assert_prefill,
    assert_recurrent,
    evaluations,
    normal,
    prefill,
    recurrent,
    rows,
    sequences,
    span,
    starts,
    tokens,
)

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 1000)
floats = st.sampled_from(FLOATS)
head_sizes = st.sampled_from([32, 64, 96])
prefill_heads = st.sampled_from([(1, 1, 1), (1, 1, 2), (2, 2, 4), (3, 3, 3), (4, 2, 2), (3, 1, 1)])
lengths_of_many = st.lists(
    st.one_of(st.integers(0, 5), st.integers(60, 68), st.integers(0, 150)), min_size=2, max_size=5
)


@st.composite
def packed(draw: st.DrawFn, lengths: st.SearchStrategy[list[int]] = lengths_of_many) -> Inputs:
    """Prefill inputs with initial states."""
    heads = dict(zip(("hq", "hk", "hv"), draw(prefill_heads), strict=True))
    inputs = prefill_inputs(
        draw(lengths), head_k=draw(head_sizes), head_v=draw(head_sizes), dtype=draw(floats), seed=draw(seeds),
        gates=draw(st.sampled_from(GATES)), **heads,
    )  # fmt: skip
    return with_state(inputs)


@st.composite
def stepped(draw: st.DrawFn, batch: tuple[int, int] = (2, 17), most: int = 5) -> Inputs:
    """Recurrent inputs; the number of elements is often no multiple of a vector register."""
    hv = draw(st.integers(1, 3))
    return recurrent_inputs(
        draw(st.integers(*batch)), draw(st.integers(1, most)), h=1, hv=hv, head_k=draw(head_sizes),
        head_v=draw(head_sizes), dtype=draw(floats), state_dtype=draw(floats), seed=draw(seeds),
    )  # fmt: skip


def routes(inputs: Inputs) -> tuple[str, ...]:
    """The operators that take so many tokens a row."""
    return ROUTES if inputs["q"].shape[1] == 1 else ROUTES[1:]


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y), f"{what}: {int((x != y).sum())} of {x.numel()} elements differ"


# --- prefill ----------------------------------------------------------------------------------------------------------


@few
@given(inputs=packed(st.integers(1, 260).map(lambda n: [n])), data=st.data())
def test_segments_of_a_sequence_make_the_whole(inputs: Inputs, data: st.DataObject) -> None:
    length = len(inputs["q"])
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    outputs, state = [], inputs["initial_state"]
    for first, last in pairwise([0, *cuts, length]):
        output, state = prefill({**tokens(inputs, first, last), "initial_state": state})
        outputs.append(output)
    assert_prefill(inputs, torch.cat(outputs), state)


@few
@given(inputs=packed(), data=st.data())
def test_prefill_of_some_sequences_in_any_order_has_the_same_bits(inputs: Inputs, data: st.DataObject) -> None:
    output, state = prefill(inputs)
    chosen = data.draw(st.lists(st.integers(0, len(state) - 1), unique=True, min_size=1))
    expected = torch.cat([output[span(inputs, i)] for i in chosen]), state[chosen]
    assert_equal(prefill(sequences(inputs, chosen)), expected, chosen)


@few
@given(inputs=packed(), data=st.data())
def test_prefill_over_a_pool_has_the_bits_of_gathered_states(inputs: Inputs, data: st.DataObject) -> None:
    slots = data.draw(st.permutations(range(8)))[: len(inputs["initial_state"])]
    pool = Pool(inputs["initial_state"], slots, size=8)
    output, _ = prefill({**inputs, "initial_state": pool.view}, state_indices=torch.tensor(slots))
    assert_equal((output, pool.view[slots]), prefill(inputs), slots)
    assert pool.untouched_except(slots)


# --- recurrent --------------------------------------------------------------------------------------------------------


@few
@given(inputs=stepped(most=7))
def test_several_tokens_are_repeated_decodes(inputs: Inputs) -> None:
    inputs["state"] = inputs["state"].float()
    steps = inputs["q"].shape[1]
    for route in ROUTES:
        state, outputs = inputs["state"], []
        for t in range(steps):
            token = {name: inputs[name][:, t : t + 1] for name in ("q", "k", "v", "a", "b")}
            output, state = recurrent(route, {**inputs, **token, "state": state})
            outputs.append(output)
        assert_recurrent(inputs, torch.cat(outputs, 1), state)
    assert_recurrent(inputs, *recurrent("mtp", inputs))


@few
@given(inputs=stepped(batch=(1, 17), most=1))
def test_the_layout_of_the_state_changes_no_bit(inputs: Inputs) -> None:
    assert_equal(recurrent("K-major", inputs), recurrent("V-major", inputs), "K-major against V-major")


@few
@given(inputs=stepped(batch=(1, 17)))
def test_a_pool_has_the_bits_of_gathered_states(inputs: Inputs) -> None:
    direct = recurrent("V-major", inputs)
    for route in ("pool", "mtp"):
        assert_equal(recurrent(route, inputs), direct, route)


@few
@given(inputs=stepped(), data=st.data())
def test_recurrent_rows_in_any_order_have_the_same_bits(inputs: Inputs, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(inputs["q"]))))
    for route in routes(inputs):
        output, state = recurrent(route, inputs)
        assert_equal(recurrent(route, rows(inputs, order)), (output[order], state[order]), route)


@few
@given(inputs=stepped(), data=st.data())
def test_a_recurrent_row_has_its_own_bits_whatever_the_batch(inputs: Inputs, data: st.DataObject) -> None:
    every = range(len(inputs["q"]))
    chosen = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    for route in routes(inputs):
        output, state = recurrent(route, inputs)
        for some in (chosen, chosen[:1]):
            assert_equal(recurrent(route, rows(inputs, some)), (output[some], state[some]), (route, some))


# --- around the rule --------------------------------------------------------------------------------------------------


@st.composite
def convolved(draw: st.DrawFn) -> dict[str, Any]:
    channels, width, seed = draw(st.integers(1, 37)), draw(st.integers(2, 5)), draw(seeds)
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    return {
        "x": normal(sum(lengths), channels, seed=seed, dtype=draw(floats)),
        "weight": normal(channels, width, seed=seed + 1),
        "conv_states": normal(len(lengths), channels, width - 1, seed=seed + 2),
        "cu_seqlens": starts(lengths),
    }


def convolve(inputs: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor]:
    """The output, and the states afterwards."""
    given = {**inputs, **changes}
    given["conv_states"] = given["conv_states"].clone()
    y = gd.causal_conv1d(**given, state_indices=None, has_initial_state=None)
    return y, given["conv_states"]


@few
@given(inputs=convolved(), data=st.data())
def test_a_convolution_split_anywhere_is_the_whole(inputs: dict[str, Any], data: st.DataObject) -> None:
    whole = inputs | {"cu_seqlens": starts([len(inputs["x"])]), "conv_states": inputs["conv_states"][:1]}
    cuts = sorted(data.draw(st.lists(st.integers(0, len(inputs["x"])), max_size=3)))
    outputs, state = [], whole["conv_states"]
    for first, last in pairwise([0, *cuts, len(inputs["x"])]):
        piece = {"x": inputs["x"][first:last], "cu_seqlens": starts([last - first]), "conv_states": state}
        if data.draw(st.booleans()):
            y, state = convolve(whole, **piece)
        else:
            state = state.clone()
            y = gd.causal_conv1d_update(
                piece["x"], state, inputs["weight"], state_indices=None, cu_seqlens=piece["cu_seqlens"]
            )
        outputs.append(y)
    assert torch.equal(state, convolve(whole)[1])
    judged = {"bias": None, "activation": "silu", "history": whole["conv_states"].transpose(1, 2)}
    judged |= {name: whole[name] for name in ("x", "weight", "cu_seqlens")}
    assert_within_budget("output", torch.cat(outputs), *evaluations(oracle.conv, judged))


@few
@given(inputs=convolved(), data=st.data())
def test_a_convolved_row_has_its_own_bits_whatever_the_batch(inputs: dict[str, Any], data: st.DataObject) -> None:
    y, state = convolve(inputs)
    chosen = data.draw(st.permutations(range(len(state))))[: data.draw(st.integers(1, len(state)))]
    spans = [span(inputs, i) for i in chosen]
    cut = {
        "x": torch.cat([inputs["x"][own] for own in spans]),
        "conv_states": inputs["conv_states"][chosen],
        "cu_seqlens": starts(own.stop - own.start for own in spans),
    }
    assert_equal(convolve(inputs, **cut), (torch.cat([y[own] for own in spans]), state[chosen]), chosen)


@few
@given(
    shape=st.tuples(st.integers(2, 9), st.integers(1, 3), st.integers(1, 70)),
    dtype=floats,
    activation=st.sampled_from(["silu", "sigmoid"]),
    seed=seeds,
    data=st.data(),
)
def test_a_normed_row_has_its_own_bits_whatever_the_batch(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str, seed: int, data: st.DataObject
) -> None:
    x, z = normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)
    weight = normal(shape[-1], seed=seed + 2)
    y = gd.rms_norm_gated(x, z, weight, 1e-6, activation)
    order = data.draw(st.permutations(range(shape[0])))
    for chosen in (order, order[:1]):
        some = gd.rms_norm_gated(x[chosen], z[chosen], weight, 1e-6, activation)
        assert_equal((some,), (y[chosen],), chosen)
