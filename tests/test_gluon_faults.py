"""Would the tests of Hopper's prefill notice? Faults that a GPU forgives now and then, and wrong formulas."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from triton.experimental.gluon import language as gl

import gluon_emulator
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, with_state
from helpers import nans, prefill, tokens
from prefill_helpers import serve

host = import_module("gated_delta.kernels.gluon.prefill")
MODULES = [import_module(f"gated_delta.kernels.gluon.{name}") for name in ("chain", "parts")]


class Fault(NamedTuple):
    function: str
    right: str
    wrong: str
    message: str
    gone: str = ""
    """What is taken away, where the wrong piece has it elsewhere."""
    stages: int = 3
    stiff: bool = False
    """With beta 2 and no decay."""
    groups: tuple[int, ...] = (1, 2)
    part: int = 0
    dtype: torch.dtype = torch.bfloat16


RACE, BUDGET, OUTPUT, STATE = "race|deadlock|arrivals", "over its budget", "output: .* over its", "state: .* over its"
"""Which of the three is met first hangs on the order in which partitions run."""
EARLY, UNFENCED = "may still run", "no fence: "
STAGE, BUFFER = "(t // STAGES) & 1)", "(t // 2) & 1)"
FULL, FULL_X = f"mbarrier.wait(full.index(stage), {STAGE}", f"mbarrier.wait(full_x.index(buffer), {BUFFER}"
EMPTY = f"mbarrier.wait(empty.index(stage), ({STAGE} ^ 1)"
EMPTY_X = f"mbarrier.wait(empty_x.index(buffer), ({BUFFER} ^ 1)"
DONE = "mbarrier.arrive(empty.index(stage), count=1)"
DONE_X = "mbarrier.arrive(empty_x.index(buffer), count=1)"
EXPECT = "mbarrier.expect(full.index(stage), 2 * 64 * 64 * (GROUPS + (4 if OUT else 2)))"
EXPECT_X = "mbarrier.expect(full_x.index(buffer), 2 * 64 * 64 * (3 if OUT else 2))"
COPY = "copy_async(factors.index(stage), vectors + f)"
ARRIVE = "async_copy.mbarrier_arrive(full.index(stage), increment_count=False)"
TAKE_QS = "QS, state = "
V, DECAYED, LAST = "V = sV.index", "S = S * vector_of", "S = warpgroup_mma_wait(1 if OUT else 0, deps=(s,))"
WAIT, LANDED = "mbarrier.wait(landed.index(0), 0)", "async_copy.mbarrier_arrive(landed.index(0), increment_count=False)"
KEEP_STARVES, LOAD_STARVES = r"deadlock: .*keep_from.* waits for {}.0., ", r"deadlock: .*load waits for {}.0., "
# Not here: the fences of keep, for products read what the copy engine wrote without one; and with three stages nothing
# hangs on empty, since load has waited by then for X and P of the chunk that had the stage.
SIGNALS = {
    "keep does not wait for q, k and v": Fault("keep", FULL, "pass", RACE),
    "keep does not wait for X and P": Fault("keep", FULL_X, "pass", RACE),
    "load does not wait for free stages": Fault("load", EMPTY, "pass", RACE, stages=2),
    "load does not wait for free buffers": Fault("load", EMPTY_X, "pass", RACE),
    "wrong phase of full": Fault("keep", FULL, FULL.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong phase of full_x": Fault("keep", FULL_X, FULL_X.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong phase of empty": Fault("load", EMPTY, EMPTY.replace(" ^ 1", ""), LOAD_STARVES.format("empty")),
    "wrong phase of empty_x": Fault("load", EMPTY_X, EMPTY_X.replace(" ^ 1", ""), LOAD_STARVES.format("empty_x")),
    "phase of empty as if there were no stages": Fault("load", EMPTY, EMPTY.replace("// STAGES", ""), RACE, stages=2),
    "wrong stage is waited for": Fault("keep", FULL, FULL.replace("stage", "0"), RACE),
    "wrong buffer is waited for": Fault("keep", FULL_X, FULL_X.replace("buffer", "1 - buffer"), RACE),
    "wrong stage is released": Fault("keep", DONE, DONE.replace("stage", "0"), RACE),
    "wrong buffer is released": Fault("keep", DONE_X, DONE_X.replace("buffer", "0"), RACE),
    "keep releases q and k while products read them": Fault("keep", "KS = warp", f"{DONE}; KS = warp", RACE, DONE, 2),
    "keep releases v before it is read": Fault("keep", V, f"{DONE}; {V}", RACE, DONE, 2),
    "keep releases the vectors before they are read": Fault("keep", DECAYED, f"{DONE}; {DECAYED}", RACE, DONE, 2),
    "keep releases q before its product is waited for": Fault("keep", TAKE_QS, f"{DONE}; {TAKE_QS}", RACE, DONE, 2),
    "keep releases X and P while products read them": Fault("keep", LAST, f"{DONE_X}; {LAST}", RACE, DONE_X),
    "keep releases P while a product reads it": Fault("keep", "outcome, Y =", f"{DONE_X}; outcome, Y =", RACE, DONE_X),
    "keep releases q, k and v twice": Fault("keep", DONE, DONE.replace("=1", "=2"), RACE),
    "keep releases X and P twice": Fault("keep", DONE_X, DONE_X.replace("=1", "=2"), RACE),
    "keep does not release q, k and v": Fault("keep", DONE, "pass", LOAD_STARVES.format("empty")),
    "keep does not release X and P": Fault("keep", DONE_X, "pass", LOAD_STARVES.format("empty_x")),
    "one more arrival than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS + 1", "deadlock"),
    "one arrival less than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS - 1", RACE),
    "bytes that never land": Fault("load", EXPECT, EXPECT.replace("+ (4", "+ (5"), KEEP_STARVES.format("full")),
    "bytes of X that never land": Fault("load", EXPECT_X, EXPECT_X.replace("(3", "(4"), KEEP_STARVES.format("full_x")),
    "bytes that are not expected": Fault("load", EXPECT, EXPECT.replace("+ (4", "+ (3"), RACE),
    "bytes of P that are not expected": Fault("load", EXPECT_X, EXPECT_X.replace("(3", "(2"), RACE),
    "no bytes expected": Fault("load", EXPECT, "mbarrier.expect(full.index(stage), 0)", RACE),
    "nothing expected": Fault("load", EXPECT, "pass", KEEP_STARVES.format("full")),
    "nothing of X expected": Fault("load", EXPECT_X, "pass", KEEP_STARVES.format("full_x")),
    "expected too early": Fault("load", f"{EMPTY}\n        {EXPECT}", f"{EXPECT}; {EMPTY}", RACE, stages=2),
    "X lands without notice": Fault("load", "full_x.index(buffer), sX", "full.index(stage), sX", RACE),
    "the vectors land without notice": Fault("load", f"{COPY}\n        {ARRIVE}", f"{ARRIVE}; {COPY}", RACE),
    "the vectors are not told of": Fault("load", ARRIVE, "pass", KEEP_STARVES.format("full")),
    "the vectors add to those expected": Fault("load", ", increment_count=False", "", KEEP_STARVES.format("full")),
    "loaded into the wrong stage": Fault("load", "sK.index(stage)", "sK.index(0)", RACE),
    "loaded into the wrong buffer": Fault("load", "sX.index(buffer)", "sX.index(1 - buffer)", RACE),
    "wrong stage of k": Fault("keep", "sK.index(stage)", "sK.index(0)", RACE),
    "wrong stage of q": Fault("keep", "sQ.index(stage)", "sQ.index((stage + 1) % STAGES)", RACE),
    "wrong buffer of X": Fault("keep", "sX.index(buffer)", "sX.index(1 - buffer)", RACE),
    "wrong buffer of P": Fault("keep", "sP.index(buffer)", "sP.index(1 - buffer)", RACE),
    "wrong stage of the vectors": Fault("vector_of", "index(stage)", "index(0)", RACE),
    "prepare does not wait for q and k": Fault("prepare", WAIT, "pass", RACE),
    "wrong phase of landed": Fault("prepare", WAIT, WAIT.replace(", 0)", ", 1)"), RACE),
    "copies of q and k are not told of": Fault("prepare", LANDED, "pass", "deadlock: the program waits for landed"),
    "q and k add to those expected": Fault("prepare", LANDED, LANDED.replace("False", "True"), "deadlock: the program"),
    "prepare expects more copies": Fault("prepare", "count=128", "count=256", "deadlock: the program waits for landed"),
    "prepare expects fewer copies": Fault("prepare", "count=128", "count=32", "arrivals"),
    "bytes of a summary's q": Fault("load", "+ (4 if OUT else 2)", "+ 4", "deadlock: .*full.0.", part=128),
    "bytes of a summary's P": Fault("load", "(3 if OUT else 2)", "3", "deadlock: .*full_x.0.", part=128),
    "a summary releases X too early": Fault("keep", LAST, f"{DONE_X}; {LAST}", RACE, DONE_X, part=192),
}
ACROSS = "z, a, rest = warp"
PRODUCTS = {
    "K S taken too early": Fault("keep", "KS = warpgroup_mma_wait(1", "KS = warpgroup_mma_wait(2", EARLY),
    "Q S taken too early": Fault("keep", "warpgroup_mma_wait(1, deps=(qs", "warpgroup_mma_wait(2, deps=(qs", EARLY),
    "S taken too early": Fault("keep", LAST, LAST.replace("(1", "(2"), EARLY),
    "O taken too early": Fault("keep", "outcome, Y = warpgroup_mma_wait(0", "outcome, Y = warpgroup_mma_wait(1", EARLY),
    "a summary's S taken too early": Fault("keep", LAST, LAST.replace("else 0", "else 1"), EARLY, part=128),
    "products nobody waits for": Fault("keep", "outcome, Y = warpgroup_mma_wait(0", "outcome = zero  # ", RACE),
    "K K taken too early": Fault("prepare", "KK, KQ = warpgroup_mma_wait(0", "KK, KQ = warpgroup_mma_wait(1", EARLY),
    "P taken too early": Fault(
        "prepare", "PT, high_T, low_T = warpgroup_mma_wait(0", "PT, _, _ = warpgroup_mma_wait(1", EARLY
    ),
    "X taken too early": Fault(
        "prepare", "X, high_T, low_T = warpgroup_mma_wait(0", "X, _, _ = warpgroup_mma_wait(1", EARLY
    ),
    "the inverse's product taken too early": Fault(
        "product", f"{ACROSS}group_mma_wait(0", f"{ACROSS}group_mma_wait(1", EARLY
    ),
    "no fence after q and k have landed": Fault("prepare", "fence_async_shared()", "pass", UNFENCED),
    "no fence between store and product": Fault("product", "fence_async_shared()", "pass", UNFENCED),
    "operand overwritten too early": Fault("product", ACROSS, f"sX.store(high); {ACROSS}", "sX is overwritten"),
    "P stored where k is still read": Fault(
        "prepare", "KK, KQ = ", "sK.index(0).store(sK.index(1).load()); KK, KQ = ", "sK is overwritten"
    ),
    "memory that products still read given away": Fault(
        "prepare", "KK, KQ = ", "line_in_shared(); KK, KQ = ", "allocates while its products"
    ),
}
INTO_X = "high_T, low_T = parts(T * s_left.load(gl.SliceLayout(0, ACC))[None, :], dtype)"
INTO_P, FP16 = "high_T, low_T = parts(T, dtype)", torch.float16
UPPER = "gl.where(i <= j, difference"
FORMULAS = {
    "decay of the state forgotten": Fault("keep", "S = S * vector_of", "S = S + 0 * vector_of", BUDGET),
    "decay of K S forgotten": Fault("keep", "KS * from_k[None, :]", "KS * -1.0", BUDGET),
    "decay of q forgotten": Fault("keep", "QS * from_q[None, :]", "QS * 0.088", OUTPUT),
    "wrong half of v": Fault("keep", "GROUPS * stage + GROUP", "GROUPS * stage", BUDGET, groups=(2,)),
    "wrong half of v is loaded": Fault("load", "v_column + 64 * group", "v_column", BUDGET, groups=(2,)),
    "wrong half of v for a program": Fault(
        "chain", "head // RV * v_head) + own", "head // RV * v_head)", BUDGET, groups=(1,)
    ),
    "wrong half of the state": Fault("keep_from", "GROUP * 64", "0", BUDGET, groups=(2,)),
    "wrong half of the output": Fault("keep", "output + GROUP * 64", "output", BUDGET, groups=(2,)),
    "values behind the sequence": Fault("keep", "column < length - t * 64", "column >= 0", BUDGET),
    "outputs a chunk early": Fault("keep", "done, t - 1", "done, t", OUTPUT),
    "outputs before the sequence": Fault("store_outputs", "(row >= 0) & ", "", "memory"),
    "outputs behind the sequence": Fault("store_outputs", " & (row < length)", "", "memory|behind"),
    "gates behind the sequence": Fault("gates_of", "mask=row < length", "mask=row >= 0", f"memory|{BUDGET}"),
    "keys behind the sequence": Fault(
        "prepare", "(c + 64 * half)), mask=n < length", "(c + 64 * half)), mask=n >= 0", f"memory|{BUDGET}"
    ),
    "diagonal of P forgotten": Fault("decays", UPPER, UPPER.replace("<=", "<"), OUTPUT),
    "P not triangular": Fault("decays", UPPER, UPPER.replace("i <= j", "i <= 64 + j"), OUTPUT),
    "decay between tokens the other way": Fault(
        "decays",
        "high.load(c)[None, :] - high.load(r)[:, None]",
        "high.load(r)[:, None] - high.load(c)[None, :]",
        BUDGET,
    ),
    "beta of columns forgotten": Fault("prepare", "of_k, of_q = grown * strength", "of_k, of_q = grown", BUDGET),
    "beta of T forgotten": Fault("prepare", "T = T * s_strength", "T = T + 0 * s_strength", BUDGET),
    "decay of X forgotten": Fault("prepare", "parts(T * s_left", "parts(T + 0 * s_left", BUDGET),
    "scale of P forgotten": Fault("prepare", "grown * scale", "grown", OUTPUT),
    "rest of the decay forgotten": Fault("prepare", "gl.exp2(whole) * rest", "gl.exp2(whole)", BUDGET),
    "halves of X swapped": Fault("prepare", "x + 64 * half", "x + (64 - 64 * half)", BUDGET),
    "T in one part": Fault("prepare", INTO_X, f"{INTO_X}; low_T = low_T * 0", BUDGET, stiff=True),
    "T in one part, fp16": Fault("prepare", INTO_X, f"{INTO_X}; low_T = low_T * 0", BUDGET, stiff=True, dtype=FP16),
    "T in one part for P": Fault("prepare", INTO_P, f"{INTO_P}; low_T = low_T * 0", OUTPUT, stiff=True),
    "the inverse in one part, fp16": Fault("prepare", "dtype == gl.float16", "False", BUDGET, stiff=True, dtype=FP16),
    "a rest of the inverse forgotten, fp16": Fault(
        "product", "z = warpgroup_mma(rest, sX, z, is_async=True)", "pass", BUDGET, stiff=True, dtype=FP16
    ),
    "diagonal blocks not inverted": Fault("substitute", "range(15, -1, -1)", "range(15, 0, -1)", BUDGET),
    "substitution leaves a row out": Fault("substitute", "row > i", "row > i + 1", BUDGET),
    "blocks of 16 not joined": Fault("inverse", "i // 16 < j // 16", "i // 16 > j // 16", BUDGET),
    "blocks of 32 not joined": Fault("inverse", "i // 32 < j // 32", "i // 32 > j // 32", BUDGET),
    "blocks joined with the wrong sign": Fault("inverse", "gl.where(below, x, -y))", "gl.where(below, x, y))", BUDGET),
    "lower blocks lost": Fault("inverse", "gl.where(below, 0.0, x)", "x", BUDGET),
    "a join forgets its left factor": Fault(
        "inverse",
        "y = product(diagonal, product(near, x, 16, FINE), 16, FINE)",
        "y = product(near, x, 16, FINE)",
        BUDGET,
    ),
    "a join forgets its right factor": Fault(
        "inverse",
        "y = product(far, x, 32, FINE)",
        "y = product(far, gl.where(lower(32, None), x * 0 + 1, 1.0), 32, FINE)",
        BUDGET,
    ),
    "values in what a state becomes": Fault("keep_summary", "unit == 0", "True", BUDGET, part=128),
    "no unit matrix": Fault("keep_summary", "unit, 1.0", "unit, 0.0", BUDGET, stiff=True, part=128),
    "wrong half of the unit matrix": Fault("keep_summary", "GROUP * 64 + ", "", BUDGET, stiff=True, part=128),
    "parts start a part early": Fault("chain", "first = begin + before", "first = begin", BUDGET, part=128),
    "the first part writes the last state": Fault("chain", "before + part >= length", "before == 0", BUDGET, part=128),
}
FAULTS = {**SIGNALS, **PRODUCTS, **FORMULAS}


@pytest.fixture(autouse=True)
def in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    serve(monkeypatch, host)


def judged(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, edits: gluon_emulator.Edits, seed: int, groups: int, part: int = 0
) -> None:
    """The first 330 of 340 tokens are a sequence; behind it is NaN."""
    monkeypatch.setattr(host, "launch", partial(gluon_emulator.launch, edits=edits, seed=seed))
    monkeypatch.setattr(host, "plan", lambda *_: host.Plan(groups, part))
    alone = tokens(inputs, 0, 330)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][330:] = torch.nan
    inputs["cu_seqlens"] = alone["cu_seqlens"]
    dtype = inputs["q"].dtype
    wide = nans(404, 1, 128, dtype=dtype)
    _, state = prefill({**inputs, "output": wide[:340]}, backend="triton")
    plain, exact = oracle.prefill(**alone, dtype=torch.float32, operands=dtype), oracle.prefill(**alone)
    assert_within_budget("output", wide[:330], plain.output, exact.output)
    assert_within_budget("state", state, plain.state, exact.state)
    assert wide[330:].isnan().all(), "written behind the output"


def similar_keys(gates: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    options = {"gates": gates, "similar_keys": True, "dtype": dtype}
    return with_state(prefill_inputs([340], hq=1, hk=1, hv=1, head_k=128, head_v=128, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "part"), [(1, 0), (2, 0), (1, 128), (2, 128)])
@pytest.mark.parametrize("gates", ["weak", "none"])
def test_without_a_fault_all_is_well(
    gates: str, groups: int, part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        judged(monkeypatch, inputs_of(gates, dtype), {}, seed, groups, part)


def inputs_of(gates: str, dtype: torch.dtype) -> Inputs:
    inputs = similar_keys(gates, dtype)
    if gates == "none":
        inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    return inputs


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    edits = [(fault.gone, "pass")] if fault.gone else []
    edits += [(fault.right, fault.wrong)]
    for module in MODULES:
        monkeypatch.setattr(module, "STAGES", gl.constexpr(fault.stages))
    for seed in range(3):
        for groups in fault.groups:
            inputs = inputs_of("none" if fault.stiff else "weak", fault.dtype)
            with pytest.raises(AssertionError, match=fault.message):
                judged(monkeypatch, inputs, {fault.function: edits}, seed, groups, fault.part)
