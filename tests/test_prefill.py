"""``chunk_gated_delta_rule`` against its contract (docs/contract.md sections 1, 2, 5), beyond the self-test's cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import reference
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, recurrent_inputs, with_state
from helpers import (
    FLOATS,
    Pool,
    assert_prefill,
    assert_recurrent,
    evaluations,
    nans,
    prefill,
    same_bits,
    sequences,
    span,
    starts,
    strided,
    tokens,
)

HEAD_SIZES = (32, 64, 96, 128, 192, 256)
RAGGED = (33, 0, 100, 1, 64)


def small(lengths: Any = RAGGED, *, state: torch.dtype = torch.float32, **options: Any) -> Inputs:
    return with_state(prefill_inputs(lengths, **{"head_k": 32, "head_v": 64, **options}), dtype=state)


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


def poison_tokens(inputs: Inputs, where: slice) -> Inputs:
    """The same with NaN in every input of these tokens."""
    changed = dict(inputs)
    for name in ("q", "k", "v", "g", "beta"):
        changed[name] = inputs[name].clone()
        changed[name][where] = torch.nan
    return changed


# --- defaults, gates, results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [("g",), ("beta",), ("g", "beta"), ("initial_state",)])
def test_arguments_left_out_take_their_defaults(left_out: tuple[str, ...]) -> None:
    inputs = without(small(g_space="linear", gates="weak"), *left_out)
    assert_prefill(inputs, *prefill(inputs))


def test_no_scale_means_one_over_root_k() -> None:
    inputs = small()
    default, state = prefill(inputs)
    given, same_state = prefill(inputs, scale=32**-0.5)
    assert torch.equal(default, given)
    assert torch.equal(state, same_state)


@pytest.mark.parametrize("scale", [0.0, -2.5, 3])
def test_any_scale_is_honoured(scale: float) -> None:
    inputs = small()
    output, state = prefill(inputs, scale=scale)
    assert_prefill({**inputs, "scale": scale}, output, state)
    assert torch.equal(state, prefill(inputs)[1])
    assert bool((output == 0).all()) == (scale == 0)


def test_gates_of_one_and_zero_are_exact_in_both_spaces() -> None:
    inputs = small(gates="none")
    alpha = (torch.arange(inputs["g"].numel()) % 7 != 3).float().view_as(inputs["g"])
    linear = prefill({**inputs, "g": alpha, "g_space": "linear"})
    log = prefill({**inputs, "g": alpha.log(), "g_space": "log"})
    assert torch.equal(linear[0], log[0])
    assert torch.equal(linear[1], log[1])
    assert_prefill({**inputs, "g": alpha, "g_space": "linear"}, *linear)


@pytest.mark.parametrize("gates", ["weak", "mix", "model", "strong"])
def test_linear_and_log_gates_mean_the_same(gates: str) -> None:
    inputs = small(gates=gates, g_space="log")
    linear = {**inputs, "g": inputs["g"].exp(), "g_space": "linear"}
    assert_prefill(inputs, *prefill(inputs))
    assert_prefill(linear, *prefill(linear))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state_dtype", [None, *FLOATS])
def test_shapes_and_dtypes_of_the_results(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    inputs = small(dtype=dtype, state=state_dtype or torch.float32)
    inputs = inputs if state_dtype else without(inputs, "initial_state")
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    output, state = prefill(inputs)
    assert (output.shape, output.dtype) == ((198, 4, 64), dtype)
    assert (state.shape, state.dtype) == ((5, 4, 64, 32), state_dtype or torch.float32)
    assert_prefill(inputs, output, state)
    assert all(same_bits(inputs[name], value) for name, value in before.items())
    alone = gd.chunk_gated_delta_rule(**inputs)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, output)


@pytest.mark.parametrize("head_k", HEAD_SIZES)
@pytest.mark.parametrize("head_v", HEAD_SIZES)
def test_every_head_size(head_k: int, head_v: int) -> None:
    inputs = small([70, 5], hq=1, hk=1, hv=2, head_k=head_k, head_v=head_v, dtype=torch.float32)
    assert_prefill(inputs, *prefill(inputs))


@pytest.mark.parametrize(("hq", "hk", "hv"), [(2, 2, 6), (1, 1, 4), (6, 2, 2), (4, 1, 1)])
def test_grouped_heads_follow_the_explicit_expansion(hq: int, hk: int, hv: int) -> None:
    inputs = small(hq=hq, hk=hk, hv=hv, dtype=torch.float32)
    heads = max(hq, hv)
    expanded = dict(inputs)
    for name, count in (("q", hq), ("k", hk), ("v", hv)):
        expanded[name] = inputs[name][:, [i // (heads // count) for i in range(heads)]]
    assert_prefill(expanded, *prefill(inputs))


# --- memory of the caller ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_of_the_caller(dtype: torch.dtype) -> None:
    inputs = small()
    wide = nans(198, 6, 80, dtype=dtype)
    output, _ = prefill(inputs, output=wide[:, 1:5, 8:72])
    assert output.data_ptr() == wide[:, 1:5, 8:72].data_ptr()
    assert_prefill(inputs, wide[:, 1:5, 8:72])
    wide[:, 1:5, 8:72] = torch.nan
    assert bool(wide.isnan().all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("returned", [True, False])
def test_output_state_of_the_caller(dtype: torch.dtype, returned: bool) -> None:
    inputs = small(state=torch.bfloat16)
    own = Pool(nans(5, 4, 64, 32, dtype=dtype), range(5), size=5)
    initial = inputs["initial_state"].clone()
    result = gd.chunk_gated_delta_rule(**inputs, output_state=own.view, output_final_state=returned)
    assert isinstance(result, tuple) == returned
    assert_prefill(inputs, result[0] if isinstance(result, tuple) else result, own.view)
    assert own.untouched_except(range(5))
    assert torch.equal(initial, inputs["initial_state"])


# --- pools ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("named", [None, "same", "view"])
def test_pool_in_place(paged: bool, index: torch.dtype, dtype: torch.dtype, named: str | None) -> None:
    inputs = small(state=dtype)
    slots = [6, 2, 9, 0, 4]
    pool = Pool(inputs["initial_state"], slots, size=11, paged=paged)
    target = {None: None, "same": pool.view, "view": pool.view[:]}[named]
    output, state = prefill(
        {**inputs, "initial_state": pool.view}, state_indices=strided(slots, index), output_state=target
    )
    assert state.data_ptr() == pool.view.data_ptr()
    assert_prefill(inputs, output, pool.view[slots])
    assert pool.untouched_except(slots)


def test_pool_is_only_read_without_output_final_state() -> None:
    inputs = small()
    pool = Pool(inputs["initial_state"], [6, 2, 9, 0, 4], size=11)
    output = gd.chunk_gated_delta_rule(
        **{**inputs, "initial_state": pool.view}, state_indices=torch.tensor([6, 2, 9, 0, 4])
    )
    assert isinstance(output, Tensor)
    assert_prefill(inputs, output)
    assert pool.untouched_except([])


@pytest.mark.parametrize("fresh", [True, False])
def test_separate_output_pool(fresh: bool) -> None:
    inputs, slots = small(state=torch.bfloat16), [6, 2, 9, 0, 4]
    source = Pool(inputs["initial_state"], slots, size=11)
    target = Pool(nans(5, 4, 64, 32), slots, size=11)
    logical = without(inputs, "initial_state") if fresh else inputs
    given = logical if fresh else {**inputs, "initial_state": source.view}
    output, state = prefill(given, state_indices=torch.tensor(slots), output_state=target.view)
    assert state.data_ptr() == target.view.data_ptr()
    assert_prefill(logical, output, target.view[slots])
    assert source.untouched_except([])
    assert target.untouched_except(slots)


@pytest.mark.parametrize("null_slot", [None, 0, 3])
@pytest.mark.parametrize("ours", [True, False])
def test_padding_rows(null_slot: int | None, ours: bool) -> None:
    inputs, live = small(), [0, 3, 4]
    padding = -1 if null_slot is None else null_slot
    slots = [5, padding, padding, 1, 7]
    pool = Pool(inputs["initial_state"], slots, size=9)
    if null_slot is not None:
        pool = Pool(inputs["initial_state"][live], [5, 1, 7], size=9)
    given = {**poison_tokens(inputs, span(inputs, 2)), "initial_state": pool.view}
    mine = None if ours else nans(198, 4, 64, dtype=torch.bfloat16)
    output, _ = prefill(given, state_indices=torch.tensor(slots), null_slot=null_slot, output=mine)
    padded = output[span(inputs, 2)]
    assert bool((padded == 0).all() if ours else padded.isnan().all())
    seen = torch.cat([output[span(inputs, i)] for i in live])
    assert_prefill(sequences(inputs, live), seen, pool.view[[5, 1, 7]])
    assert pool.untouched_except([5, 1, 7])


@pytest.mark.parametrize("pooled", [True, False])
def test_sequences_without_initial_state_start_from_zero(pooled: bool) -> None:
    inputs = small()
    has = strided([0, 0, 1, 1, 0], torch.bool)
    states = torch.where(has[:, None, None, None], inputs["initial_state"], 0.0)
    stale = torch.where(has[:, None, None, None], inputs["initial_state"], torch.nan)
    slots = [6, 2, 9, 0, 4]
    pool = Pool(stale, slots, size=11)
    where = {"initial_state": pool.view, "state_indices": torch.tensor(slots)} if pooled else {"initial_state": stale}
    output, state = prefill({**inputs, **where}, has_initial_state=has)
    assert_prefill({**inputs, "initial_state": states}, output, state[slots] if pooled else state)
    assert bool((state[2 if pooled else 1] == 0).all())


def test_a_slot_is_reused_after_nan() -> None:
    """Prefill into a slot full of NaN, then decode from it."""
    inputs = recurrent_inputs(1, 1, dtype=torch.float32)
    packed = {name: inputs[name][0] for name in "qkv"}
    gates = {"g": reference.decay(inputs["A_log"], inputs["a"][0], inputs["dt_bias"]), "beta": torch.full((1, 4), 0.5)}
    pool = nans(3, 4, 64, 64)
    where = {"initial_state": pool, "state_indices": torch.tensor([2]), "cu_seqlens": starts([1])}
    fresh = {"has_initial_state": torch.tensor([False]), "use_qk_l2norm_in_kernel": True}
    output, _ = prefill({**packed, **gates, **where}, **fresh)
    logical = {**packed, **gates, "cu_seqlens": starts([1]), "use_qk_l2norm_in_kernel": True}
    assert_prefill(logical, output, pool[2:])
    inputs["state"] = pool[2:].clone()
    given = {name: value for name, value in inputs.items() if name != "state"}
    given |= {"state": None, "initial_state": pool, "initial_state_indices": torch.tensor([2])}
    after, _ = gd.gated_delta_rule_decode_pretranspose(**given)
    assert_recurrent(inputs, after, pool[2:])
    assert bool(pool[:2].isnan().all())


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 7], [7, 0], [0, 0, 64, 0, 0, 65, 0], [1, 0, 1]])
@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_sequences_keep_their_state(lengths: list[int], dtype: torch.dtype) -> None:
    inputs = small(lengths, state=dtype)
    output, state = prefill(inputs)
    empty = [i for i, length in enumerate(lengths) if length == 0]
    assert torch.equal(state[empty], inputs["initial_state"][empty])
    assert_prefill(inputs, output, state)
    _, fresh = prefill(without(inputs, "initial_state"))
    assert bool((fresh[empty] == 0).all())


def test_no_sequences_at_all() -> None:
    inputs = without(small([3]), "initial_state")
    output, state = prefill({**inputs, "cu_seqlens": torch.tensor([0])})
    assert output.shape == (3, 4, 64)
    assert bool((output == 0).all())
    assert state.shape == (0, 4, 64, 32)


@pytest.mark.parametrize("ours", [True, False])
def test_tokens_behind_the_last_sequence_are_padding(ours: bool) -> None:
    inputs = small([33, 70, 20])
    given = poison_tokens(inputs, slice(103, 123))
    given |= {"cu_seqlens": inputs["cu_seqlens"][:3], "initial_state": inputs["initial_state"][:2]}
    output, state = prefill(given, output=None if ours else nans(123, 4, 64, dtype=torch.bfloat16))
    behind = output[103:]
    assert bool((behind == 0).all() if ours else behind.isnan().all())
    assert_prefill(sequences(inputs, [0, 1]), output[:103], state)


@pytest.mark.parametrize("gates", ["strong", "mix"])
def test_long_sequence(gates: str) -> None:
    inputs = with_state(prefill_inputs([32768], hq=1, hk=1, hv=1, head_k=32, head_v=32, gates=gates))
    assert_prefill(inputs, *prefill(inputs))


# --- checkpoints and continuation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [64, 128])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("padded", [True, False])
def test_checkpoints_are_the_final_states_of_prefixes(every: int, dtype: torch.dtype, padded: bool) -> None:
    lengths = [64, 200, 0, 128, 63]
    inputs = small(lengths, dtype=torch.float32, state=torch.bfloat16)
    counts = [length // every for length in lengths]
    first = [2, 5, 9, 9, 12, 12]
    stored = Pool(nans(1, 4, 64, 32, dtype=dtype), [0], size=14)
    slots = [3, -1 if padded else 1, 2, 5, 0]
    pool = Pool(inputs["initial_state"], slots, size=6)
    prefill(
        {**inputs, "initial_state": pool.view}, state_indices=torch.tensor(slots), state_checkpoints=stored.view,
        checkpoint_cu_starts=strided(first, torch.int32), checkpoint_every_n_tokens=every,
    )  # fmt: skip
    if padded:
        counts[1] = 0
    written = [first[i] + j for i, count in enumerate(counts) for j in range(count)]
    assert stored.untouched_except(written)
    for i, count in enumerate(counts):
        alone = sequences(inputs, [i])
        for j in range(count):
            state = nans(1, 4, 64, 32, dtype=dtype)
            prefill(tokens(alone, 0, (j + 1) * every), output_state=state)
            assert torch.equal(stored.view[first[i] + j], state[0]), (i, j)


@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_at_the_exact_end_is_the_final_state(dtype: torch.dtype) -> None:
    inputs = small([192, 64], state=dtype)
    stored = nans(4, 4, 64, 32, dtype=dtype)
    _, state = prefill(
        inputs, state_checkpoints=stored, checkpoint_cu_starts=starts([3, 1]), checkpoint_every_n_tokens=64
    )
    assert torch.equal(stored[[2, 3]], state)
    assert bool(stored.isfinite().all())


def test_checkpoints_within_budget_of_a_bf16_state() -> None:
    inputs = small([130, 64], state=torch.bfloat16)
    stored = nans(3, 4, 64, 32, dtype=torch.bfloat16)
    prefill(inputs, state_checkpoints=stored, checkpoint_cu_starts=starts([2, 1]), checkpoint_every_n_tokens=64)
    evaluated = evaluations(oracle.prefill, inputs, checkpoint_every_n_tokens=64)
    assert_within_budget("checkpoints", stored, *(torch.stack(each.kept) for each in evaluated))


@pytest.mark.parametrize("splits", [(64,), (128, 192), (1,), (63,), (65, 66), (5, 64, 199), (0, 200)])
@pytest.mark.parametrize("gates", ["none", "model"])
def test_continuation(splits: tuple[int, ...], gates: str) -> None:
    inputs = small([200], gates=gates, dtype=torch.float32)
    outputs, state = [], inputs["initial_state"]
    for first, last in zip((0, *splits), (*splits, 200), strict=True):
        output, state = prefill({**tokens(inputs, first, last), "initial_state": state})
        outputs.append(output)
    assert_prefill(inputs, torch.cat(outputs), state)


# --- bits -------------------------------------------------------------------------------------------------------------

SIZES = [
    {"hq": 1, "hk": 1, "hv": 1},
    {"hq": 2, "hk": 2, "hv": 6, "head_k": 96, "head_v": 192},
    {"hq": 4, "hk": 2, "hv": 2, "head_k": 128, "head_v": 128},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sequence_has_its_own_bits_whatever_the_batch(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = small([70, 0, 130, 1, 64, 33], dtype=dtype, **sizes)
    output, state = prefill(inputs, use_qk_l2norm_in_kernel=True)
    for chosen in ([0], [1], [2], [3], [4], [5], [5, 2], [3, 1, 4, 0, 2, 5]):
        some, some_state = prefill(sequences(inputs, chosen), use_qk_l2norm_in_kernel=True)
        expected = torch.cat([output[span(inputs, i)] for i in chosen])
        assert torch.equal(some, expected), chosen
        assert torch.equal(some_state, state[chosen]), chosen


def test_the_same_bits_every_run() -> None:
    inputs = small([300, 7, 129], head_k=128, head_v=128)
    first = prefill(inputs)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, prefill(inputs), strict=True))


def test_max_seqlen_changes_nothing() -> None:
    inputs = small()
    hinted = prefill(inputs, max_seqlen=4096)
    assert all(torch.equal(x, y) for x, y in zip(hinted, prefill(inputs), strict=True))


def test_pool_of_more_than_2_to_the_31_elements() -> None:
    inputs = with_state(prefill_inputs([70, 33], hq=2, hk=2, hv=2, head_k=256, head_v=256), dtype=torch.bfloat16)
    wrap = 2**31 // (2 * 256 * 256)
    pool = torch.empty(wrap + 4, 2, 256, 256, dtype=torch.bfloat16)  # never touched as a whole
    slots = [1, wrap + 2]
    pool[slots] = inputs["initial_state"]
    pool[2] = 7.0
    output, _ = prefill({**inputs, "initial_state": pool}, state_indices=torch.tensor(slots, dtype=torch.int32))
    assert pool.numel() > 2**31
    assert_prefill(inputs, output, pool[slots])
    assert bool((pool[2] == 7).all())
