"""Would the tests of Hopper's prefill notice? Faults of a kind that a GPU forgives now and then: barriers, buffers,
fences, products. Wrong formulas are in test_gluon_formulas.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

import gluon_emulator
from gated_delta.kernels.gluon.prefill import Plan
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, with_state
from helpers import nans, prefill, tokens
from prefill_helpers import constant, serve

host = import_module("gated_delta.kernels.gluon.prefill")
launch = import_module("gated_delta.kernels.triton.launch")


class Fault(NamedTuple):
    function: str
    right: str
    wrong: str
    message: str
    gone: str = ""
    """What is taken away, where the wrong piece has it elsewhere."""
    stages: int = 3
    gates: str = "weak"
    """As :func:`inputs_of` has them."""
    groups: tuple[int, ...] = ()
    """That compute, the third one prepares; none given: all that there are where the function is used."""
    part: int = 0
    dtype: torch.dtype = torch.bfloat16

    def plans(self) -> Iterator[Plan]:
        least = {"make": (3,), "prepare": (2,)}.get(self.function, (1, 2) if self.part else (1, 2, 3))
        return (planned(groups, self.part, self.stages) for groups in self.groups or least)


def planned(groups: int, part: int, stages: int) -> Plan:
    return Plan(min(groups, 2), part, groups == 3, stages)


RACE, BUDGET, OUTPUT = "race|deadlock|arrivals", "over its budget", "output: .* over its"
"""Which of the three is met first hangs on the order in which partitions run."""
EARLY, UNFENCED = "may still run", "no fence: "
FP16, APART, MADE = torch.float16, (1, 2), (3,)
STAGE, BUFFER = "(t // STAGES) & 1)", "(t // 2) & 1)"
FULL, FULL_X = f"mbarrier.wait(full.index(stage), {STAGE}", f"mbarrier.wait(full_x.index(buffer), {BUFFER}"
EMPTY = f"mbarrier.wait(empty.index(stage), ({STAGE} ^ 1)"
EMPTY_X = f"mbarrier.wait(empty_x.index(buffer), ({BUFFER} ^ 1)"
DONE, DONE_X = "mbarrier.arrive(empty.index(stage), count=1)", "mbarrier.arrive(empty_x.index(buffer), count=1)"
TOLD, TOLD_X = (f"mbarrier.arrive({x}, count=1)" for x in ("full.index(stage)", "full_x.index(buffer)"))
EXPECT, BYTES = "mbarrier.expect(full.index(stage), 2 * 64 * (256 if OUT else 128))", "2 * 64 * (256 if OUT else 128)"
EXPECT_X = "mbarrier.expect(full_x.index(buffer), 2 * 64 * 64 * (GROUPS + (0 if MAKE else 3 if OUT else 2)))"
EXPECT_TAIL = "mbarrier.expect(full.index(stage), 2 * 64 * 128)"
COPY = "copy_async(factors.index(stage), vectors + t * wide(heads) * VECTORS + f)"
ARRIVE = "async_copy.mbarrier_arrive(full.index(stage), increment_count=False)"
STORE = "store_vectors(log_alpha, strength, scale, factors.index(stage), NORM or sK.dtype == gl.float16)"
V, DECAYED, OUTPUTS = "V = sV.index", "S = S * vector_of", "from_q = factors"
TAKE_KS, LAST = "KS, state = warpgroup_mma_wait(0", "S, Y = warpgroup_mma_wait(0, deps=(s, Y))"
PIECE = "outputs_of(state, Y, sQ.index(stage), sP.index(buffer), from_q, sO, first, AT_ONCE)"
WITHOUT, FENCE = "without_state(sQ", "fence_async_shared()"
WAIT, LANDED = "mbarrier.wait(landed.index(0), 0)", "mbarrier.arrive(landed.index(0), count=1)"
EXPECT_QK, STORED = "mbarrier.expect(landed.index(0), 2 * 64 * 256)", "tma.store_wait(0)"
STORE_X = "store_tile(x, [narrow(chunk * 64), 0], sK)"
KEEP_STARVES, LOAD_STARVES = r"deadlock: .*keep_from.* waits for {}.0., ", r"deadlock: .*load waits for {}.0., "
MAKE_STARVES, PREPARE_STARVES = r"deadlock: .*make waits for {}.0., ", "deadlock: the program waits for landed"
# Not here: fences in keep, for products read what the copy engine wrote without one, and make has its own. The first
# one of without_state, for between P's store and its product come those of the inverse. With three stages nothing hangs
# on empty, since load has waited by then for the buffers of the chunk that had the stage. make releases nothing: keep
# does after it has waited for what make tells of last.
KEEP = {
    "keep does not wait for q and k": Fault("keep", FULL, "pass", RACE),
    "keep does not wait for v, X and P": Fault("keep", FULL_X, "pass", RACE),
    "wrong phase of full": Fault("keep", FULL, FULL.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong phase of full_x": Fault("keep", FULL_X, FULL_X.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong stage is waited for": Fault("keep", FULL, FULL.replace("stage", "0"), RACE),
    "wrong buffer is waited for": Fault("keep", FULL_X, FULL_X.replace("buffer", "1 - buffer"), RACE),
    "wrong stage is released": Fault("keep", DONE, DONE.replace("stage", "0"), RACE),
    "wrong buffer is released": Fault("keep", DONE_X, DONE_X.replace("buffer", "0"), RACE),
    "keep releases k while a product reads it": Fault("keep", TAKE_KS, f"{DONE}; {TAKE_KS}", RACE, DONE, 2),
    "keep releases v before it is read": Fault("keep", V, f"{DONE_X}; {V}", RACE, DONE_X),
    "keep releases the vectors before they are read": Fault("keep", DECAYED, f"{DONE}; {DECAYED}", RACE, DONE, 2),
    "keep releases q before it is read": Fault("keep", OUTPUTS, f"{DONE}; {OUTPUTS}", RACE, DONE, 2),
    "keep releases X while a product reads it": Fault("keep", OUTPUTS, f"{DONE_X}; {OUTPUTS}", RACE, DONE_X),
    "keep releases P between outputs": Fault("keep", PIECE, f"{PIECE}; first or {DONE_X}", RACE, DONE_X, groups=MADE),
    "keep releases q and k twice": Fault("keep", DONE, DONE.replace("=1", "=2"), RACE),
    "keep releases v, X and P twice": Fault("keep", DONE_X, DONE_X.replace("=1", "=2"), RACE),
    "keep does not release q and k": Fault("keep", DONE, "pass", LOAD_STARVES.format("empty")),
    "keep does not release v, X and P": Fault("keep", DONE_X, "pass", LOAD_STARVES.format("empty_x")),
    "wrong stage of k": Fault("keep", "sK.index(stage)", "sK.index(0)", RACE),
    "wrong stage of q": Fault("keep", "sQ.index(stage)", "sQ.index((stage + 1) % STAGES)", RACE),
    "wrong buffer of v": Fault("keep", "GROUPS * buffer", "GROUPS * (1 - buffer)", RACE),
    "wrong buffer of X": Fault("keep", "sX.index(buffer)", "sX.index(1 - buffer)", RACE),
    "wrong buffer of P": Fault("keep", "sP.index(buffer)", "sP.index(1 - buffer)", RACE),
    "wrong stage of the vectors": Fault("vector_of", "index(stage)", "index(0)", RACE),
    "wrong stage of the decay of q": Fault("keep", f"{OUTPUTS}.index(stage)", f"{OUTPUTS}.index(0)", RACE),
    "one more arrival than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS + 1", "deadlock"),
    "one arrival less than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS - 1", RACE),
    "a summary releases X too early": Fault("keep", LAST, f"{DONE_X}; {LAST}", RACE, DONE_X, part=192),
}
LOAD = {
    "load does not wait for free stages": Fault("load", EMPTY, "pass", RACE, stages=2),
    "load does not wait for free buffers": Fault("load", EMPTY_X, "pass", RACE),
    "wrong phase of empty": Fault("load", EMPTY, EMPTY.replace(" ^ 1", ""), LOAD_STARVES.format("empty")),
    "wrong phase of empty_x": Fault("load", EMPTY_X, EMPTY_X.replace(" ^ 1", ""), LOAD_STARVES.format("empty_x")),
    "phase of empty as if there were no stages": Fault("load", EMPTY, EMPTY.replace("// STAGES", ""), RACE, stages=2),
    "bytes that never land": Fault("load", EXPECT, EXPECT.replace("256", "257"), KEEP_STARVES.format("full")),
    "bytes that are not expected": Fault("load", EXPECT, EXPECT.replace("256", "192"), RACE),
    "no bytes expected": Fault("load", EXPECT, EXPECT.replace(BYTES, "0"), RACE),
    "nothing expected": Fault("load", EXPECT, "pass", KEEP_STARVES.format("full")),
    "expected too early": Fault("load", EMPTY, f"{EXPECT}; {EMPTY}", RACE, EXPECT, 2),
    "bytes of X that never land": Fault("load", "3 if OUT", "4 if OUT", KEEP_STARVES.format("full_x"), groups=APART),
    "bytes of P that are not expected": Fault("load", "3 if OUT", "2 if OUT", RACE, groups=APART),
    "bytes of X expected of the copy engine": Fault(
        "load", "0 if MAKE else ", "", r"deadlock: .*full_x.0", groups=MADE
    ),
    "bytes of v that are not expected": Fault("load", "(GROUPS + (", "((", RACE),
    "nothing of v, X and P expected": Fault("load", EXPECT_X, "pass", KEEP_STARVES.format("full_x")),
    "bytes of a summary's q": Fault("load", BYTES, "2 * 64 * 256", "deadlock: .*full.0.", part=128),
    "bytes of a summary's P": Fault("load", "3 if OUT else 2", "3", "deadlock: .*full_x.0.", part=128),
    "v lands without notice": Fault("load", "full_x.index(buffer), tile", "full.index(stage), tile", RACE),
    "X lands without notice": Fault("load", "full_x.index(buffer), sX", "full.index(stage), sX", RACE, groups=APART),
    "k lands with v": Fault("load", "k_column], full.index(stage)", "k_column], full_x.index(buffer)", RACE),
    "the vectors land without notice": Fault("load", COPY, f"{ARRIVE}; {COPY}", RACE, ARRIVE, groups=APART),
    "the vectors are not told of": Fault("load", ARRIVE, "pass", KEEP_STARVES.format("full"), groups=APART),
    "the vectors add to those expected": Fault(
        "load", ", increment_count=False", "", KEEP_STARVES.format("full"), groups=APART
    ),
    "loaded into the wrong stage": Fault("load", "sK.index(stage)", "sK.index(0)", RACE),
    "v is loaded into the wrong buffer": Fault("load", "GROUPS * buffer", "GROUPS * (1 - buffer)", RACE),
    "X is loaded into the wrong buffer": Fault("load", "sX.index(buffer)", "sX.index(1 - buffer)", RACE, groups=APART),
    "vectors stored after they are told of": Fault("load", STORE, f"{TOLD}; {STORE}", RACE, TOLD, groups=MADE),
    "stored vectors are not told of": Fault("load", TOLD, "pass", MAKE_STARVES.format("full"), groups=MADE),
    "stored vectors are told of twice": Fault("load", TOLD, TOLD.replace("=1", "=2"), RACE, groups=MADE),
    "vectors stored into the wrong stage": Fault(
        "load", "scale, factors.index(stage)", "scale, factors.index(0)", RACE, groups=MADE
    ),
    "the tail of k is not waited for": Fault("load", "async_copy.wait_group(0)", "pass", RACE, groups=MADE),
    "the tail of k is no group to wait for": Fault("load", "async_copy.commit_group()", "pass", RACE, groups=MADE),
    "no fence behind the tail of k": Fault("load", FENCE, "pass", UNFENCED, groups=MADE),
    "the tail of k goes into the wrong stage": Fault(
        "load", "rows(sK.index(stage)", "rows(sK.index(0)", RACE, groups=MADE
    ),
    "bytes of the tail of k": Fault(
        "load", EXPECT_TAIL, EXPECT_TAIL.replace("128", "256"), "deadlock: .*full.2.", groups=MADE
    ),
    "nothing of the tail expected": Fault("load", EXPECT_TAIL, "pass", "deadlock: .*full.2.", groups=MADE),
}
MAKE = {
    "make does not wait for q, k and vectors": Fault("make", FULL, "pass", RACE),
    "make does not wait for free buffers": Fault("make", EMPTY_X, "pass", RACE),
    "make: wrong phase of full": Fault("make", FULL, FULL.replace("& 1", "& 1 ^ 1"), RACE),
    "make: wrong phase of empty_x": Fault("make", EMPTY_X, EMPTY_X.replace(" ^ 1", ""), MAKE_STARVES.format("empty_x")),
    "make waits for the wrong stage": Fault("make", FULL, FULL.replace("stage", "0"), RACE),
    "make waits for the wrong buffer": Fault("make", EMPTY_X, EMPTY_X.replace("buffer", "0"), RACE),
    "make tells of X before it is there": Fault("make", WITHOUT, f"{TOLD_X}; {WITHOUT}", RACE, TOLD_X),
    "make tells of X before its norms are there": Fault(
        "make", "k, vectors = sK", f"{TOLD_X}; k, vectors = sK", RACE, TOLD_X, gates="norm"
    ),
    "make tells of X twice": Fault("make", TOLD_X, TOLD_X.replace("=1", "=2"), RACE),
    "make tells nobody of X": Fault("make", TOLD_X, "pass", KEEP_STARVES.format("full_x")),
    "make tells of the wrong buffer": Fault("make", TOLD_X, TOLD_X.replace("buffer", "0"), RACE),
    "make: wrong stage of k": Fault("make", "sK.index(stage)", "sK.index(0)", RACE),
    "make: wrong stage of q": Fault("make", "sQ.index(stage)", "sQ.index((stage + 1) % STAGES)", RACE),
    "make: wrong stage of the vectors": Fault("make", "factors.index(stage)", "factors.index(0)", RACE),
    "make: wrong buffer of X": Fault("make", "sX.index(buffer)", "sX.index(1 - buffer)", RACE),
    "make: wrong buffer of P": Fault("make", "sP.index(buffer)", "sP.index(1 - buffer)", RACE),
    "barrier full does not count vectors": Fault("chain", "2 if MAKE else 129", "1", RACE),
    "barrier full_x does not count make": Fault("chain", "2 if MAKE else 1)", "1)", RACE, groups=MADE),
}
ONE_STAGE = {
    "one stage: load does not wait": Fault("load", EMPTY, "pass", RACE, stages=1),
    "one stage: wrong phase of empty": Fault("load", EMPTY, EMPTY.replace("STAGES", "2"), RACE, stages=1),
    "one stage: wrong phase of full": Fault("keep", FULL, FULL.replace("STAGES", "2"), RACE, stages=1),
    "one stage: make, wrong phase of full": Fault("make", FULL, FULL.replace("STAGES", "2"), RACE, stages=1),
    "one stage: keep releases k too early": Fault("keep", TAKE_KS, f"{DONE}; {TAKE_KS}", RACE, DONE, 1),
    "one stage: keep releases q too early": Fault("keep", OUTPUTS, f"{DONE}; {OUTPUTS}", RACE, DONE, 1),
    "one stage: nobody releases": Fault("keep", DONE, "pass", LOAD_STARVES.format("empty"), stages=1),
}
ACROSS = "z, a, rest = warp"
TAKE_N, TAKE_O = "N = warpgroup_mma_wait(0", "o, Y = warpgroup_mma_wait(0, deps=(o, Y))"
TAKE_P, TAKE_X = "PT, high, low = warpgroup_mma_wait(0", "X, high, low = warpgroup_mma_wait(0"
STORE_HALF = "sX.slice(half, 64, dim=1).store((X * rows_of(vectors, ROWS_OF_X)).to(dtype))"
LAST_FENCE = f"{STORE_HALF}\n    {FENCE}"
UNSTORED = "ends with stores"
PRODUCTS = {
    "prepare does not wait for q and k": Fault("prepare", WAIT, "pass", RACE),
    "wrong phase of landed": Fault("prepare", WAIT, WAIT.replace(", 0)", ", 1)"), RACE),
    "bytes of q and k that never land": Fault("prepare", "2 * 64 * 256", "3 * 64 * 256", PREPARE_STARVES),
    "bytes of q that are not expected": Fault("prepare", "2 * 64 * 256", "64 * 256", RACE),
    "nothing of q and k expected": Fault("prepare", EXPECT_QK, "pass", PREPARE_STARVES),
    "q and k are expected twice": Fault("prepare", EXPECT_QK, f"{EXPECT_QK}; {EXPECT_QK}", "arrivals"),
    "prepare expects more arrivals": Fault("prepare", "count=1)\n    if", "count=2)\n    if", PREPARE_STARVES),
    "the tail of q and k is not told of": Fault("prepare", LANDED, "pass", PREPARE_STARVES),
    "the tail of q and k is told of twice": Fault("prepare", LANDED, LANDED.replace("=1", "=2"), "arrivals"),
    "the tail of q and k is not waited for": Fault("prepare", "async_copy.wait_group(0)", "pass", RACE),
    "the tail of q and k is no group to wait for": Fault("prepare", "async_copy.commit_group()", "pass", RACE),
    "no fence behind the tail of q and k": Fault("prepare", FENCE, "pass", UNFENCED),
    "X and P are told of without a fence": Fault("without_state", LAST_FENCE, STORE_HALF, UNFENCED),
    "X is stored behind its fence": Fault("without_state", LAST_FENCE, f"{FENCE}; {STORE_HALF}", UNFENCED),
    "the engine stores X before it is there": Fault("prepare", WITHOUT, f"store_tile(x, [0, 0], sK); {WITHOUT}", RACE),
    "the engine stores P before it is there": Fault("prepare", WITHOUT, f"store_tile(p, [0, 0], sP); {WITHOUT}", RACE),
    "X is overwritten while the engine reads it": Fault("prepare", STORED, f"sK.store(sK.load()); {STORED}", RACE),
    "P is overwritten while the engine reads it": Fault("prepare", STORED, f"sP.store(sP.load()); {STORED}", RACE),
    "nobody waits for stores": Fault("prepare", STORED, "pass", UNSTORED),
    "nobody waits for the last store": Fault("prepare", STORED, "tma.store_wait(1)", UNSTORED),
    "stores are waited for before they begin": Fault("prepare", STORE_X, f"{STORED}; {STORE_X}", UNSTORED, STORED),
    "K S taken too early": Fault("keep", TAKE_KS, TAKE_KS.replace("0", "1"), EARLY),
    "Q S taken too early": Fault(
        "outputs_of", "o, state = warpgroup_mma_wait(0", "o, state = warpgroup_mma_wait(1", EARLY
    ),
    "O taken too early": Fault("outputs_of", TAKE_O, TAKE_O.replace("0", "1"), EARLY),
    "a summary's S taken too early": Fault("keep", LAST, LAST.replace("0", "1"), EARLY, part=128),
    "products nobody waits for": Fault("keep", LAST, "S = S + 0", RACE, part=192),
    "K Q taken too early": Fault("without_state", "1 if ROOM else 0", "2 if ROOM else 1", EARLY),
    "K K taken too early": Fault("without_state", TAKE_N, TAKE_N.replace("0", "1"), EARLY),
    "P taken too early": Fault("without_state", TAKE_P, TAKE_P.replace("0", "1"), EARLY),
    "X taken too early": Fault("without_state", TAKE_X, TAKE_X.replace("0", "1"), EARLY),
    "the inverse's product taken too early": Fault(
        "product", f"{ACROSS}group_mma_wait(0", f"{ACROSS}group_mma_wait(1", EARLY
    ),
    "no fence between store and product": Fault("product", FENCE, "pass", UNFENCED),
    "operand overwritten too early": Fault("product", ACROSS, f"sX.store(high); {ACROSS}", "sX is overwritten"),
    "P stored where k is still read": Fault(
        "without_state", TAKE_N, f"sK.store(sK.load()); {TAKE_N}", "sK is overwritten"
    ),
    "P stored where it is still read": Fault(
        "without_state",
        TAKE_P,
        f"pt = product2(high, low, tile); tile.store(tile.load()); {TAKE_P}",
        "sP is overwritten",
    ),
    "X stored where k is still read": Fault(
        "without_state", TAKE_X, f"sX.store(sX.load()); {TAKE_X}", "sK is overwritten", groups=APART
    ),
    "memory that products still read given away": Fault(
        "without_state", TAKE_N, f"vectors_in_shared(1, 64); {TAKE_N}", "allocates while its products"
    ),
}
FAULTS = {**KEEP, **LOAD, **MAKE, **ONE_STAGE, **PRODUCTS}


@cache
def inputs_of(kind: str, dtype: torch.dtype) -> tuple[Inputs, oracle.Evaluation, oracle.Evaluation]:
    """340 tokens of similar keys, and what 330 of them come to: "weak" gates; "none", with beta 2; "norm", weak with q
    and k to normalise; "heads", weak and several; "strong", weak but for two tokens of a chunk that forget everything,
    so that its decay is beyond 2^-200; "strong norm".
    """
    gates = "none" if kind == "none" else "weak"
    few, many = (2, 4) if kind == "heads" else (1, 1)
    sizes: dict[str, Any] = {"hq": few, "hk": few, "hv": many, "head_k": 128, "head_v": 128}
    inputs = with_state(prefill_inputs([340], **sizes, dtype=dtype, gates=gates, similar_keys=True))
    if kind == "none":
        inputs = constant(inputs, "beta", 2.0)
    if "norm" in kind:
        lengths = 2.0 ** (torch.arange(340) % 5 - 1)[:, None, None]
        inputs |= {"q": (inputs["q"] * lengths * 4).to(dtype), "k": (inputs["k"] * lengths).to(dtype)}
        inputs["use_qk_l2norm_in_kernel"] = True
    if "strong" in kind:
        inputs["g"][70], inputs["g"][74] = -torch.inf, -120.0
    alone = tokens(inputs, 0, 330)
    plain, exact = oracle.prefill(**alone, dtype=torch.float32, operands=dtype), oracle.prefill(**alone)
    return inputs, plain, exact


def judged(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, edits: gluon_emulator.Edits, seed: int,
    plan: Plan,
) -> None:  # fmt: skip
    """The first 330 of 340 tokens are a sequence; behind it is NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    serve(monkeypatch, host)
    monkeypatch.setattr(launch, "bind", partial(gluon_emulator.bind, edits=edits, seed=seed))
    monkeypatch.setattr(host, "plan", lambda *_: plan)
    inputs, plain, exact = inputs_of(kind, dtype)
    given = {**inputs, "cu_seqlens": tokens(inputs, 0, 330)["cu_seqlens"]}
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = inputs[name].clone()
        given[name][330:] = torch.nan
    wide = nans(404, *inputs["v"].shape[1:], dtype=dtype)
    _, state = prefill({**given, "output": wide[:340]}, backend="triton")
    assert_within_budget("output", wide[:330], plain.output, exact.output)
    assert_within_budget("state", state, plain.state, exact.state)
    assert wide[330:].isnan().all(), "written behind the output"


def assert_noticed(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    edits = [(fault.gone, "pass")] if fault.gone else []
    edits += [(fault.right, fault.wrong)]
    for seed in range(3):
        for plan in fault.plans():
            with pytest.raises(AssertionError, match=fault.message):
                judged(monkeypatch, fault.gates, fault.dtype, {fault.function: edits}, seed, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16])
@pytest.mark.parametrize(
    ("groups", "part", "stages"),
    [(1, 0, 3), (2, 0, 3), (3, 0, 3), (1, 128, 3), (2, 128, 3), (1, 0, 1), (2, 0, 1), (3, 0, 1), (3, 0, 2)],
)
@pytest.mark.parametrize("kind", ["weak", "none", "norm", "heads", "strong", "strong norm"])
def test_without_a_fault_all_is_well(
    kind: str, groups: int, part: int, stages: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        judged(monkeypatch, kind, dtype, {}, seed, planned(groups, part, stages))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(monkeypatch, FAULTS[name])
