"""GatedDeltaNetAttention.forward: every kind of batch against the layer token by token in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gated_delta import layer as layers
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.state import LayerState
from gated_delta.testing.budget import assert_within_budget
from layer_helpers import OLMO, SMALL, Engine, Move, Sequence, make_layer, normal, strided, trace

# --- every kind of batch ----------------------------------------------------------------------------------------------


def prefill(engine: Engine, *lengths: int, left: int = 20) -> list[Sequence]:
    """Sequences of which so many tokens are in the pool, and ``left`` more are planned."""
    sequences = [engine.add(length + left) for length in lengths]
    engine.step(*(Move(s, n) for s, n in zip(sequences, lengths, strict=True)))
    return sequences


def decode_only(engine: Engine) -> None:
    a, b, c = prefill(engine, 5, 1, 40)
    for order in ((a, b, c), (c, a), (b,), (b, c, a), (a, c, b)):
        engine.step(*(Move(s, 1) for s in order))


def prefill_only(engine: Engine) -> None:
    prefill(engine, 1, 40, 3, 70, 2)


def prefill_in_pieces(engine: Engine) -> None:
    a, b = engine.add(100), engine.add(60)
    for pieces in ((33, 2), (2, 40), (64, 3)):
        engine.step(Move(a, pieces[0]), Move(b, pieces[1]))
    engine.step(Move(a, 1), Move(b, 15))


def decodes_then_prefills(engine: Engine) -> None:
    a, b, c = prefill(engine, 7, 2, 33)
    d = engine.add(50)
    engine.step(Move(c, 1), Move(a, 1), Move(d, 20), Move(b, 9))
    engine.step(Move(b, 1), Move(d, 30), Move(engine.add(1), 1))


def every_acceptance(engine: Engine) -> None:
    """Steps of 4 tokens, each count of accepted ones after each other."""
    a, b = prefill(engine, 6, 1, left=60)
    for first, second in product(range(1, 5), repeat=2):
        engine.step(Move(a, 4, first), Move(b, 4, second))


def ragged_drafts(engine: Engine) -> None:
    """Rows of 1 to 4 tokens in one step; the next one goes on from every count that they can accept."""
    a, b, c, d = prefill(engine, 9, 3, 1, 20, left=40)
    for shift, wrong in product(range(4), range(3)):
        counts = [1 + (i + shift) % 4 for i in range(4)]
        engine.step(*(Move(s, n, max(1, n - wrong)) for s, n in zip((a, b, c, d), counts, strict=True)))


def spec_and_prefills(engine: Engine) -> None:
    """Speculating rows between whole prompts, pieces of prompts and single tokens that do not speculate."""
    a, b, c = prefill(engine, 6, 11, 2)
    d = engine.add(50)
    engine.step(Move(a, 4, 2), Move(d, 20), Move(b, 2, 2), Move(c, 1))
    engine.step(Move(engine.add(1), 1), Move(d, 1), Move(b, 3, 1), Move(c, 1), Move(a, 1, 1))
    engine.step(Move(a, 2, 2), Move(c, 4, 3), Move(d, 5), Move(b, 4, 4))


def plain_row_first(engine: Engine) -> None:
    a, b = prefill(engine, 6, 11)
    engine.step(Move(engine.add(9), 9), Move(a, 4, 3), Move(b, 3, 3))
    engine.step(Move(engine.add(1), 1), Move(b, 4, 4), Move(a, 4, 4))


def recycled_slots(engine: Engine) -> None:
    """Whoever comes next finds what the last one left, not zeros."""
    for lengths in ((9, 30), (1, 2), (40, 3), (2, 1)):
        sequences = prefill(engine, *lengths)
        kept = (2, 4) if engine.num_spec else (None, None)
        tokens = 4 if engine.num_spec else 1
        engine.step(*(Move(s, tokens, n) for s, n in zip(sequences, kept, strict=True)))
        for s in sequences:
            engine.pool.free(s.slots)


SCENARIOS: dict[Callable[[Engine], None], tuple[int, ...]] = {
    decode_only: (0, 3), prefill_only: (0, 3), prefill_in_pieces: (0,), decodes_then_prefills: (0, 2),
    every_acceptance: (3, 5), ragged_drafts: (3,), spec_and_prefills: (3,), plain_row_first: (3,),
    recycled_slots: (0, 3),
}  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VARIANTS: dict[str, tuple[GatedDeltaNetConfig, torch.dtype, dict[str, Any]]] = {
    "fp32": (SMALL, FP32, {}),
    "flat, conv states DS": (replace(SMALL, projection="flat"), FP32, {"conv_layout": "DS"}),
    "slot 0 reserved": (SMALL, FP32, {"reserve_null": True}),
    "strided indices": (SMALL, FP32, {"view": strided}),
    "OLMo-hybrid": (OLMO, FP32, {}),
    "bf16": (SMALL, BF16, {"conv_dtype": BF16}),
    "bf16, conv states DS, state bf16": (SMALL, BF16, {"conv_dtype": BF16, "conv_layout": "DS", "state_dtype": BF16}),
    "fp16, state fp16": (SMALL, FP16, {"conv_dtype": FP16, "state_dtype": FP16}),
    "fp32, state bf16": (SMALL, FP32, {"state_dtype": BF16}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("scenario", "num_spec"),
    [(run, drafts) for run, counts in SCENARIOS.items() for drafts in counts],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_forward(scenario: Callable[[Engine], None], num_spec: int, variant: str) -> None:
    config, dtype, options = VARIANTS[variant]
    engine = Engine(make_layer(config, dtype=dtype), num_spec=num_spec, **options)
    scenario(engine)
    engine.assert_right()
    if engine.pool.null_slot is not None:
        assert engine.state.conv[0].isnan().all()
        assert engine.state.recurrent[0].isnan().all()


def test_which_operator_serves_which_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes take one-token steps beside prefills too, speculative rows one for all of them; no other row does."""
    served: list[tuple[str, int]] = []
    for name in ("gated_delta_net_step", "chunk_gated_delta_rule"):
        run: Any = getattr(layers, name)

        def counting(q: Tensor, *args: Any, name: str = name, run: Any = run, **rest: Any) -> Any:
            served.append((name, len(q)))
            return run(q, *args, **rest)

        monkeypatch.setattr(layers, name, counting)
    engine = Engine(make_layer(), num_spec=3)
    a, b, c = prefill(engine, 7, 2, 33)
    d = engine.add(50)
    engine.step(Move(c, 1), Move(a, 1), Move(d, 20), Move(b, 9))
    engine.step(Move(a, 4, 2), Move(d, 5), Move(b, 2, 1))
    engine.step(Move(a, 2, 2), Move(b, 3, 3))
    step, chunks = "gated_delta_net_step", "chunk_gated_delta_rule"
    assert served == [(chunks, 42), (step, 2), (chunks, 29), (step, 6), (chunks, 5), (step, 5)]
    engine.assert_right()


