"""Triton's prefill against the contract, on shapes that Triton's interpreter can bear. What tensor cores make cannot
keep the budget of an fp32 evaluation where it is stored in more bits than the activations have, so the plain evaluation
here rounds to their dtype what enters a product: S and u.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from gated_delta import plans
from gated_delta.errors import BackendError
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, to_device, with_state
from helpers import (
    DEVICE,
    FLOATS,
    Pool,
    nans,
    prefill,
    same_bits,
    sequences,
    span,
    tokens,
)
from prefill_helpers import assert_right, constant, every_fifth, rounded, run, spread, unit

host = import_module("gated_delta.kernels.triton.prefill")
LOW = (torch.bfloat16, torch.float16)
BOTH = (torch.bfloat16, torch.float32)
"""By chunks and by tokens."""


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU fewer programs to interpret."""
    if DEVICE == "cpu":
        monkeypatch.setattr(host, "TOKENS", host.Tiles(32, 1, 4))


def small(lengths: Any = (70, 0, 5), *, state: torch.dtype = torch.float32, **options: Any) -> Inputs:
    sizes = {"hq": 1, "hk": 1, "hv": 2, "head_k": 32, "head_v": 32}
    return with_state(prefill_inputs(lengths, **{**sizes, **options}), dtype=state)


def without(inputs: Inputs, left_out: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name != left_out}


def on_device(pool: Pool) -> Pool:
    """The same pool on the device."""
    pool.page, pool._before = pool.page.to(DEVICE), pool._before.to(DEVICE)
    pool.view = pool._cut(pool.page)
    return pool


GATES: dict[str, Callable[[torch.dtype], Inputs]] = {
    **{kind: lambda t, kind=kind: small(dtype=t, gates=kind) for kind in ("none", "weak", "mix", "model", "strong")},
    "linear": lambda t: small(dtype=t, g_space="linear"),
    "-20 nats, then weak": lambda t: every_fifth(small(dtype=t, gates="weak"), "g", -20.0),
    "log gate 0 and -inf": lambda t: every_fifth(small(dtype=t, gates="weak"), "g", 0.0, -torch.inf),
    "alpha 0 and 1": lambda t: every_fifth(small(dtype=t, gates="weak", g_space="linear"), "g", 0.0, 1.0),
    "alpha all 0": lambda t: constant(small(dtype=t, g_space="linear"), "g", 0.0),
    "beta 0, 1 and 2": lambda t: every_fifth(small(dtype=t), "beta", 0.0, 1.0, 2.0),
    "beta all 0": lambda t: constant(small(dtype=t), "beta", 0.0),
    "similar keys": lambda t: constant(small([150], dtype=t, gates="weak", similar_keys=True), "beta", 1.0),
    "similar keys, beta 2": lambda t: constant(small([150], dtype=t, gates="weak", similar_keys=True), "beta", 2.0),
    "short vectors to normalise": lambda t: unit(small(dtype=t), 2e-3),
    "long vectors to normalise": lambda t: unit(small(dtype=t), 30.0),
}


