"""Decode in both layouts and several tokens against their contract (docs/contract.md sections 1, 3, 4, 5)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import reference
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget, judge
from gated_delta.testing.inputs import BLIND_SPOTS, Inputs, recurrent_inputs
from helpers import (
    FLOATS,
    ROUTES,
    Pool,
    assert_recurrent,
    evaluations,
    nans,
    prefill,
    recurrent,
    rows,
    same_bits,
    strided,
)

SLOTS = [4, 1, 6]


def short(inputs: Inputs, factor: float = 0.2) -> Inputs:
    """Keys short enough to be used as they are, without the L2 norm."""
    return {**inputs, "k": inputs["k"] * factor}


def case(
    tokens: int = 1, slots: list[int] = SLOTS, *, size: int = 9, paged: bool = True, **options: Any
) -> tuple[Inputs, Inputs, Pool]:
    """The oracle's inputs, the same as arguments of a pool operator, and the pool."""
    inputs = recurrent_inputs(3, tokens, head_k=32, head_v=64, **options)
    pool = Pool(inputs["state"], slots, size=size, paged=paged)
    given = {**inputs, "initial_state": pool.view, "initial_state_indices": torch.tensor(slots)}
    del given["state"]
    return inputs, given, pool


def pooled(operator: str, given: Inputs, **options: Any) -> Tensor:
    """The output of one of the two operators over a pool, both with the final state written."""
    if operator == "pool":
        return gd.gated_delta_rule_decode_pretranspose(**{**given, **options}, state=None)[0]
    return gd.gated_delta_rule_mtp(**{**given, "disable_state_update": False, **options})[0]


