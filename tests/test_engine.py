"""An engine at random: arrivals, pieces of prompts, decodes, speculation, preemption, slots that change hands."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention, Projected
from gated_delta.state import LayerState
from helpers import DEVICE
from layer_helpers import Engine, Move, Outputs, Sequence, exact_output, make_layer, normal, pooled, trace

CONFIG = GatedDeltaNetConfig(hidden_size=32, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32)
NUM_SPEC, SEQUENCES, LONGEST = 3, 4, 48


@cache
def layer() -> GatedDeltaNetAttention:
    return make_layer(CONFIG)


class SteppedEngine(RuleBasedStateMachine):
    """A sequence's inputs are planned, so its outputs are known: every output of every step is compared with them.

    Sequences hold ``num_spec + 1`` slots. One whose last step kept more than one token has its state in a later slot
    and goes on speculatively; any other may take a plain row. A batch with a speculative row has no plain decodes.
    """

    @initialize(layout=st.sampled_from(["SD", "DS"]), reserve=st.booleans())
    def start(self, layout: str, reserve: bool) -> None:
        slots = SEQUENCES * (NUM_SPEC + 1) + reserve
        self.engine = Engine(layer(), slots=slots, num_spec=NUM_SPEC, conv_layout=layout, reserve_null=reserve)
        crowd = [self.engine.add(LONGEST, seed=100 + i) for i in range(SEQUENCES)]
        self.engine.step(*(Move(s, LONGEST) for s in crowd))
        self.crowd = self.engine.compared(crowd)  # every verdict counts these in: a few tokens alone prove little
        for sequence in crowd:
            self.engine.pool.free(sequence.slots)
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.moved: list[Sequence] = []

    def _room(self) -> bool:
        return self.engine.pool.free_slots > NUM_SPEC

    def _step(self, moves: list[Move], padding: int) -> None:
        self.engine.step(*moves, padding=padding)
        self.moved = [move.sequence for move in moves]
        for sequence in [s for s in self.running if not s.left]:
            self.running.remove(sequence)
            self.engine.pool.free(sequence.slots)

    @precondition(_room)
    @rule(seed=st.integers(0, 30), length=st.integers(1, LONGEST))
    def arrive(self, seed: int, length: int) -> None:
        self.running.append(self.engine.add(length, seed=seed))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = self.running.pop(data.draw(st.integers(0, len(self.running) - 1), "which"))
        self.engine.pool.free(sequence.slots)
        self.preempted.append(sequence)

    @precondition(lambda self: self.preempted and self._room())
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """From the beginning, in whatever slots are free now."""
        sequence = self.preempted.pop(data.draw(st.integers(0, len(self.preempted) - 1), "which"))
        sequence.slots = data.draw(st.permutations(self.engine.pool.allocate(NUM_SPEC + 1)), "slots")
        sequence.restart()
        self.running.append(sequence)

    @precondition(lambda self: any(s.accepted == 1 for s in self.running))
    @rule(data=st.data(), padding=st.integers(0, 3))
    def plain_step(self, data: st.DataObject, padding: int) -> None:
        able = [s for s in self.running if s.accepted == 1]
        chosen = data.draw(st.lists(st.sampled_from(able), min_size=1, unique_by=id), "rows")
        moves = [Move(s, data.draw(st.integers(1, min(s.left, 40)), "tokens")) for s in chosen]
        moves.sort(key=lambda move: not (move.tokens == 1 and move.sequence.done))  # decodes first
        self._step(moves, padding)

    @precondition(lambda self: any(s.done for s in self.running))
    @rule(data=st.data(), padding=st.integers(0, 3))
    def speculative_step(self, data: st.DataObject, padding: int) -> None:
        """Rows in any order; a running sequence speculates or takes a plain row where it may."""
        chosen = data.draw(st.lists(st.sampled_from(self.running), min_size=1, unique_by=id), "rows")
        moves = []
        for s in chosen:
            if not s.done or (s.accepted == 1 and len(chosen) > 1 and data.draw(st.booleans(), "plain")):
                moves.append(Move(s, data.draw(st.integers(1, min(s.left, 40)), "tokens")))
            else:
                kept = data.draw(st.integers(1, min(s.left, NUM_SPEC + 1)), "kept")
                moves.append(Move(s, data.draw(st.integers(kept, NUM_SPEC + 1), "tokens"), kept))
        if all(move.kept is None for move in moves):  # then it is a plain step
            moves.sort(key=lambda move: not (move.tokens == 1 and move.sequence.done))
        self._step(moves, padding)

    @invariant()
    def outputs_are_right(self) -> None:
        if getattr(self, "moved", None):
            verdict = pooled(self.crowd + self.engine.compared(self.moved))
            assert verdict.within, verdict
            self.moved = []


SteppedEngine.TestCase.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=30, deadline=None, database=None
)
TestSteppedEngine = SteppedEngine.TestCase


# --- a long run, and faults that it must notice -----------------------------------------------------------------------

STEPS = int(os.environ.get("GATED_DELTA_STEPS", "2000"))
"""Random steps of the long run; 50,000 on a GPU once, shared by the workers of ``-n``."""
MOST = 1000
"""Steps of one run; every run has a seed of its own."""


class Planned(Sequence):
    """A sequence whose outputs were evaluated before it came."""

    def __init__(self, engine: Engine, seed: int, length: int) -> None:
        hidden, exact, self.plain = planned(seed, engine.layer.dt_bias.dtype)
        super().__init__(hidden[:length], exact, engine.pool.allocate(NUM_SPEC + 1))

    @property
    def compared(self) -> Outputs:
        return Outputs(torch.cat(self.outputs), self.plain[: self.done], self.exact[: self.done])


@cache
def planned(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, float64 and the plain evaluation of the longest sequence of a seed."""
    hidden = normal(LONGEST, CONFIG.hidden_size, seed=seed, dtype=dtype)
    return hidden, exact_output(layer(), hidden), trace(layer(), hidden).output


