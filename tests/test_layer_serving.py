"""What serving asks of the layer: refusals that change no state, warm-up, and one captured step for every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import DataError, DeviceError, DtypeError, OptionError, ShapeError
from gated_delta.state import LayerState, StatePool
from helpers import DEVICE, same_bits
from layer_helpers import SMALL, Engine, Move, make_layer, normal

GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def memory(state: LayerState) -> list[Tensor]:
    return [x.contiguous().clone() for x in (state.conv, state.recurrent, state.tickets) if x is not None]


def unchanged(state: LayerState, before: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(memory(state), before, strict=True))


# --- refusals ---------------------------------------------------------------------------------------------------------

MIXED = GatedDeltaNetBatch.build([Row(1, 0), Row(1, 1), Row(3, 2, fresh=True)])
SPECULATIVE = GatedDeltaNetBatch.build([SpecRow(2, [0, 1, 2], 1), Row(1, 3)], num_spec=2)
INDEX = torch.zeros(9, dtype=torch.int32)
BAD_BATCHES: dict[str, tuple[GatedDeltaNetBatch, dict[str, Any], type[Exception], str]] = {
    "rows": (
        MIXED, {"num_prefills": 2}, ShapeError,
        "non_spec_query_start_loc is of shape [4]; it must be [rows+1] with rows=4 (from num_decodes + num_prefills)",
    ),
    "slots": (MIXED, {"non_spec_state_indices": INDEX[:2]}, ShapeError, "non_spec_state_indices is of shape [2]; it m"),
    "no slots": (MIXED, {"non_spec_state_indices": None}, DtypeError, "non_spec_state_indices is None; it must be a t"),
    "history": (MIXED, {"has_initial_state": INDEX[:3]}, DtypeError, "has_initial_state is int32; it must be bool"),
    "index": (MIXED, {"non_spec_state_indices": torch.ones(3)}, DtypeError, "non_spec_state_indices is float32; it mu"),
    "device": (
        MIXED, {"non_spec_state_indices": torch.ones(3, device="meta").int()}, DeviceError,
        "non_spec_state_indices is on meta; it must be on cpu, where non_spec_query_start_loc is",
    ),
    "negative": (MIXED, {"num_prefills": -1}, OptionError, "num_prefills is -1; it must be at least 0"),
    "tokens": (MIXED, {"num_actual_tokens": 4}, OptionError, "num_actual_tokens is 4; it must be at least 5, the toke"),
    "decodes": (MIXED, {"num_decode_tokens": 3}, OptionError, "num_decode_tokens is 3; it must be num_decodes=2, a to"),
    "kinds": (
        SPECULATIVE, {"num_decodes": 1, "num_decode_tokens": 1}, OptionError,
        "num_decodes is 1; it must be 0 beside speculative rows",
    ),
    "accepted": (SPECULATIVE, {"num_accepted_tokens": INDEX[:2]}, ShapeError, "num_accepted_tokens is of shape [2]; i"),
    "places": (SPECULATIVE, {"spec_token_index": INDEX[:1]}, ShapeError, "spec_token_index is of shape [1]; it must b"),
    "columns": (SPECULATIVE, {"spec_state_indices": INDEX[:1]}, ShapeError, "spec_state_indices is of shape [1]; it m"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_metadata_that_contradicts_itself(name: str) -> None:
    """Refused where it is made, so no state can have been written."""
    batch, change, error, message = BAD_BATCHES[name]
    with pytest.raises(error) as raised:
        replace(batch, **change)
    assert str(raised.value).startswith(f"GatedDeltaNetBatch: {message}")


def other(**changes: Any) -> LayerState:
    """State of a layer of another shape."""
    return StatePool(replace(SMALL, **changes), layers=1, slots=24).layer(0)


def _wide(state: LayerState) -> LayerState:
    return state._replace(recurrent=state.recurrent.double())


BAD_STEPS: dict[str, tuple[Callable[[LayerState], tuple[Tensor, LayerState]], type[Exception], str]] = {
    "tokens": (lambda s: (normal(4, 48, seed=0), s), ShapeError, "hidden is of 4 tokens; it must be of at least num_a"),
    "hidden": (lambda s: (normal(5, 47, seed=0), s), ShapeError, "hidden is of shape [5, 47]; it must be [L, 48]"),
    "dtype": (lambda s: (normal(5, 48, seed=0).long(), s), DtypeError, "hidden is int64; it must be bfloat16 or float"),
    "conv": (
        lambda s: (normal(5, 48, seed=0), other(num_v_heads=2)), ShapeError,
        "state.conv is of shape [24, 256, 3]; it must be [P, D, C] with D=384 (from the layer's config)",
    ),
    "state": (
        lambda s: (normal(5, 48, seed=0), s._replace(recurrent=s.recurrent[:, :, :32])), ShapeError,
        "state.recurrent is of shape [24, 4, 32, 32]; it must be [P, HV, V, K] with",
    ),
    "state dtype": (lambda s: (normal(5, 48, seed=0), _wide(s)), DtypeError, "state.recurrent is float64; it must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_that_is_refused_changes_no_state(name: str) -> None:
    """Decodes come before prefills: what only the prefill would refuse is refused before them."""
    given, error, message = BAD_STEPS[name]
    engine = Engine(make_layer())
    before = memory(engine.state)
    hidden, state = given(engine.state)
    with pytest.raises(error) as raised:
        engine.layer(hidden, MIXED, state)
    assert str(raised.value).startswith(f"GatedDeltaNetAttention: {message}")
    assert unchanged(engine.state, before)


@pytest.mark.parametrize(("slots", "message"), [((0, 1, 24), "is 24 somewhere; it must be below 24"),
                                                ((0, 2, 2), "is 2 more than once")])  # fmt: skip
def test_bad_slots_are_found_before_a_state_is_written(slots: tuple[int, ...], message: str) -> None:
    engine = Engine(make_layer())
    before = memory(engine.state)
    batch = replace(MIXED, non_spec_state_indices=torch.tensor(slots, dtype=torch.int32))
    with gd.checked(), pytest.raises(DataError) as raised:
        engine.layer(normal(5, 48, seed=0), batch, engine.state)
    assert f"GatedDeltaNetAttention: non_spec_state_indices {message}" in str(raised.value)
    assert unchanged(engine.state, before)


# --- warm-up and capture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_spec", [0, 2])
def test_warm_up_changes_no_state(num_spec: int) -> None:
    engine = Engine(make_layer(replace(SMALL, num_v_heads=32, head_v_dim=128)), num_spec=num_spec)
    a = engine.add(20)
    engine.step(Move(a, 9))
    before = memory(engine.state)
    for _ in range(2):
        engine.layer.warmup(engine.state, max_batch=2)
        assert unchanged(engine.state, before)
    engine.step(Move(a, 1))
    engine.assert_right()


def test_warm_up_of_nothing() -> None:
    engine = Engine(make_layer())
    with pytest.raises(OptionError, match="max_batch is 0; it must be at least 1"):
        engine.layer.warmup(engine.state, max_batch=0)


def test_warm_up_meets_prefills_behind_any_number_of_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of 4 bytes and flags of one, of which a kernel is told whether they begin at a multiple of 16 bytes."""

    def aligned(decodes: int) -> tuple[bool, bool]:
        return 4 * decodes % 16 == 0, decodes % 16 == 0

    engine, met = Engine(make_layer()), set[tuple[bool, bool]]()
    look = lambda _, p, batch, *given: met.add(aligned(batch.num_decodes))  # noqa: E731
    monkeypatch.setattr(type(engine.layer), "_prefill", look)
    engine.layer.warmup(engine.state, max_batch=1)
    assert met == {aligned(decodes) for decodes in range(17)}


