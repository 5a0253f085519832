"""Prefill of Hopper against the contract: on a Hopper GPU, and on CPUs by the emulator, which also finds races."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gluon_emulator
from gated_delta.testing.inputs import Inputs, prefill_inputs, to_device, with_state
from helpers import DEVICE, FLOATS, Pool, nans, prefill, same_bits, sequences, span, tokens
from prefill_helpers import assert_right, constant, every_fifth, run, serve, spread, unit

host, launch = (import_module(f"gated_delta.kernels.{name}") for name in ("gluon.prefill", "triton.launch"))
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not HOPPER, reason="needs a Hopper GPU, or none")
emulated = pytest.mark.skipif(DEVICE == "cuda", reason="looks for what a GPU may get right by chance")


@pytest.fixture(autouse=True)
def in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, host)
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "bind", gluon_emulator.bind)
        monkeypatch.setattr(host, "_processors", lambda _: 3)


@pytest.fixture(params=[1, 2, 3])
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """That compute, in a program, where the plan would be for one: the third one prepares chunks."""
    monkeypatch.setattr(host, "plan", lambda *_: host.Plan(min(request.param, 2), make=request.param == 3))
    return request.param


with_either = pytest.mark.usefixtures("groups")


def small(lengths: Any = (70, 0, 5), *, state: torch.dtype = torch.float32, **options: Any) -> Inputs:
    sizes = {"hq": 1, "hk": 1, "hv": 1, "head_k": 128, "head_v": 128}
    return with_state(prefill_inputs(lengths, **{**sizes, **options}), dtype=state)


def forgetful(inputs: Inputs) -> Inputs:
    """Two tokens forget everything, so that the decay of their chunk, the second of its sequence, is strong."""
    changed = inputs["g"].clone()
    changed[70], changed[74] = -torch.inf, -120.0
    return {**inputs, "g": changed}


GATES: dict[str, Callable[[torch.dtype], Inputs]] = {
    **{kind: lambda t, kind=kind: small(dtype=t, gates=kind) for kind in ("none", "weak", "mix", "model", "strong")},
    "linear": lambda t: small(dtype=t, g_space="linear"),
    "-20 nats, then weak": lambda t: every_fifth(small(dtype=t, gates="weak"), "g", -20.0),
    "log gate 0 and -inf": lambda t: every_fifth(small(dtype=t, gates="weak"), "g", 0.0, -torch.inf),
    "alpha 0 and 1": lambda t: every_fifth(small(dtype=t, gates="weak", g_space="linear"), "g", 0.0, 1.0),
    "a strong decay between weak ones": lambda t: forgetful(small([330], dtype=t, gates="weak")),
    "the same, normalised": lambda t: unit(forgetful(small([330], dtype=t, gates="weak", similar_keys=True)), 30.0),
    "alpha all 0": lambda t: constant(small(dtype=t, g_space="linear"), "g", 0.0),
    "beta 0, 1 and 2": lambda t: every_fifth(small(dtype=t), "beta", 0.0, 1.0, 2.0),
    "beta all 0": lambda t: constant(small(dtype=t), "beta", 0.0),
    "similar keys": lambda t: small([330], dtype=t, gates="weak", similar_keys=True),
    "similar keys, beta 1": lambda t: constant(small([330], dtype=t, gates="weak", similar_keys=True), "beta", 1.0),
    "similar keys, beta 2": lambda t: constant(small([330], dtype=t, gates="weak", similar_keys=True), "beta", 2.0),
    "similar keys, no decay": lambda t: small([330], dtype=t, gates="none", similar_keys=True),
    "normalised": lambda t: small(dtype=t, gates="weak") | {"use_qk_l2norm_in_kernel": True},
    "short vectors to normalise": lambda t: unit(small(dtype=t, similar_keys=True), 1e-4),
    "long vectors to normalise": lambda t: unit(small(dtype=t), 30.0),
    "similar keys to normalise": lambda t: unit(small([330], dtype=t, gates="weak", similar_keys=True), 30.0),
}


@with_either
@pytest.mark.parametrize("name", GATES)
def test_gates_and_keys(name: str) -> None:
    inputs = GATES[name](torch.bfloat16)
    assert_right(inputs, *run(inputs))


@with_either
@pytest.mark.parametrize("name", GATES)
def test_fp16(name: str) -> None:
    inputs = GATES[name](torch.float16)
    assert_right(inputs, *run(inputs))


def test_a_strong_decay_costs_the_weak_ones_behind_it_nothing() -> None:
    """fp16, so that an error of the gates would show: half a chunk of zeros, then weak gates."""
    inputs = small([64], dtype=torch.float16, gates="weak", g_space="linear")
    inputs["g"][:32] = 0.0
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize(("left_out", "space", "one"), [("g", "linear", 1.0), ("g", "log", 0.0), ("beta", "log", 1.0)])
def test_gates_left_out_are_one(left_out: str, space: str, one: float) -> None:
    inputs = small(gates="weak", g_space=space)
    given = {name: value for name, value in inputs.items() if name != left_out}
    assert_right(constant(inputs, left_out, one), *run(given))


@pytest.mark.parametrize("scale", [0.0, -2.5])
def test_any_scale_is_honoured(scale: float) -> None:
    inputs = small([40]) | {"scale": scale}
    output, state = run(inputs)
    assert_right(inputs, output, state)
    assert bool((output == 0).all()) == (scale == 0)


@with_either
@pytest.mark.parametrize("heads", [(2, 2, 4), (1, 1, 3), (4, 2, 2)])
def test_grouped_heads(heads: tuple[int, int, int]) -> None:
    inputs = small([70], **dict(zip(("hq", "hk", "hv"), heads, strict=True)))
    assert_right(inputs, *run(inputs))


@with_either
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 400])
def test_lengths(length: int) -> None:
    inputs = small([length], gates="weak")
    assert_right(inputs, *run(inputs))


@pytest.mark.parametrize(
    ("total", "count", "heads", "whole", "expected"),
    [
        (32768, 8, 32, False, (True, False, False)),  # states fill the processors
        (32768, 1, 8, False, (False, True, False)),  # here they do not
        (32768, 1, 8, True, (False, True, True)),
        (32768, 1, 32, False, (False, True, True)),
        (32768, 2, 24, True, (False, False, False)),
        (64, 1, 32, False, (True, False, False)),  # one launch is soonest done
        (16384, 256, 32, True, (True, False, False)),
    ],
)
def test_plan(total: int, count: int, heads: int, whole: bool, expected: tuple[bool, bool]) -> None:
    """Whether programs prepare, and whether there are parts."""
    _, part, make, in_turn = host.plan(total, count, heads, 132, whole)
    assert (make, part > 0, in_turn) == expected


@with_either
def test_rows_of_fused_buffers() -> None:
    inputs = small([33, 70], hv=2)
    given = to_device(inputs, DEVICE)
    fused = torch.cat([given[name].flatten(1) for name in "qkv"], dim=1)
    for name, x in zip("qkv", fused.split([given[name].flatten(1).shape[1] for name in "qkv"], dim=1), strict=True):
        given[name] = x.unflatten(1, given[name].shape[1:])
    for name in ("g", "beta"):
        given[name] = torch.cat((given[name], nans(103, 3).to(DEVICE)), dim=1)[:, :2]
    given["cu_seqlens"] = spread(inputs["cu_seqlens"].tolist())
    assert_right(inputs, *prefill(given, backend="triton"))


@with_either
@pytest.mark.parametrize("dtype", FLOATS)
def test_output_and_states_of_the_caller(dtype: torch.dtype) -> None:
    inputs = small(state=dtype)
    wide, states = nans(75, 3, 144, dtype=dtype).to(DEVICE), nans(3, 2, 130, 136, dtype=dtype).to(DEVICE)
    output, state = wide[:, 1:2, 8:136], states[:, 1:, 2:, :128]
    prefill({**to_device(inputs, DEVICE), "output": output, "output_state": state}, backend="triton")
    assert_right(inputs, output, state)
    for x, whole in ((output, wide), (state, states)):
        x[:] = torch.nan
        assert bool(whole.isnan().all())


def pool_of(states: Tensor, slots: list[int], size: int) -> Pool:
    pool = Pool(states, slots, size=size)
    pool.page, pool._before = pool.page.to(DEVICE), pool._before.to(DEVICE)
    pool.view = pool._cut(pool.page)
    return pool


@with_either
@pytest.mark.parametrize("dtype", FLOATS)
def test_pool_in_place(dtype: torch.dtype) -> None:
    inputs, slots = small(state=dtype), [6, 2, 9]
    pool = pool_of(inputs["initial_state"], slots, 11)
    given = {**to_device(inputs, DEVICE), "initial_state": pool.view, "state_indices": spread(slots, torch.int32)}
    output, state = prefill(given, backend="triton")
    assert state.data_ptr() == pool.view.data_ptr()
    assert_right(inputs, output, pool.view[slots])
    assert pool.untouched_except(slots)


@with_either
@pytest.mark.parametrize("null_slot", [None, 3])
@pytest.mark.parametrize("ours", [True, False])
def test_padding_rows(null_slot: int | None, ours: bool) -> None:
    inputs = small([33, 66, 20])
    pool = pool_of(inputs["initial_state"][[0, 2]], [5, 1], 9)
    given = {**to_device(inputs, DEVICE), "initial_state": pool.view}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = given[name].clone()
        given[name][33:99] = torch.nan
    mine = None if ours else nans(119, 1, 128, dtype=torch.bfloat16).to(DEVICE)
    slots = torch.tensor([5, -1 if null_slot is None else null_slot, 1], device=DEVICE)
    output, _ = prefill({**given, "state_indices": slots, "null_slot": null_slot, "output": mine}, backend="triton")
    padded = output[33:99]
    assert bool((padded == 0).all() if ours else padded.isnan().all())
    assert_right(sequences(inputs, [0, 2]), torch.cat((output[:33], output[99:])), pool.view[[5, 1]])
    assert pool.untouched_except([5, 1])


@with_either
@pytest.mark.parametrize("pooled", [True, False])
def test_sequences_without_initial_state_start_from_zero(pooled: bool) -> None:
    inputs, slots = small([33, 0, 20]), [6, 2, 4]
    has = spread([0, 0, 1], torch.bool)
    chosen = has.cpu()[:, None, None, None]
    logical = {**inputs, "initial_state": torch.where(chosen, inputs["initial_state"], 0.0)}
    pool = pool_of(torch.where(chosen, inputs["initial_state"], torch.nan), slots, 7)
    where: Inputs = {"initial_state": pool.view[slots]}
    if pooled:
        where = {"initial_state": pool.view, "state_indices": torch.tensor(slots, device=DEVICE)}
    given = {**to_device(inputs, DEVICE), **where, "has_initial_state": has}
    output, state = prefill(given, backend="triton")
    state = state[slots] if pooled else state
    assert_right(logical, output, state)
    assert bool((state[1] == 0).all())


@with_either
@pytest.mark.parametrize("lengths", [[0], [0, 0, 65, 0, 1, 0, 64, 0]])
def test_empty_sequences_keep_their_state(lengths: list[int]) -> None:
    inputs = small(lengths)
    output, state = run(inputs)
    empty = [i for i, length in enumerate(lengths) if length == 0]
    assert torch.equal(state[empty], inputs["initial_state"][empty])
    assert_right(inputs, output, state)
    assert bool((run({**inputs, "initial_state": None})[1][empty] == 0).all())


@with_either
@pytest.mark.parametrize("ours", [True, False])
def test_no_sequences_at_all(ours: bool) -> None:
    inputs = small([70]) | {"cu_seqlens": torch.tensor([0]), "initial_state": None}
    output, state = run(inputs, output=None if ours else nans(70, 1, 128))
    assert bool((output == 0).all() if ours else output.isnan().all())
    assert state.shape == (0, 1, 128, 128)


@with_either
@pytest.mark.parametrize("ours", [True, False])
def test_tokens_behind_the_last_sequence_are_padding(ours: bool) -> None:
    inputs = small([33, 70, 100])
    given = {**inputs, "cu_seqlens": inputs["cu_seqlens"][:3], "initial_state": inputs["initial_state"][:2]}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = inputs[name].clone()
        given[name][103:] = torch.nan
    output, state = run(given, output=None if ours else nans(203, 1, 128, dtype=torch.bfloat16))
    behind = output[103:]
    assert bool((behind == 0).all() if ours else behind.isnan().all())
    assert_right(sequences(inputs, [0, 1]), output[:103], state)


@with_either
@pytest.mark.parametrize("every", [64, 128])
def test_checkpoints_are_the_final_states_of_prefixes(every: int) -> None:
    lengths, first = [64, 200, 0, 63], [2, 4, 8, 9, 9]
    inputs = small(lengths, state=torch.bfloat16)
    stored = pool_of(nans(1, 1, 128, 128), [0], 12)
    given = {**to_device(inputs, DEVICE), "state_checkpoints": stored.view, "checkpoint_every_n_tokens": every}
    output, state = prefill({**given, "checkpoint_cu_starts": spread(first, torch.int32)}, backend="triton")
    assert_right(inputs, output, state)
    written = [first[i] + j for i, length in enumerate(lengths) for j in range(length // every)]
    assert stored.untouched_except(written)
    for i, length in enumerate(lengths):
        alone = sequences(inputs, [i])
        for j in range(length // every):
            _, state = run(tokens(alone, 0, (j + 1) * every), output_state=nans(1, 1, 128, 128))
            assert same_bits(stored.view[first[i] + j].cpu(), state[0]), (i, j)


@with_either
@pytest.mark.parametrize("splits", [(64,), (1, 65), (0, 128)])
def test_continuation(splits: tuple[int, ...]) -> None:
    inputs = small([150])
    outputs, state = [], inputs["initial_state"]
    for first, last in zip((0, *splits), (*splits, 150), strict=True):
        output, state = run({**tokens(inputs, first, last), "initial_state": state})
        outputs.append(output)
    assert_right(inputs, torch.cat(outputs), state)


@with_either
def test_a_sequence_has_its_own_bits_whatever_the_batch() -> None:
    inputs = small([70, 0, 1, 64]) | {"use_qk_l2norm_in_kernel": True}
    output, state = run(inputs)
    for chosen in ([0], [1], [2], [3, 0]):
        some, some_state = run(sequences(inputs, chosen))
        assert same_bits(some, torch.cat([output[span(inputs, i)] for i in chosen])), chosen
        assert same_bits(some_state, state[chosen]), chosen


def test_batch_invariance_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one processor more for a sequence alone would change how it is cut, and so its bits."""
    for name in ("SUMMARY_US", "PART_US", "SPLIT_US"):
        monkeypatch.setattr(host, name, 0.0)
    host._soonest.cache_clear()
    inputs = small([256, 256], gates="weak")
    assert host.plan(256, 1, 1, 132, False).part == 64
    assert host.plan(256, 1, 1, 132, True).part == 0
    whole, state = run(inputs, deterministic="batch_invariant")
    for i in (0, 1):
        alone, own = run(sequences(inputs, [i]), deterministic="batch_invariant")
        assert same_bits(alone, whole[span(inputs, i)])
        assert same_bits(own[0], state[i])
    cut, _ = run(sequences(inputs, [0]))
    assert not same_bits(cut, whole[span(inputs, 0)])
    host._soonest.cache_clear()