# --- what a step leaves alone, and what it leaves behind --------------------------------------------------------------


@pytest.mark.parametrize("num_spec", [0, 3])
def test_padding_tokens_come_out_zero(num_spec: int) -> None:
    """The engine puts NaN into their inputs and asserts zeros."""
    engine = Engine(make_layer(), num_spec=num_spec)
    a, b = engine.add(40), engine.add(40)
    engine.step(Move(a, 5), Move(b, 30), padding=7)
    kept = 2 if num_spec else None
    engine.step(Move(a, num_spec + 1, kept), padding=1)
    engine.step(Move(a, 1, 1 if num_spec else None), Move(b, 4), padding=16)
    engine.assert_right()
    nothing = engine.layer(torch.full((3, 48), torch.nan), GatedDeltaNetBatch.build([]), engine.state)
    assert torch.equal(nothing, torch.zeros(3, 48))


def _bits(state: LayerState) -> list[Tensor]:
    return [x.contiguous().view(torch.int32).clone() for x in (state.conv, state.recurrent)]


@pytest.mark.parametrize("slot", [-1, 0])
def test_rows_of_the_null_slot_are_padding(slot: int) -> None:
    engine = Engine(make_layer(), num_spec=2, reserve_null=True)
    a = engine.add(20)
    before = _bits(engine.state)
    for rows in (
        [Row(1, slot), Row(5, slot), Row(3, slot, fresh=True)],
        [SpecRow(3, [slot] * 3, 2), Row(1, slot), SpecRow(1, [slot] * 3, 1)],
    ):
        tokens = sum(row.tokens for row in rows)
        output = engine.layer(normal(tokens, 48, seed=0), GatedDeltaNetBatch.build(rows, num_spec=2), engine.state)
        assert torch.equal(output, torch.zeros(tokens, 48))
    assert all(torch.equal(x, y) for x, y in zip(_bits(engine.state), before, strict=True))
    engine.step(Move(a, 9))
    engine.assert_right()