@pytest.mark.parametrize("name", GATES)
def test_by_chunks(name: str) -> None:
    inputs = GATES[name](torch.bfloat16)
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize(
    "name", ["linear", "log gate 0 and -inf", "similar keys, beta 2", "short vectors to normalise"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activations(name: str, dtype: torch.dtype) -> None:
    inputs = GATES[name](dtype)
    assert_right(inputs, *run(inputs))


@pytest.mark.skipif(DEVICE == "cpu", reason="goes token by token; what it looks for is a compiler's")
def test_fp32_does_not_drift() -> None:
    """Were the state that is stored rounded otherwise than the one that goes on, errors would add up."""
    sizes: dict[str, Any] = {"hq": 1, "hk": 1, "hv": 1, "head_k": 32, "head_v": 32}
    inputs = prefill_inputs([8192], **sizes, gates="none", dtype=torch.float32)
    assert_right(inputs, *run(inputs))


def test_a_strong_decay_costs_the_weak_ones_behind_it_nothing() -> None:
    """fp16, so that an error of the gates would show: half a chunk of zeros, then weak gates."""
    inputs = small([64], dtype=torch.float16, gates="weak", g_space="linear")
    inputs["g"][:32] = 0.0
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize("left_out", ["g", "beta"])
@pytest.mark.parametrize("dtype", BOTH)
def test_gates_left_out_are_one(left_out: str, dtype: torch.dtype) -> None:
    inputs = small(dtype=dtype, gates="weak", g_space="linear")
    assert_right(constant(inputs, left_out, 1.0), *run(without(inputs, left_out)))


@pytest.mark.parametrize("scale", [0.0, -2.5])
@pytest.mark.parametrize("dtype", BOTH)
def test_any_scale_is_honoured(scale: float, dtype: torch.dtype) -> None:
    inputs = small([40], dtype=dtype)
    output, state = run(inputs, scale=scale)
    assert_right({**inputs, "scale": scale}, output, state)
    assert bool((output == 0).all()) == (scale == 0)


@pytest.mark.parametrize("heads", [(2, 2, 4), (1, 1, 3), (4, 2, 2)])
@pytest.mark.parametrize("dtype", BOTH)
def test_grouped_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = small([70], dtype=dtype, **dict(zip(("hq", "hk", "hv"), heads, strict=True)))
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize(("head_k", "head_v"), [(96, 32), (32, 96), (64, 192), (128, 64), (192, 32), (256, 32)])
@pytest.mark.parametrize("dtype", BOTH)
def test_head_sizes(head_k: int, head_v: int, dtype: torch.dtype) -> None:
    inputs = small([66], hv=1, dtype=dtype, head_k=head_k, head_v=head_v)
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize("dtype", BOTH)
def test_rows_of_fused_buffers(dtype: torch.dtype) -> None:
    inputs = small([33, 70], dtype=dtype)
    given = to_device(inputs, DEVICE)
    fused = torch.cat([given[name].flatten(1) for name in "qkv"], dim=1)
    for name, x in zip("qkv", fused.split([given[name].flatten(1).shape[1] for name in "qkv"], dim=1), strict=True):
        given[name] = x.unflatten(1, given[name].shape[1:])
    for name in ("g", "beta"):
        given[name] = torch.cat((given[name], nans(103, 3).to(DEVICE)), dim=1)[:, :2]
    given["cu_seqlens"] = spread(inputs["cu_seqlens"].tolist())
    assert_right(inputs, *prefill(given, backend="triton"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activations", BOTH)
def test_output_and_states_of_the_caller(dtype: torch.dtype, activations: torch.dtype) -> None:
    inputs = small(state=dtype, dtype=activations)
    wide = nans(75, 4, 48, dtype=dtype).to(DEVICE)
    states = on_device(Pool(nans(3, 2, 32, 32, dtype=dtype), range(3), size=3))
    output, state = run(inputs, output=wide[:, 1:3, 8:40], output_state=states.view)
    assert_right(inputs, wide[:, 1:3, 8:40], state)
    assert output.dtype == state.dtype == dtype
    wide[:, 1:3, 8:40] = torch.nan
    assert bool(wide.isnan().all())
    assert states.untouched_except(range(3))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activations", BOTH)
def test_pool_in_place(dtype: torch.dtype, activations: torch.dtype) -> None:
    inputs, slots = small(state=dtype, dtype=activations), [6, 2, 9]
    pool = on_device(Pool(inputs["initial_state"], slots, size=11))
    output, state = prefill(
        {**to_device(inputs, DEVICE), "initial_state": pool.view},
        state_indices=spread(slots, torch.int32), backend="triton",
    )  # fmt: skip
    assert state.data_ptr() == pool.view.data_ptr()
    assert_right(inputs, output, pool.view[slots])
    assert pool.untouched_except(slots)


@pytest.mark.parametrize("null_slot", [None, 3])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", BOTH)
def test_padding_rows(null_slot: int | None, ours: bool, dtype: torch.dtype) -> None:
    inputs = small([33, 66, 20], dtype=dtype)
    slots = [5, -1 if null_slot is None else null_slot, 1]
    pool = on_device(Pool(inputs["initial_state"][[0, 2]], [5, 1], size=9))
    given = {**to_device(inputs, DEVICE), "initial_state": pool.view}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = given[name].clone()
        given[name][33:99] = torch.nan
    mine = None if ours else nans(119, 2, 32, dtype=dtype).to(DEVICE)
    options = {"state_indices": torch.tensor(slots, device=DEVICE), "null_slot": null_slot, "output": mine}
    output, _ = prefill(given, **options, backend="triton")
    padded = output[33:99]
    assert bool((padded == 0).all() if ours else padded.isnan().all())
    assert_right(sequences(inputs, [0, 2]), torch.cat((output[:33], output[99:])), pool.view[[5, 1]])
    assert pool.untouched_except([5, 1])


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("dtype", BOTH)
def test_sequences_without_initial_state_start_from_zero(pooled: bool, dtype: torch.dtype) -> None:
    inputs = small([33, 0, 20], dtype=dtype)
    has = spread([0, 0, 1], torch.bool)
    chosen = has.cpu()[:, None, None, None]
    logical = {**inputs, "initial_state": torch.where(chosen, inputs["initial_state"], 0.0)}
    pool = on_device(Pool(torch.where(chosen, inputs["initial_state"], torch.nan), [6, 2, 4], size=7))
    where: Inputs = {"initial_state": pool.view[[6, 2, 4]]}
    if pooled:
        where = {"initial_state": pool.view, "state_indices": torch.tensor([6, 2, 4], device=DEVICE)}
    given = to_device(inputs, DEVICE)
    output, state = prefill({**given, **where}, has_initial_state=has, backend="triton")
    assert_right(logical, output, state[[6, 2, 4]] if pooled else state)
    assert bool((state[2 if pooled else 1] == 0).all())


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 4 GiB")
def test_pool_of_more_than_2_to_the_31_elements() -> None:
    inputs = small([70, 33], hv=2, head_k=256, head_v=256, state=torch.bfloat16)
    wrap = 2**31 // (2 * 256 * 256)
    pool = torch.empty(wrap + 4, 2, 256, 256, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([1, wrap + 2], device=DEVICE)
    pool[slots], pool[2] = inputs["initial_state"].to(DEVICE), 7.0
    output, _ = prefill({**to_device(inputs, DEVICE), "initial_state": pool}, state_indices=slots, backend="triton")
    assert_right(inputs, output, pool[slots])
    assert bool((pool[2] == 7).all())


@pytest.mark.parametrize("lengths", [[0], [0, 0, 65, 0, 1, 0, 64, 0]])
@pytest.mark.parametrize("dtype", BOTH)
def test_empty_sequences_keep_their_state(lengths: list[int], dtype: torch.dtype) -> None:
    inputs = small(lengths, dtype=dtype, hv=1)
    output, state = run(inputs)
    empty = [i for i, length in enumerate(lengths) if length == 0]
    assert torch.equal(state[empty], inputs["initial_state"][empty])
    assert_right(inputs, output, state)
    assert bool((run(without(inputs, "initial_state"))[1][empty] == 0).all())


def test_many_sequences() -> None:
    """More than a program looks at at once when it seeks its own; all but two are padding."""
    inputs, live = small([1, 0, 2] * 44 + [70], hv=1), [50, 132]
    slots = torch.tensor([i if i in live else -1 for i in range(133)])
    output, state = run(inputs, initial_state=inputs["initial_state"].clone(), state_indices=slots)
    assert_right(sequences(inputs, live), torch.cat([output[span(inputs, i)] for i in live]), state[live])


@pytest.mark.parametrize("dtype", BOTH)
def test_no_sequences_at_all(dtype: torch.dtype) -> None:
    inputs = without(small([3], dtype=dtype), "initial_state")
    output, state = run(inputs, cu_seqlens=torch.tensor([0]))
    assert bool((output == 0).all())
    assert state.shape == (0, 2, 32, 32)
    assert bool(run(inputs, cu_seqlens=torch.tensor([0]), output=nans(3, 2, 32))[0].isnan().all())


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("dtype", BOTH)
def test_tokens_behind_the_last_sequence_are_padding(ours: bool, dtype: torch.dtype) -> None:
    inputs = small([33, 70, 100], dtype=dtype)
    given = {**inputs, "cu_seqlens": inputs["cu_seqlens"][:3], "initial_state": inputs["initial_state"][:2]}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = inputs[name].clone()
        given[name][103:] = torch.nan
    output, state = run(given, output=None if ours else nans(203, 2, 32, dtype=dtype))
    behind = output[103:]
    assert bool((behind == 0).all() if ours else behind.isnan().all())
    assert_right(sequences(inputs, [0, 1]), output[:103], state)


@pytest.mark.parametrize("every", [64, 128])
@pytest.mark.parametrize("dtype", BOTH)
def test_checkpoints_are_the_final_states_of_prefixes(every: int, dtype: torch.dtype) -> None:
    lengths, first = [64, 200, 0, 63], [2, 4, 8, 9, 9]
    inputs = small(lengths, dtype=dtype, hv=1, state=torch.bfloat16)
    stored = on_device(Pool(nans(1, 1, 32, 32), [0], size=12))
    prefill(
        to_device(inputs, DEVICE), state_checkpoints=stored.view, checkpoint_every_n_tokens=every, backend="triton",
        checkpoint_cu_starts=spread(first, torch.int32),
    )  # fmt: skip
    written = [first[i] + j for i, length in enumerate(lengths) for j in range(length // every)]
    assert stored.untouched_except(written)
    for i, length in enumerate(lengths):
        alone = sequences(inputs, [i])
        for j in range(length // every):
            _, state = run(tokens(alone, 0, (j + 1) * every), output_state=nans(1, 1, 32, 32))
            assert same_bits(stored.view[first[i] + j].cpu(), state[0]), (i, j)
    exact = oracle.prefill(**inputs, checkpoint_every_n_tokens=every).kept
    plain = rounded(inputs, every).kept
    assert_within_budget("checkpoints", stored.view[written], torch.stack(plain), torch.stack(exact))


@pytest.mark.parametrize("splits", [(64,), (1, 65), (0, 128)])
@pytest.mark.parametrize("dtype", BOTH)
def test_continuation(splits: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = small([150], dtype=dtype, hv=1)
    outputs, state = [], inputs["initial_state"]
    for first, last in zip((0, *splits), (*splits, 150), strict=True):
        output, state = run({**tokens(inputs, first, last), "initial_state": state})
        outputs.append(output)
    assert_right(inputs, torch.cat(outputs), state)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_sequence_has_its_own_bits_whatever_the_batch(dtype: torch.dtype) -> None:
    inputs = small([70, 0, 1, 64], dtype=dtype)
    output, state = run(inputs, use_qk_l2norm_in_kernel=True)
    for chosen in ([0], [1], [2], [3, 0]):
        some, some_state = run(sequences(inputs, chosen), use_qk_l2norm_in_kernel=True)
        assert same_bits(some, torch.cat([output[span(inputs, i)] for i in chosen])), chosen
        assert same_bits(some_state, state[chosen]), chosen


@pytest.mark.parametrize(
    "tiles", [host.Tiles(64, 4, 3), host.Tiles(64, 4, 1), host.Tiles(32, 8, 2), host.Tiles(16, 4, 2)]
)
def test_tiles_change_no_bit(tiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch chooses the tile, and a sequence's bits must not depend on it (but NumPy's products do)."""
    inputs = small([70, 64], head_k=64, head_v=96)
    before = run(inputs)
    monkeypatch.setattr(host, "chain_tiles", lambda *_: tiles)
    plans._PLANS.clear()
    after = run(inputs)
    assert_right(inputs, *after)
    assert DEVICE == "cpu" or all(same_bits(x, y) for x, y in zip(before, after, strict=True))


def test_more_sequences_than_a_grid_has_room_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MOST_SEQUENCES", 2)
    message = "chunk_gated_delta_rule: cu_seqlens is of 3 sequences; it must be of at most 2 for the backend triton"
    with pytest.raises(BackendError) as caught:
        run(small())
    assert str(caught.value) == message


def test_tiles_fit_small_gpus() -> None:
    assert [host.chain_tiles(128, 128, states, False, 232448, 132)[::2] for states in (16, 32, 34, 512)] == [
        (16, 3), (32, 3), (64, 3), (64, 3),
    ]  # fmt: skip
    assert [host.chain_tiles(128, 128, states, True, 232448, 132).stages for states in (32, 512)] == [3, 1]
    assert host.chain_tiles(128, 128, 512, False, 166912, 108).stages == 2
    assert host.chain_tiles(128, 128, 512, False, 101376, 84).stages == 1