both_pools = pytest.mark.parametrize("operator", ["pool", "mtp"])
every_route = pytest.mark.parametrize("route", ROUTES)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_oracle_is_the_written_rule() -> None:
    """Small whole numbers and powers of two, so that every sum is exact in any order."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-3, 4, (1, 4, heads, 8), generator=generator).double() for heads in (1, 1, 2))
    alpha, beta = (2.0 ** -torch.randint(0, 3, (1, 4, 2), generator=generator).double() for _ in range(2))
    state = torch.randint(-3, 4, (1, 2, 8, 8), generator=generator).double()
    output, final, _ = reference.recurrent(q, k, v, alpha, beta, 0.5, state, dtype=torch.float64)
    for head in range(2):
        s = state[0, head]
        for t in range(4):
            s = alpha[0, t, head] * s
            u = beta[0, t, head] * (v[0, t, head] - s @ k[0, t, 0])
            s = s + torch.outer(u, k[0, t, 0])
            assert torch.equal(output[0, t, head], 0.5 * (s @ q[0, t, 0]))
        assert torch.equal(final[0, head], s)


@every_route
@pytest.mark.parametrize("state_dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"allow_neg_eigval": True}, {"use_qk_l2norm": False}, {"scale": -1.5}])
def test_one_token(route: str, state_dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = short(recurrent_inputs(3, head_k=96, head_v=192, h=1, state_dtype=state_dtype))
    output, state = recurrent(route, inputs, **options)
    assert (output.dtype, state.dtype) == (torch.bfloat16, state_dtype)
    assert_recurrent({**inputs, **options}, output, state)


@every_route
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_scale_and_scale_zero(route: str, dtype: torch.dtype) -> None:
    inputs = recurrent_inputs(3, head_k=32, dtype=dtype)
    output, state = recurrent(route, inputs)
    given, _ = recurrent(route, inputs, scale=32**-0.5)
    zero, same_state = recurrent(route, inputs, scale=0.0)
    assert torch.equal(output, given)
    assert bool((zero == 0).all())
    assert torch.equal(state, same_state)


@every_route
@pytest.mark.parametrize("a", [84.0, 96.0, 200.0, 1e4, 3e38])
def test_a_gate_that_closes_gives_the_exact_limit(route: str, a: float) -> None:
    """``a + dt_bias`` past 88.7 overflows a softplus written as log(1 + exp(x)); alpha is exactly 0 there."""
    inputs = recurrent_inputs(2)
    inputs |= {"A_log": torch.ones(4), "a": torch.full_like(inputs["a"], a), "dt_bias": torch.full((4,), 8.0)}
    output, state = recurrent(route, inputs)
    empty = recurrent(route, {**inputs, "state": torch.zeros_like(inputs["state"])})
    assert bool(state.isfinite().all())
    assert torch.equal(output, empty[0])
    assert torch.equal(state, empty[1])
    assert_recurrent(inputs, output, state)


@every_route
@pytest.mark.parametrize("b", [-3e38, -200.0, 200.0, 3e38])
def test_open_gates_and_extreme_write_strengths(route: str, b: float) -> None:
    inputs = recurrent_inputs(2)
    inputs |= {"a": torch.full_like(inputs["a"], -3e38), "b": torch.full_like(inputs["b"], b)}
    output, state = recurrent(route, inputs)
    assert_recurrent(inputs, output, state)
    assert torch.equal(state, inputs["state"]) == (b < 0)  # alpha is exactly 1, and beta 0 writes nothing


@every_route
@pytest.mark.parametrize("gate", [0.0, 80.0, 200.0])
@pytest.mark.parametrize("double", [1, 2])
def test_gates_and_norm_are_the_written_ones(route: str, gate: float, double: int) -> None:
    """Against formulas that share no code with the package, where a gate past 88.7 does not close."""
    inputs = recurrent_inputs(3, state_dtype=torch.bfloat16)
    inputs |= {name: inputs[name] * 1e-4 for name in "qk"}
    inputs |= {"A_log": torch.full((4,), -6.0), "dt_bias": torch.full((4,), gate)}
    output, state = recurrent(route, inputs, allow_neg_eigval=double == 2)
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (inputs["q"].double(), inputs["k"].double()))
    alpha = torch.exp(-inputs["A_log"].double().exp() * torch.log1p(torch.exp(inputs["a"].double() + gate)))
    beta = double / (1 + torch.exp(-inputs["b"].double()))
    rest = (q, k, inputs["v"], alpha, beta, 1 / 8, inputs["state"])
    plain, exact = (reference.recurrent(*rest, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert_within_budget("output", output, plain[0], exact[0])
    assert_within_budget("state", state, plain[1], exact[1])


@pytest.mark.parametrize("eps", [1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("route", ["prefill", *ROUTES])
def test_a_wrong_epsilon_is_out_of_budget(route: str, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blind spot "l2norm of short vectors" must be able to fail."""
    inputs = BLIND_SPOTS["l2norm of short vectors"]() if route == "prefill" else recurrent_inputs(3)
    if route != "prefill":
        inputs |= {name: inputs[name] * 2.5e-4 for name in "qk"}
    plain, exact = evaluations(oracle.prefill if route == "prefill" else oracle.recurrent, inputs)
    verdicts = []
    for used in (reference.L2_EPS, eps):
        monkeypatch.setattr(reference, "L2_EPS", used)
        output, state = prefill(inputs) if route == "prefill" else recurrent(route, inputs)
        verdicts.append(judge("output", output, plain.output, exact.output))
        verdicts.append(judge("state", state, plain.state, exact.state))
    assert [verdict.within for verdict in verdicts] == [True, True, False, False], verdicts


# --- memory of the caller ---------------------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("dtype", FLOATS)
def test_output_of_the_caller(route: str, dtype: torch.dtype) -> None:
    inputs = recurrent_inputs(3, head_k=32)
    wide = nans(3, 2, 6, 80, dtype=dtype)
    mine = wide[:, :1, 1:5, 8:72]
    output, state = recurrent(route, inputs, output=mine)
    assert output.data_ptr() == mine.data_ptr()
    assert_recurrent(inputs, mine, state)
    mine.fill_(torch.nan)
    assert bool(wide.isnan().all())