@contextmanager
def others_untouched(engine: Engine, moves: list[Move]) -> Iterator[None]:
    """No slot changes but those of the rows."""
    written = set(chain.from_iterable(move.sequence.slots for move in moves))
    others = torch.tensor([slot for slot in range(engine.pool.slots) if slot not in written], dtype=torch.int64)
    before = [x[others.to(x.device)].clone() for x in engine.state[:2]]
    yield
    for x, old in zip(engine.state[:2], before, strict=True):
        assert torch.equal(x[others.to(x.device)].view(torch.int32), old.view(torch.int32)), "another slot changed"


class Run:
    """Random steps of an engine, each judged."""

    def __init__(self, kind: type[GatedDeltaNetAttention], seed: int, **pool: Any) -> None:
        self.random = random.Random(seed)
        slots = 6 * (NUM_SPEC + 1) + bool(pool.get("reserve_null"))
        self.engine = Engine(make_layer(CONFIG, kind=kind), slots=slots, num_spec=NUM_SPEC, device=DEVICE, **pool)
        self.running: list[Planned] = []
        # Every verdict counts these in: a few tokens alone prove little.
        self.crowd = [Outputs(x, x, exact) for _, exact, x in (planned(s, torch.float32) for s in range(100, 104))]

    def step(self) -> None:
        """Somebody comes or is thrown out, and goes on from the beginning; then a step of some kind."""
        pick, engine = self.random, self.engine
        while engine.pool.free_slots > NUM_SPEC and (not self.running or pick.random() < 0.5):
            self.running.append(Planned(engine, pick.randrange(30), pick.randint(1, LONGEST)))
        if len(self.running) > 1 and pick.random() < 0.05:
            engine.pool.free(self.running.pop(pick.randrange(len(self.running))).slots)
        chosen = pick.sample(self.running, pick.randint(1, len(self.running)))
        moves = self.speculative(chosen) if pick.random() < 0.5 else self.plain(chosen)
        alike = all(m.kept is not None for m in moves) or all(m.tokens == 1 and m.sequence.done for m in moves)
        with others_untouched(engine, moves):
            engine.step(*moves, padding=pick.randint(0, 3), idle=pick.randint(0, 2) if alike else 0)
        verdict = pooled([*self.crowd, *(m.sequence.compared for m in moves if isinstance(m.sequence, Planned))])
        assert verdict.within, verdict
        for sequence in [s for s in self.running if not s.left]:
            self.running.remove(sequence)
            engine.pool.free(sequence.slots)

    def piece(self, s: Sequence) -> Move:
        return Move(s, 1 if self.random.random() < 0.5 else self.random.randint(1, s.left))

    def plain(self, chosen: list[Planned]) -> list[Move]:
        """Decodes, then pieces of prompts. Who accepted several tokens has to speculate."""
        moves = [self.piece(s) for s in chosen if s.accepted == 1]
        moves.sort(key=lambda move: not (move.tokens == 1 and move.sequence.done))
        return moves or self.speculative(chosen)

    def speculative(self, chosen: list[Planned]) -> list[Move]:
        moves = []
        for s in chosen:
            if not s.done or (s.accepted == 1 and len(chosen) > 1 and self.random.random() < 0.3):
                moves.append(self.piece(s))
            else:
                kept = self.random.randint(1, min(s.left, NUM_SPEC + 1))
                moves.append(Move(s, self.random.randint(kept, NUM_SPEC + 1), kept))
        if all(move.kept is None for move in moves):
            moves.sort(key=lambda move: not (move.tokens == 1 and move.sequence.done))
        return moves


