"""Would the tests of Hopper's prefill notice? Faults that a GPU forgives now and then, and wrong formulas."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import NamedTuple

import pytest
import torch

import gluon_emulator
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, with_state
from helpers import nans, prefill

host = import_module("gated_delta.kernels.gluon.prefill")
OPERATORS = import_module("gated_delta.kernels.triton")


class Fault(NamedTuple):
    function: str
    right: str
    wrong: str
    message: str
    stages: int = 2
    stiff: bool = False
    """With beta 2 and no decay."""


FULL = "mbarrier.wait(full.index(stage), (t // STAGES) & 1)"
READY = "mbarrier.wait(ready.index(buffer), (t // 2) & 1)"
FREE = "mbarrier.wait(free.index(buffer), ((t // 2) & 1) ^ 1)"
EMPTY = "mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)"
DONE = "mbarrier.arrive(empty.index(stage), count=1)"
TELL = "mbarrier.arrive(ready.index(buffer), count=1)"
LAST, PART_OF_T, REST_OF_U = "o = warpgroup_mma(now, ", "part = T.to", "U_left - U_left.to(dtype).to(gl.float32)"
RACE, BUDGET = "race|deadlock|arrivals", "over its budget"
"""Which of the three is met first hangs on the order in which partitions run."""
FAULTS = {
    "keep does not wait for q, k and v": Fault("keep", FULL, "pass", RACE),
    "keep does not wait for T and P": Fault("keep", READY, "pass", RACE),
    "prepare does not wait for q and k": Fault("prepare", FULL, "pass", RACE),
    # With two stages a buffer is free when a stage is, for both are released at once and there are two of both.
    "prepare does not wait for free buffers": Fault("prepare", FREE, "pass", "race: prepare writes", stages=3),
    "load does not wait for free stages": Fault("load", EMPTY, "pass", RACE),
    "wrong phase of ready": Fault("keep", READY, READY.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong phase of free": Fault("prepare", FREE, FREE.replace("^ 1", ""), "deadlock: .* prepare waits for free.0., "),
    "wrong phase of empty": Fault("load", EMPTY, EMPTY.replace("^ 1", ""), "deadlock: .* load waits for empty.0., "),
    "keep releases q and k too early": Fault("keep", LAST, f"{DONE}; {LAST}", RACE),
    "prepare does not release q and k": Fault("prepare", DONE, "pass", "deadlock"),
    "keep releases T and P twice": Fault("keep", DONE, DONE.replace("empty", "free"), RACE),
    "prepare tells of T too early": Fault("prepare", PART_OF_T, f"{TELL}; {PART_OF_T}", RACE),
    "three arrivals where two are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS + 1", "deadlock"),
    "two arrivals where three are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS - 1", RACE),
    "no fence after q and k have landed": Fault("keep", "fence_async_shared()", "pass", "no fence: a product of keep"),
    "no fence before T is told of": Fault("prepare", "fence_async_shared()", "pass", "no fence: a product of"),
    "no fence between store and product": Fault("product", "fence_async_shared()", "pass", "no fence: a product"),
    "U taken too early": Fault("keep", "U, Y = warpgroup_mma_wait(0", "U, Y = warpgroup_mma_wait(1", "may still run"),
    "operand overwritten too early": Fault(
        "product", "z, a, rest = ", "sX.store(high_x); z, a, rest = ", "sX is overwritten"
    ),
    "products nobody waits for": Fault("keep", "outcome, now = warpgroup_mma_wait(0", "outcome = zero  # ", RACE),
    "wrong stage of k": Fault("keep", "sK.index(stage)", "sK.index(0)", "race|budget"),
    "wrong half of v": Fault("keep", "2 * stage + HALF", "2 * stage", BUDGET),
    "wrong buffer of P": Fault("keep", "sP.index(buffer)", "sP.index(1 - buffer)", RACE),
    "decay of the state forgotten": Fault("keep", "S = S * shared", "S = S + 0 * shared", BUDGET),
    "decay of q forgotten": Fault(
        "keep", "outcome = QS * shared", "outcome = QS + 0 * shared", "output: .* over its budget"
    ),
    "diagonal of P forgotten": Fault("triangles", "i >= j", "i > j", "output: .* over its budget"),
    "T in one part": Fault("prepare", "(T - part.to(gl.float32))", "(T - T)", "state: .* over its budget", stiff=True),
    "U in one part": Fault("keep", REST_OF_U, "U_left - U_left", "state: .* over its budget"),
    "last rows written behind the sequence": Fault("keep", "mask=row < length)", "mask=row >= 0)", "memory|behind"),
    "gates read behind the sequence": Fault("gates_of", "mask=row < length", "mask=row >= 0", "memory"),
}


@pytest.fixture(autouse=True)
def in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(OPERATORS, "prefill", host.prefill)


def judged(monkeypatch: pytest.MonkeyPatch, inputs: Inputs, edits: gluon_emulator.Edits, seed: int = 0) -> None:
    monkeypatch.setattr(host, "launch", partial(gluon_emulator.launch, edits=edits, seed=seed))
    total = len(inputs["q"])
    wide = nans(total + 64, 1, 128, dtype=torch.bfloat16)
    _, state = prefill({**inputs, "output": wide[:total]}, backend="triton")
    plain = oracle.prefill(**inputs, dtype=torch.float32, operands=torch.bfloat16)
    exact = oracle.prefill(**inputs)
    assert_within_budget("output", wide[:total], plain.output, exact.output)
    assert_within_budget("state", state, plain.state, exact.state)
    assert wide[total:].isnan().all(), "written behind the output"


def similar_keys(gates: str) -> Inputs:
    return with_state(prefill_inputs([330], hq=1, hk=1, hv=1, head_k=128, head_v=128, gates=gates, similar_keys=True))


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_fault_all_is_well(stages: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "STAGES", stages)
    judged(monkeypatch, similar_keys("weak"), {}, seed)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    inputs = similar_keys("none" if fault.stiff else "weak")
    if fault.stiff:
        inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    monkeypatch.setattr(host, "STAGES", fault.stages)
    for seed in range(3):
        with pytest.raises(AssertionError, match=fault.message):
            judged(monkeypatch, inputs, {fault.function: (fault.right, fault.wrong)}, seed)
