"""An engine at random: arrivals, pieces of prompts, decodes, speculation, preemption, slots that change hands."""

from __future__ import annotations

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from layer_helpers import Engine, Move, Sequence, make_layer, pooled

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