@pytest.mark.parametrize("layout", ["K V", "V K"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_states_are_updated_where_they_lie(layout: str, dtype: torch.dtype) -> None:
    inputs = recurrent_inputs(3, head_k=32, head_v=64, state_dtype=dtype)
    own = Pool(inputs["state"] if layout == "V K" else inputs["state"].transpose(-1, -2), range(3), size=3)
    operator = gd.gated_delta_rule_decode_pretranspose if layout == "V K" else gd.gated_delta_rule_decode
    output, state = operator(**{**inputs, "state": own.view})
    assert state is own.view
    assert_recurrent(inputs, output, own.view if layout == "V K" else own.view.transpose(-1, -2))
    assert own.untouched_except(range(3))


@every_route
def test_inputs_as_strided_views_and_unchanged(route: str) -> None:
    inputs = recurrent_inputs(3)
    views = {}
    for name in ("q", "k", "v", "a", "b"):
        wide = nans(3, 2, *inputs[name].shape[2:-1], inputs[name].shape[-1] + 8, dtype=torch.bfloat16)
        views[name] = wide[:, :1, ..., : inputs[name].shape[-1]]
        views[name].copy_(inputs[name])
    assert_recurrent(inputs, *recurrent(route, {**inputs, **views}))
    assert all(torch.equal(inputs[name], view) for name, view in views.items())


# --- slots ------------------------------------------------------------------------------------------------------------


@both_pools
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pool_in_place(operator: str, paged: bool, index: torch.dtype, dtype: torch.dtype) -> None:
    inputs, given, pool = case(paged=paged, state_dtype=dtype)
    output = pooled(operator, given, initial_state_indices=strided(SLOTS, index))
    assert_recurrent(inputs, output, pool.view[SLOTS])
    assert pool.untouched_except(SLOTS)


@both_pools
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("targets", "null_slot"), [([0, 5, 8], None), ([-1, 5, -7], None), ([0, 5, 2], 0)])
def test_separate_output_slots(operator: str, index: torch.dtype, targets: list[int], null_slot: int | None) -> None:
    inputs, given, pool = case(2)
    output = pooled(operator, given, output_state_indices=strided(targets, index), null_slot=null_slot)
    written = [i for i, slot in enumerate(targets) if slot >= 0 and slot != null_slot]
    kept = [targets[i] for i in written]
    assert_recurrent(inputs, output)
    assert_recurrent(rows(inputs, written), output[written], pool.view[kept])
    assert pool.untouched_except(kept)


@both_pools
@pytest.mark.parametrize("null_slot", [None, 0, 3])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("targets", [None, [4, 7, 6]])
def test_padding_rows(operator: str, null_slot: int | None, ours: bool, targets: list[int] | None) -> None:
    padding = -1 if null_slot is None else null_slot
    inputs, given, pool = case(2, [4, -1, 6])
    for name in ("q", "k", "v", "a", "b"):  # nothing of a padding row may be looked at
        given[name] = inputs[name].clone()
        given[name][1] = torch.nan
    buffer = nans(3, 2, 4, 64, 32)
    mine = None if ours else nans(3, 2, 4, 64, dtype=torch.bfloat16)
    output = pooled(
        operator, given, initial_state_indices=torch.tensor([4, padding, 6]), null_slot=null_slot, output=mine,
        intermediate_states_buffer=buffer, output_state_indices=None if targets is None else torch.tensor(targets),
    )  # fmt: skip
    assert bool((output[1] == 0).all() if ours else output[1].isnan().all())
    assert bool(buffer[1].isnan().all())
    assert_recurrent(rows(inputs, [0, 2]), output[[0, 2]], pool.view[[4, 6]], buffer[[0, 2]])
    assert pool.untouched_except([4, 6])


@both_pools
def test_only_padding(operator: str) -> None:
    _, given, pool = case(2, [-1, -1, -1])
    assert bool((pooled(operator, given) == 0).all())
    assert pool.untouched_except([])


@both_pools
def test_a_row_of_nan_stays_alone(operator: str) -> None:
    inputs, given, pool = case(slots=[4, -1, 6])
    output = pooled(operator, given, initial_state_indices=torch.tensor(SLOTS))
    assert bool(output[1].isnan().all())
    assert_recurrent(rows(inputs, [0, 2]), output[[0, 2]], pool.view[[4, 6]])


@both_pools
def test_pool_of_more_than_2_to_the_31_elements(operator: str) -> None:
    inputs = recurrent_inputs(2, 2, h=1, hv=2, head_k=256, head_v=256, state_dtype=torch.bfloat16)
    wrap = 2**31 // (2 * 256 * 256)
    pool = torch.empty(wrap + 4, 2, 256, 256, dtype=torch.bfloat16)  # never touched as a whole
    slots = torch.tensor([1, wrap + 2], dtype=torch.int32)
    pool[slots.long()] = inputs["state"]
    pool[[2, 3]] = 7.0
    given = {name: value for name, value in inputs.items() if name != "state"}
    where = {"initial_state": pool, "initial_state_indices": slots, "output_state_indices": slots.flip(0) + 1}
    output = pooled(operator, {**given, **where})
    assert pool.numel() > 2**31
    assert_recurrent(inputs, output, pool[[wrap + 3, 2]])
    assert same_bits(pool[slots.long()], inputs["state"])
    assert bool((pool[3] == 7).all())


# --- several tokens ---------------------------------------------------------------------------------------------------


@both_pools
@pytest.mark.parametrize("tokens", range(1, 18))
@pytest.mark.parametrize("state_dtype", FLOATS)
def test_tokens_of_one_call_stay_in_fp32(operator: str, tokens: int, state_dtype: torch.dtype) -> None:
    """fp32 activations over a bf16 pool: rounding the state between two tokens would be out of budget."""
    inputs, given, pool = case(tokens, dtype=torch.float32, state_dtype=state_dtype)
    kept = nans(3, tokens, 4, 64, 32)
    output = pooled(operator, given, intermediate_states_buffer=kept)
    assert_recurrent(inputs, output, pool.view[SLOTS], kept)
    assert pool.untouched_except(SLOTS)


@both_pools
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("update", [True, False])
def test_intermediate_states_go_to_rows_of_the_batch(operator: str, dtype: torch.dtype, update: bool) -> None:
    inputs, given, pool = case(4, state_dtype=torch.bfloat16)
    wide = nans(7, 9, 5, 66, 40, dtype=dtype)
    buffer = wide[1:6, 1:8, 1:, 2:, :32]
    output = pooled(operator, given, intermediate_states_buffer=buffer, disable_state_update=not update)
    assert_recurrent(inputs, output, pool.view[SLOTS] if update else None, buffer[:3, :4])
    assert pool.untouched_except(SLOTS if update else [])
    buffer[:3, :4] = torch.nan
    assert bool(wide.isnan().all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("disable", [True, False, None])
def test_only_disable_state_update_decides(batch: int, buffered: bool, tokens: int, disable: bool | None) -> None:
    inputs, given, pool = case(tokens)
    for name in ("q", "k", "v", "a", "b", "initial_state_indices"):
        given[name] = given[name][:batch]
    if buffered:
        given["intermediate_states_buffer"] = nans(batch, tokens, 4, 64, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output, returned = gd.gated_delta_rule_mtp(**given, disable_state_update=disable)
    assert [(w.category, w.filename) for w in caught] == ([(DeprecationWarning, __file__)] if disable is None else [])
    assert returned is pool.view
    written = SLOTS[:batch] if disable is False else []
    assert_recurrent(rows(inputs, range(batch)), output, pool.view[written] if written else None)
    assert pool.untouched_except(written)


def test_leaving_disable_state_update_out_warns() -> None:
    inputs, given, pool = case(2)
    with pytest.warns(DeprecationWarning, match="disable_state_update"):
        output, _ = gd.gated_delta_rule_mtp(**given)
    assert_recurrent(inputs, output)
    assert pool.untouched_except([])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("finals", "named"), [(None, True), (None, False), ([13, -1, 15], True), ([13, -1, 15], False), (SLOTS, False)]
)
@pytest.mark.parametrize("null_slot", [None, 0])
def test_states_after_each_token_go_to_slots(
    index: torch.dtype, finals: list[int] | None, named: bool, null_slot: int | None
) -> None:
    """``named``: row 1 also names the slot that it reads, for the state after its first token."""
    inputs, given, pool = case(3, size=17)
    skip = -1 if null_slot is None else null_slot
    targets = torch.tensor([[2, 3, 5], [1 if named else 7, skip, 8], [-1, 9, 10]])
    given["ssm_state_indices"] = torch.stack([targets, torch.full_like(targets, 99)], 2).to(index)[..., 0]
    given["output_state_indices"] = None if finals is None else torch.tensor(finals)
    output = pooled("mtp", given, null_slot=null_slot)
    kept = nans(3, 3, 4, 64, 32)
    written = []
    for row, t in (targets != skip).logical_and(targets >= 0).nonzero().tolist():
        kept[row, t] = pool.view[targets[row, t]]
        written.append(int(targets[row, t]))
    plain, exact = evaluations(oracle.recurrent, inputs)
    there = ~kept[:, :, 0, 0, 0].isnan()
    judged = (torch.stack(x.kept, 1)[there] for x in (plain, exact))
    assert int(there.sum()) == 7
    assert_within_budget("states after tokens", kept[there], *judged)
    ends = [(i, slot) for i, slot in enumerate(finals or []) if slot >= 0]
    for row, slot in ends:
        assert_within_budget("final state", pool.view[slot], plain.state[row], exact.state[row])
    assert_recurrent(inputs, output)
    assert pool.untouched_except([*written, *(slot for _, slot in ends)])


# --- many steps -------------------------------------------------------------------------------------------------------


def test_ten_thousand_steps_of_a_bf16_state() -> None:
    """Against float64, where the plain evaluation rounds its state to bf16 after every step too."""
    steps, inputs = 10_000, recurrent_inputs(1, 10_000, h=1, hv=2, head_k=32, head_v=32, state_dtype=torch.bfloat16)
    gates = {name: inputs[name] for name in ("A_log", "dt_bias")}
    state, outputs = inputs["state"].clone(), nans(1, steps, 2, 32, dtype=torch.bfloat16)
    for t in range(steps):
        token = {name: inputs[name][:, t : t + 1] for name in ("q", "k", "v", "a", "b")}
        gd.gated_delta_rule_decode_pretranspose(**token, **gates, state=state, output=outputs[:, t : t + 1])

    def evaluate(dtype: torch.dtype, every: int) -> tuple[Tensor, Tensor]:
        q, k = (reference.l2norm(inputs[name].to(dtype)) for name in "qk")
        alpha = reference.decay(inputs["A_log"], inputs["a"], inputs["dt_bias"], dtype=dtype)
        beta, now = reference.write_strength(inputs["b"], dtype=dtype), inputs["state"]
        read = []
        for first in range(0, steps, every):
            own = slice(first, first + every)
            parts = (x[:, own] for x in (q, k, inputs["v"], alpha, beta))
            output, now, _ = reference.recurrent(*parts, scale=32**-0.5, state=now, dtype=dtype)
            now = now.bfloat16() if every == 1 else now
            read.append(output)
        return torch.cat(read, 1), now

    plain, exact = evaluate(torch.float32, 1), evaluate(torch.float64, steps)
    assert_within_budget("output", outputs, plain[0], exact[0])
    assert_within_budget("last outputs", outputs[:, -1000:], plain[0][:, -1000:], exact[0][:, -1000:])
    assert_within_budget("state", state, plain[1], exact[1])