LARGE = GatedDeltaNetConfig(hidden_size=2048, num_k_heads=16, num_v_heads=32)


def served(num_spec: int = 0) -> tuple[Any, StatePool]:
    pool = StatePool(
        LARGE, layers=1, slots=40, num_spec=num_spec, conv_dtype=torch.bfloat16, device=DEVICE, reserve_null=True
    )  # fmt: skip
    return make_layer(LARGE, dtype=torch.bfloat16).to(DEVICE), pool


@GPU
@pytest.mark.parametrize("num_spec", [0, 2])
def test_nothing_compiles_after_warm_up(num_spec: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs  # noqa: PLC0415 (with a GPU only)

    layer, pool = served(num_spec)
    state = pool.layer(0)
    torch.nn.functional.linear(*torch.ones(2, 64, 64, dtype=torch.bfloat16, device=DEVICE))  # cuBLAS has its own
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    layer.warmup(state, max_batch=16)
    assert torch.cuda.max_memory_allocated() - held < 64 * 2**20
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"]) and False)
    plain = [[Row(1, i + 1) for i in range(rows)] for rows in (1, 3, 16)]
    prompts = [
        [Row(n, 20 + i, fresh=True) for i, n in enumerate(lengths)] for lengths in ((300,), (5, 70, 64), (1,) * 9)
    ]
    batches: list[list[Any]] = [*plain, *prompts, *(p + q for p in plain for q in prompts)]
    if num_spec:
        spec = [SpecRow(1 + i % 3, [3 * i + 1, 3 * i + 2, 3 * i + 3], 1 + i % 3) for i in range(6)]
        batches += [spec[:1], spec, [*spec[:2], Row(90, 30)], [Row(1, 30), *spec[:3]]]
    for rows in batches:
        batch = GatedDeltaNetBatch.build(rows, num_spec=num_spec, device=DEVICE)
        layer(torch.zeros(batch.num_actual_tokens, 2048, dtype=torch.bfloat16, device=DEVICE), batch, state)
    assert compiled == []


@GPU
@pytest.mark.parametrize("num_spec", [0, 2])
def test_one_captured_step_serves_every_batch(num_spec: int) -> None:
    """Only the metadata's memory changes between replays; every batch gives what it gives uncaptured."""
    most, tokens = 8, num_spec + 1
    layer, pool = served(num_spec)
    state = pool.layer(0)
    state.conv.normal_()
    state.recurrent.normal_()

    def rows(count: int) -> list[Any]:
        """``count`` of ``most`` rows are somebody's, the rest nobody's."""
        if not num_spec:
            return [Row(1, i + 1 if i < count else -1) for i in range(most)]
        own = [[3 * i + 1, 3 * i + 2, 3 * i + 3] for i in range(most)]
        return [SpecRow(tokens, s if i < count else [-1] * tokens, 1 + i % tokens) for i, s in enumerate(own)]

    batch = GatedDeltaNetBatch.build(rows(most), num_spec=num_spec, device=DEVICE)
    hidden = torch.zeros(most * tokens, 2048, dtype=torch.bfloat16, device=DEVICE)
    layer.warmup(state, max_batch=most)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(hidden, batch, state)
        with torch.cuda.graph(graph):
            output = layer(hidden, batch, state)
    for count in (8, 1, 3, 0, 7):
        wanted = GatedDeltaNetBatch.build(rows(count), num_spec=num_spec, device=DEVICE)
        for name, x in vars(wanted).items():
            if isinstance(x, Tensor):
                getattr(batch, name).copy_(x)
        hidden.copy_(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(count)))
        start = [x.clone() for x in state[:2]]
        graph.replay()
        replayed = [output.clone(), *(x.clone() for x in state[:2])]
        for x, old in zip(state[:2], start, strict=True):
            x.copy_(old)
        again = [layer(hidden, wanted, state), *state[:2]]
        assert all(same_bits(x.contiguous(), y.contiguous()) for x, y in zip(replayed, again, strict=True))
        assert not output[count * tokens :].any()