@emulated
def test_the_order_in_which_partitions_run_changes_no_bit(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, before = small([330]), None
    for seed in range(5):
        monkeypatch.setattr(launch, "bind", partial(gluon_emulator.bind, seed=seed))
        after = run(inputs)
        assert before is None or all(same_bits(x, y) for x, y in zip(before, after, strict=True)), seed
        before = after


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("part", [0, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_change_no_bit(dtype: torch.dtype, part: int, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a sequence's bits would hang on the batch. The third one prepares, and does it as a launch of its own."""
    inputs = forgetful(small([200, 0, 65], hv=2, gates="weak", dtype=dtype))
    inputs = unit(inputs, 3.0) if norm else inputs
    found = []
    for plan in (host.Plan(1, part), host.Plan(2, part), host.Plan(2, 0, True)):
        monkeypatch.setattr(host, "plan", lambda *_, plan=plan: plan)
        found += [run(inputs)] if part == 0 or not plan.make else []
    for other in found[1:]:
        assert all(same_bits(x, y) for x, y in zip(found[0], other, strict=True))


@with_either
def test_programs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has all jobs, among them an empty sequence, or each has one."""
    inputs = small([70, 0, 130, 5, 64], hv=2, gates="weak")
    found = []
    for processors in (132, 1, 3):
        monkeypatch.setattr(host, "_processors", lambda _, processors=processors: processors)
        found.append(run(inputs))
    assert_right(inputs, *found[0])
    for other in found[1:]:
        assert all(same_bits(x, y) for x, y in zip(found[0], other, strict=True))