POOLS: list[dict[str, Any]] = [{"conv_layout": "SD"}, {"conv_layout": "DS", "reserve_null": True}]


@pytest.mark.parametrize("seed", range(max(1, -(-STEPS // (len(POOLS) * MOST)))))
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_long_run(pool: dict[str, Any], seed: int, record_property: Callable[[str, object], None]) -> None:
    run = Run(GatedDeltaNetAttention, seed, **pool)
    for _ in range(min(MOST, STEPS // len(POOLS))):
        run.step()
    record_property("long run", (seed, min(MOST, STEPS // len(POOLS))))


class ForgetsGates(GatedDeltaNetAttention):
    """Speculative tokens are gathered, their gates are the batch's first ones."""

    def project(self, hidden: Tensor) -> Projected:
        self.projected = super().project(hidden)
        return self.projected

    def _spec_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        qkvz, ba = p.outputs
        mixed_up = replace(p, outputs=(qkvz, self.projected.outputs[1][: len(ba)]))
        super()._spec_rows(mixed_up, batch, state, output)


class RightAligned(GatedDeltaNetAttention):
    """A speculative window ends where the longest one would."""

    def _spec_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        super()._spec_rows(p, batch, state, output)
        assert batch.spec_query_start_loc is not None and batch.spec_state_indices is not None
        counts, slots = batch.spec_query_start_loc.diff().tolist(), batch.spec_state_indices[:, 0].tolist()
        for count, slot in zip(counts, slots, strict=True):
            if slot >= 0:
                window = state.conv[slot]
                window[:, NUM_SPEC + 1 - count :] = window[:, : window.shape[1] - (NUM_SPEC + 1 - count)].clone()


class ReadsStaleSlots(GatedDeltaNetAttention):
    """Whatever a slot holds is history."""

    def forward(self, hidden: Tensor, batch: GatedDeltaNetBatch, state: LayerState) -> Tensor:
        return super().forward(hidden, replace(batch, has_initial_state=None), state)


class OneSlotOff(GatedDeltaNetAttention):
    def _plain_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        assert batch.non_spec_state_indices is not None
        slots = batch.non_spec_state_indices
        moved = torch.where(slots >= 0, (slots + 1) % len(state.conv), slots)
        super()._plain_rows(p, replace(batch, non_spec_state_indices=moved), state, output)


class WritesPadding(GatedDeltaNetAttention):
    """Slot -1 counts from the end, as an index does in Python."""

    def _plain_rows(self, p: Projected, batch: GatedDeltaNetBatch, state: LayerState, output: Tensor) -> None:
        assert batch.non_spec_state_indices is not None
        wrapped = batch.non_spec_state_indices % len(state.conv)
        super()._plain_rows(p, replace(batch, non_spec_state_indices=wrapped), state, output)
        output[: batch.num_decodes][batch.non_spec_state_indices[: batch.num_decodes] < 0] = 0.0


FAULTS = (ForgetsGates, RightAligned, ReadsStaleSlots, OneSlotOff, WritesPadding)


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_fault_is_noticed(kind: type[GatedDeltaNetAttention]) -> None:
    """Within a tenth of the long run, and for what it is: a wrong value, or a slot that changed."""
    run = Run(kind, 0)
    with pytest.raises(AssertionError, match=r"Verdict|another slot changed"):
        for _ in range(200):
            run.step()