def test_a_step_writes_its_own_slots_only() -> None:
    engine = Engine(make_layer(), num_spec=3)
    a, b, c = prefill(engine, 6, 11, 2)
    before = _bits(engine.state)
    engine.step(Move(a, 3, 2), Move(b, 4))
    changed = [
        {i for i, same in enumerate((x == y).flatten(1).all(1).tolist()) if not same}
        for x, y in zip(_bits(engine.state), before, strict=True)
    ]
    assert changed == [{a.slots[0], b.slots[0]}, {*a.slots[:3], b.slots[0]}]
    assert engine.state.recurrent[c.slots[1:]].isnan().all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_what_a_speculative_step_leaves_behind(tokens: int) -> None:
    """Column j of the slots: the state after token j. The window: the history's last W-2 inputs, then the tokens."""
    engine = Engine(make_layer(), num_spec=3)
    (a,) = prefill(engine, 9)
    single = trace(engine.layer, a.hidden)
    engine.step(Move(a, 3, 2))
    engine.step(Move(a, tokens, tokens))
    double = trace(copy.deepcopy(engine.layer).double(), a.hidden.double(), dtype=torch.float64)
    own = slice(11, 11 + tokens)
    assert_within_budget("states", engine.state.recurrent[a.slots[:tokens]], single.states[own], double.states[own])
    window = engine.state.conv[a.slots[0], :, : 2 + tokens].T
    own = slice(9, 11 + tokens)
    assert_within_budget("window", window, single.qkv[own], double.qkv[own])


@pytest.mark.parametrize("pieces", [(1,), (2,), (3,), (40,), (1, 1), (2, 5), (33, 1)])
def test_what_a_prefill_leaves_behind(pieces: tuple[int, ...]) -> None:
    engine, total = Engine(make_layer()), sum(pieces)
    a = engine.add(total)
    for tokens in pieces:
        engine.step(Move(a, tokens))
    single = trace(engine.layer, a.hidden)
    double = trace(copy.deepcopy(engine.layer).double(), a.hidden.double(), dtype=torch.float64)
    assert_within_budget("state", engine.state.recurrent[a.slots[0]], single.states[-1], double.states[-1])
    inputs = [torch.cat((torch.zeros(3, SMALL.conv_dim), x.qkv))[-3:] for x in (single, double)]
    assert_within_budget("window", engine.state.conv[a.slots[0]].T, *inputs)


def test_prefills_that_are_padding_come_out_zero() -> None:
    """Beside speculative rows, where every other row is a prefill; whatever their tokens hold."""
    engine = Engine(make_layer(), num_spec=2)
    (sequence,) = prefill(engine, 6)
    hidden = torch.cat((sequence.hidden[6:8], torch.full((4, SMALL.hidden_size), torch.nan)))
    rows = [SpecRow(2, sequence.slots, 1), Row(1, -1), Row(3, -1)]
    output = engine.layer(hidden, GatedDeltaNetBatch.build(rows, num_spec=2), engine.state)
    assert output[:2].all() and not output[2:].any()


class Launches(TorchDispatchMode):
    """Operators that are called, but those that only look at tensors or make room for them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if not func.is_view and "empty" not in name and name != "aten._unsafe_view":
            self.names.append(name)
        return result


@pytest.mark.parametrize("projection", ["interleaved", "flat", "merged"])
def test_a_prefill_makes_nothing_in_between(projection: str) -> None:
    """Four operators, which take what the projections give as it stands."""
    served = Engine(make_layer(replace(SMALL, projection=projection)))
    first, second = served.add(9), served.add(5)
    served.step(Move(first, 4), Move(second, 5))
    hidden = torch.cat((first.hidden[4:], served.add(3).hidden))
    rows = [Row(5, first.slots[0]), Row(3, served.sequences[2].slots[0], fresh=True)]
    with Launches() as seen:
        served.layer(hidden, GatedDeltaNetBatch.build(rows), served.state)
    ours = [name for name in seen.names if name != "aten.mm"]
    assert ours == [f"gated_delta.{name}" for name in ("gates", "causal_conv1d", "prefill", "rms_norm_gated")]
    assert len(seen.names) - len(ours) == (5 if projection == "flat" else 3)
