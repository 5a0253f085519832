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
    """That compute, the third one prepares; 0: one, for parts in turn; none given: all where the function is used."""
    part: int = 0
    dtype: torch.dtype = torch.bfloat16

    def plans(self) -> Iterator[Plan]:
        least = USED_BY.get(self.function, APART if self.part else (1, 2, 3))
        return (planned(groups, self.part) for groups in self.groups or least)


def planned(groups: int, part: int) -> Plan:
    return Plan(min(groups, 2) or 1, part, groups == 3, groups == 0)


def starved(*who_and_what: tuple[str, str]) -> str:
    return "deadlock: .*({})".format("|".join(rf"{who}.* waits for {what}.\d., " for who, what in who_and_what))


RACE, BUDGET, OUTPUT = "race|deadlock|arrivals", "over its budget", "output: .* over its"
"""Which of the three is met first hangs on the order in which partitions run."""
EARLY, UNFENCED, LEFT_BEHIND = "may still run", "no fence: ", "ends with copies"
FP16, APART, MADE, BOTH = torch.float16, (1, 2), (3,), (2, 3)
USED_BY = {"load.load": APART, "load_all": APART, "pair": MADE, "make": MADE, "prepare": (2,)}
STAGE, BUFFER = "(n // STAGES) & 1)", "(n // BUFFERS) & 1)"
FULL, FULL_X = f"mbarrier.wait(full.index(stage), {STAGE}", f"mbarrier.wait(full_x.index(buffer), {BUFFER}"
EMPTY, ROOM = "mbarrier.wait(empty.index(n % STAGES), ((n // STAGES) & 1) ^ 1)", "await_room(empty, done + t, STAGES)"
ROOM_X, OTHER = "await_room(empty, done + t + STAGES - BUFFERS, STAGES)", "(buffer + 1) % BUFFERS"
LANDED, FREE = f"mbarrier.wait(landed.index(stage), {STAGE}", "mbarrier.wait(free.index(0), (n & 1) ^ 1)"
FULL_OF_MAKE, COUNTED = "mbarrier.wait(full.index(stage), turn)", "done += chunks"
DONE, TOLD, TOLD_X, TOLD_P = (f"mbarrier.arrive({x}, count=1)" for x in (
    "empty.index(stage)", "full.index(stage)", "full_x.index(buffer)", "ready.index(buffer)",
))  # fmt: skip
FREED, READY = "mbarrier.arrive(free, count=1)", "mbarrier.wait(ready, parity)"
EXPECT, BYTES = "mbarrier.expect(landed.index(stage), 2 * 64 * (256 if OUT else 128))", "2 * 64 * (256 if OUT else 128)"
EXPECT_X = "mbarrier.expect(full_x.index(buffer), 2 * 64 * (64 * GROUPS + MORE))"
COPY = "copy_async(factors.index(stage), vectors + t * wide(heads) * VECTORS + f)"
ARRIVE = "async_copy.mbarrier_arrive(full.index(stage), increment_count=False)"
STORE = "store_vectors(own, scale, vectors, LOG, sK.dtype == gl.float16)"
NORMS, CLEAR, PUT_N = "normalise(q, k, vectors)", "clear_rows(k, left)", "put_keys(k, room, vectors, nothing, NORM)"
PUT_P = "put_queries(q, k, sP.index(buffer), vectors, nothing, NORM)"
VALUES = "copy_values(sources, done, t, tiles, full_x, empty, GROUPS, 0)"
FIRST, NEXT = (f"copy_pair(sources, done, {t}, tiles, landed, empty, True)" for t in ("0", "t + 1"))
V, DECAYED, OUTPUTS = "V = sV.index", "S = S * vector_of", "from_q = factors"
TAKE_KS, LAST = "KS, state = warpgroup_mma_wait(0", "S, Y = warpgroup_mma_wait(0, deps=(s, Y))"
PIECE = "outputs_of(state, Y, sQ.index(stage), sP.index(buffer), from_q, sO, first, AT_ONCE)"
WITHOUT, FENCE = "without_state(sK", "fence_async_shared()"
STORE_HALF = "sX.slice(half, 64, dim=1).store((X * rows_of(vectors, ROWS_OF_X)).to(dtype))"
LAST_FENCE, WITHOUT_STATE = f"{STORE_HALF}\n    {FENCE}", "without_state("
WAIT, INVERT = "mbarrier.wait(landed.index(0), 0)", "T = inverse("
EXPECT_QK, STORED = "mbarrier.expect(landed.index(0), 2 * 64 * 256)", "tma.store_wait(0)"
STORE_X = "store_tile(x, [narrow(chunk * 64), 0], sK)"
PREPARE_STARVES = "deadlock: the program waits for landed"
NO_PAIRS, NO_TILES = starved(("keep_all", "full"), ("pair", "landed")), starved(("keep_all", "full_x"))
NO_STAGES, NOT_LANDED = starved(("load", "empty"), ("pair", "empty")), starved(("pair", "landed"))
# Not here: fences in keep, for products read what the copy engine wrote without one, and make has its own. make
# releases nothing but N: keep does after it has waited for what make tells of last.
KEEP = {
    "keep does not wait for q and k": Fault("keep", FULL, "pass", RACE),
    "keep does not wait for v, X and P": Fault("keep", FULL_X, "pass", RACE),
    "wrong phase of full": Fault("keep", FULL, FULL.replace("& 1", "& 1 ^ 1"), RACE),
    "wrong phase of full_x": Fault("keep", FULL_X, FULL_X.replace("& 1", "& 1 ^ 1"), RACE),
    "phase of full_x as of two buffers": Fault("keep", FULL_X, FULL_X.replace("BUFFERS", "2"), RACE, groups=(1,)),
    "wrong stage is waited for": Fault("keep", FULL, FULL.replace("stage", "0"), RACE),
    "wrong buffer is waited for": Fault("keep", FULL_X, FULL_X.replace("buffer", OTHER), RACE),
    "wrong stage is released": Fault("keep", DONE, DONE.replace("stage", "0"), RACE),
    "keep releases k while a product reads it": Fault("keep", TAKE_KS, f"{DONE}; {TAKE_KS}", RACE, DONE, 2),
    "keep releases v before it is read": Fault("keep", V, f"{DONE}; {V}", RACE, DONE, 2),
    "keep releases the vectors before they are read": Fault("keep", DECAYED, f"{DONE}; {DECAYED}", RACE, DONE, 2),
    "keep releases q, X and P before they are read": Fault("keep", OUTPUTS, f"{DONE}; {OUTPUTS}", RACE, DONE, 2),
    "keep releases P between outputs": Fault("keep", PIECE, f"{PIECE}; first or {DONE}", RACE, DONE, 2, groups=MADE),
    "keep releases twice": Fault("keep", DONE, DONE.replace("=1", "=2"), RACE),
    "keep does not release": Fault("keep", DONE, "pass", NO_STAGES),
    "wrong stage of k": Fault("keep", "sK.index(stage)", "sK.index(0)", RACE),
    "wrong stage of q": Fault("keep", "sQ.index(stage)", "sQ.index((stage + 1) % STAGES)", RACE),
    "wrong buffer of v": Fault("keep", "GROUPS * buffer", f"GROUPS * ({OTHER})", RACE),
    "wrong buffer of X": Fault("keep", "sX.index(buffer)", f"sX.index({OTHER})", RACE),
    "wrong buffer of P": Fault("keep", "sP.index(buffer)", f"sP.index({OTHER})", RACE),
    "wrong stage of the vectors": Fault("vector_of", "index(stage)", "index(0)", RACE),
    "wrong stage of the decay of q": Fault("keep", f"{OUTPUTS}.index(stage)", f"{OUTPUTS}.index(0)", RACE),
    "one more arrival than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS + 1", "deadlock"),
    "one arrival less than are made": Fault("barriers", "count=ARRIVALS", "count=ARRIVALS - 1", RACE),
    "a summary releases X too early": Fault("keep", LAST, f"{DONE}; {LAST}", RACE, DONE, part=192),
}
LOAD = {
    "room is not waited for": Fault("await_room", EMPTY, "pass", RACE, stages=2),
    "room for q and k is not waited for": Fault("copy_pair", ROOM, "pass", RACE, stages=2),
    "room for v, X and P is not waited for": Fault("copy_values", ROOM_X, "pass", RACE, groups=BOTH),
    "room for v, X and P as if for q and k": Fault("copy_values", ROOM_X, ROOM, RACE, groups=BOTH),
    "room for v, X and P of what comes": Fault("copy_values", " - BUFFERS, S", ", S", NO_STAGES, groups=BOTH),
    "wrong phase of empty": Fault("await_room", EMPTY, EMPTY.replace(" ^ 1", ""), NO_STAGES),
    "phase of empty as if there were no stages": Fault("await_room", "n // STAGES", "n", RACE, stages=2),
    "wrong stage is free": Fault("await_room", "n % STAGES", "0", RACE, stages=2),
    "bytes that never land": Fault("copy_pair", EXPECT, EXPECT.replace("256", "257"), NO_PAIRS),
    "bytes that are not expected": Fault("copy_pair", EXPECT, EXPECT.replace("256", "192"), RACE),
    "no bytes expected": Fault("copy_pair", EXPECT, EXPECT.replace(BYTES, "0"), RACE),
    "nothing expected": Fault("copy_pair", EXPECT, "pass", NO_PAIRS),
    "expected at the wrong barrier": Fault("copy_pair", EXPECT, EXPECT.replace("stage)", "0)"), RACE),
    "expected too early": Fault("copy_pair", ROOM, f"{EXPECT}; {ROOM}", RACE, EXPECT, 2, groups=APART),
    "bytes of X that never land": Fault("load.load", "192 if OUT", "256 if OUT", NO_TILES),
    "bytes of P that are not expected": Fault("load.load", "192 if OUT", "128 if OUT", RACE),
    "bytes of X expected of the copy engine": Fault("pair", VALUES, VALUES.replace("0)", "192)"), NO_TILES),
    "bytes of v that are not expected": Fault("copy_values", "64 * GROUPS + MORE", "MORE", RACE),
    "nothing of v, X and P expected": Fault("copy_values", EXPECT_X, "pass", NO_TILES),
    "v, X and P expected at the wrong barrier": Fault("copy_values", EXPECT_X, EXPECT_X.replace("buffer", "0"), RACE),
    "v, X and P expected too early": Fault(
        "copy_values",
        "if STAGES > BUFFERS:",
        f"{EXPECT_X.replace('buffer', '(done + t) % BUFFERS')}\n    if True:",
        RACE,
        EXPECT_X,
        groups=(2,),
    ),
    "bytes of a summary's q": Fault("copy_pair", BYTES, "2 * 64 * 256", "deadlock: .*full.0.", part=128),
    "bytes of a summary's P": Fault("load.load", "192 if OUT else 128", "192", "deadlock: .*full_x.0.", part=128),
    "v lands at the wrong barrier": Fault("copy_values", "buffer), tile", f"{OTHER}), tile", RACE),
    "X lands without notice": Fault("load.load", "full_x.index(buffer), sX", "full.index(stage), sX", RACE),
    "k lands at the wrong barrier": Fault("copy_pair", "landed.index(stage), sK", "landed.index(0), sK", RACE),
    "q lands at the wrong barrier": Fault("copy_pair", "landed.index(stage), sQ", "landed.index(0), sQ", RACE),
    "the vectors land without notice": Fault("load.load", COPY, f"{ARRIVE}; {COPY}", RACE, ARRIVE),
    "the vectors are not told of": Fault("load.load", ARRIVE, "pass", starved(("keep_all", "full"))),
    "the vectors add to those expected": Fault(
        "load.load", ", increment_count=False", "", starved(("keep_all", "full")), groups=APART
    ),
    "k is loaded into the wrong stage": Fault("copy_pair", "sK.index(stage)", "sK.index(0)", RACE),
    "q is loaded into the wrong stage": Fault("copy_pair", "sQ.index(stage)", "sQ.index(0)", RACE),
    "v is loaded into the wrong buffer": Fault("copy_values", "GROUPS * buffer", f"GROUPS * ({OTHER})", RACE),
    "X is loaded into the wrong buffer": Fault("load.load", "sX.index(buffer)", f"sX.index({OTHER})", RACE),
    "P is loaded into the wrong buffer": Fault(
        "load.load",
        "full_x.index(buffer), sP.index(buffer)",
        f"full_x.index(buffer), sP.index({OTHER})",
        RACE,
    ),
    "buffers as where there are two": Fault("load.load", "% BUFFERS", "% 2", RACE, groups=(1,)),
    "vectors of the wrong stage are loaded": Fault("load.load", COPY, COPY.replace("stage", "0"), RACE),
}
AHEAD = {
    "q and k are not waited for": Fault("pair", LANDED, "pass", RACE),
    "wrong phase of q and k": Fault("pair", LANDED, LANDED.replace("& 1", "& 1 ^ 1"), RACE),
    "phase of q and k as if there were two stages": Fault("pair", LANDED, LANDED.replace("STAGES", "2"), RACE),
    "q and k of the wrong stage are waited for": Fault("pair", LANDED, LANDED.replace("stage", "0"), RACE),
    "the first chunk is not brought": Fault("pair", FIRST, "pass", NOT_LANDED),
    "the next chunk is not brought": Fault("pair", "(left > 64)", "False", NOT_LANDED),
    "the last chunk is not brought": Fault("pair", "(left > 64)", "(left > 128)", NOT_LANDED),
    "a chunk behind the last one is brought": Fault("pair", "(left > 64)", "True", LEFT_BEHIND),
    "of two stages, the next chunk is not brought": Fault("pair", "(STAGES == 2)", "False", NOT_LANDED, stages=2),
    "of two stages, one behind the last is brought": Fault("pair", "(left > 64)", "True", LEFT_BEHIND, stages=2),
    "of two stages, a chunk is brought twice": Fault("pair", "(STAGES > 2)", "True", RACE, stages=2),
    "a chunk is brought twice": Fault("pair", NEXT, f"{NEXT}; {NEXT}", RACE),
    "the tail is cleared before it lands": Fault("pair", LANDED, f"left < 64 and {CLEAR}; {LANDED}", RACE, CLEAR),
    "the norms are taken before q and k land": Fault("pair", LANDED, f"{NORMS}; {LANDED}", RACE, NORMS, gates="norm"),
    "the tail is cleared without a fence": Fault("clear_rows", FENCE, "pass", UNFENCED, groups=BOTH),
    "the wrong stage is cleared": Fault("pair", CLEAR, CLEAR.replace("k,", "sK.index(0),"), f"{RACE}|{BUDGET}"),
    "cleared before products are done with it": Fault("pair", PUT_P, f"{PUT_P}; {CLEAR}", RACE),
    "the next chunk's vectors are stored too early": Fault(
        "pair",
        "own = gates_of(g, beta, left - 64",
        "store_vectors(own, scale, factors.index((stage + 1) % STAGES), LOG, sK.dtype == gl.float16); "
        "own = gates_of(g, beta, left - 64",
        RACE,
    ),
    "vectors are stored into the wrong stage": Fault("pair", "factors.index(stage)", "factors.index(0)", RACE),
    "vectors are stored after they are told of": Fault("pair", STORE, f"{TOLD}; {STORE}", RACE, TOLD),
    "vectors are stored again after P is told of": Fault("pair", TOLD_P, f"{TOLD_P}; {STORE}", RACE),
    "norms are stored after they are told of": Fault("pair", TOLD, f"{TOLD}; {NORMS}", RACE, NORMS, gates="norm"),
    "N is put where the last one may be read": Fault("pair", FREE, "pass", RACE),
    "N is put before its room is free": Fault("pair", FREE, f"{PUT_N}; {FREE}", RACE, PUT_N),
    "wrong phase of free": Fault("pair", FREE, FREE.replace(" ^ 1", ""), starved(("pair", "free"))),
    "phase of free as of buffers": Fault("pair", FREE, FREE.replace("(n & 1)", "((n // 2) & 1)"), RACE),
    "N is put after it is told of": Fault("pair", PUT_N, f"{TOLD}; {PUT_N}", RACE, TOLD),
    "N is put again after it is told of": Fault("pair", TOLD, f"{TOLD}; {PUT_N}", RACE),
    "nobody is told of N": Fault("pair", TOLD, "pass", starved(("make", "full"))),
    "of N is told twice": Fault("pair", TOLD, TOLD.replace("=1", "=2"), RACE),
    "N is told of at the wrong stage": Fault("pair", TOLD, TOLD.replace("stage", "0"), RACE),
    "P is put where the last one may be read": Fault("pair", VALUES, f"{PUT_P}; {VALUES}", RACE, PUT_P),
    "P is put after it is told of": Fault("pair", PUT_P, f"{TOLD_P}; {PUT_P}", RACE, TOLD_P),
    "P is put again after it is told of": Fault("pair", TOLD_P, f"{TOLD_P}; {PUT_P}", RACE),
    "nobody is told of P": Fault("pair", TOLD_P, "pass", starved(("make", "ready"))),
    "of P is told twice": Fault("pair", TOLD_P, TOLD_P.replace("=1", "=2"), RACE),
    "P is told of in the wrong buffer": Fault("pair", TOLD_P, TOLD_P.replace("buffer", "0"), RACE),
    "P is put into the wrong buffer": Fault("pair", PUT_P, PUT_P.replace("buffer", OTHER), RACE),
    "P of the wrong stage of q": Fault("pair", PUT_P, PUT_P.replace("(q,", "(sQ.index((stage + 1) % STAGES),"), RACE),
    "P of the wrong stage of k": Fault("pair", PUT_P, PUT_P.replace("k,", "sK.index((stage + 1) % STAGES),"), RACE),
}
MAKE = {
    "make does not wait for N and vectors": Fault("make", FULL_OF_MAKE, "pass", RACE),
    "make: wrong phase of full": Fault("make", "turn ^ 1, turn", "turn, turn ^ 1", RACE),
    "make waits for the wrong stage": Fault("make", FULL_OF_MAKE, FULL_OF_MAKE.replace("stage", "0"), RACE),
    "make does not wait for P": Fault("without_state", READY, "pass", RACE),
    "make waits for P too late": Fault("without_state", LAST_FENCE, f"{LAST_FENCE}; {READY}", RACE, READY),
    "make: wrong phase of ready": Fault("make", "(n // BUFFERS) & 1", "(n // BUFFERS) & 1 ^ 1", RACE),
    "make: phase of ready as if there were one": Fault("make", "(n // BUFFERS) & 1", "n & 1", RACE),
    "make waits for P in the wrong buffer": Fault("make", "ready.index(buffer)", "ready.index(0)", RACE),
    "make frees N before it is read": Fault(
        "without_state", INVERT, f"mbarrier.arrive(signals[0], count=1); {INVERT}", RACE, FREED
    ),
    "make does not free N": Fault("without_state", FREED, "pass", starved(("pair", "free"))),
    "make frees N twice": Fault("without_state", FREED, FREED.replace("=1", "=2"), RACE),
    "make tells of X before it is there": Fault("make", WITHOUT_STATE, f"{TOLD_X}; {WITHOUT_STATE}", RACE, TOLD_X),
    "make tells of X twice": Fault("make", TOLD_X, TOLD_X.replace("=1", "=2"), RACE),
    "make tells nobody of X": Fault("make", TOLD_X, "pass", NO_TILES),
    "make tells of the wrong buffer": Fault("make", TOLD_X, TOLD_X.replace("buffer", "0"), RACE),
    "make: wrong stage of k": Fault("make", "sK.index(stage)", "sK.index(0)", RACE),
    "make: wrong stage of the vectors": Fault("make", "factors.index(stage)", "factors.index(0)", RACE),
    "make: wrong buffer of X": Fault("make", "sX.index(buffer)", f"sX.index({OTHER})", RACE),
    "make: wrong buffer of P": Fault("make", "sP.index(buffer)", f"sP.index({OTHER})", RACE),
    "barrier full counts what load waits for": Fault("chain", "1 if MAKE else 129", "2", starved(("make", "full"))),
    "barrier full_x does not count make": Fault("chain", "2 if MAKE else 1)", "1)", RACE),
    "barrier landed counts two": Fault("chain", "16), barriers(STAGES, 1)", "16), barriers(STAGES, 2)", NOT_LANDED),
    "barrier free counts two": Fault("chain", "barriers(1, 1)", "barriers(1, 2)", starved(("pair", "free"))),
    "barrier ready counts two": Fault("chain", "barriers(2, 1))\n", "barriers(2, 2))\n", starved(("make", "ready"))),
}
JOBS = {
    "keep miscounts the jobs before": Fault("keep_all", COUNTED, f"{COUNTED} + 1", RACE),
    "load miscounts the jobs before": Fault("load_all", COUNTED, f"{COUNTED} + 1", RACE),
    "pair miscounts the jobs before": Fault("pair", COUNTED, f"{COUNTED} + 1", RACE),
    "make forgets the jobs before": Fault("make", "for t in", "n = n * 0\n        for t in", RACE),
    "keep leaves a job out": Fault("keep_all", "jobs[1]", "jobs[1] - jobs[2]", f"{NO_STAGES}|{LEFT_BEHIND}"),
    "load leaves a job out": Fault("load_all", "jobs[1]", "jobs[1] - jobs[2]", starved(("keep_all", "full"))),
    "pair leaves a job out": Fault("pair", "jobs[1]", "jobs[1] - jobs[2]", starved(("make", "full"))),
    "make leaves a job out": Fault("make", "jobs[1]", "jobs[1] - jobs[2]", NO_TILES),
    "keep goes through them backwards": Fault("keep_all", "jobs, job,", "jobs, jobs[0] + jobs[1] - 2 - job,", BUDGET),
    "programs share jobs": Fault("keep_all", "jobs, job,", "jobs, job // 2 * 2,", f"{BUDGET}|nan"),
}
TURNS = {
    "a turn comes twice": Fault("job_of", "place += at", "place += at * 0", f"{BUDGET}|nan"),
    "a turn's chunks are not prepared": Fault("prepare", "head = at +", "head = 0 * at +", f"{BUDGET}|nan"),
    "a turn leaves it to another head": Fault("keep_all", "carry + (head *", "carry + ((head ^ 1) *", BUDGET),
}
TAKE_O = "o, Y = warpgroup_mma_wait(0, deps=(o, Y))"
TAKE_PAIRS = "return warpgroup_mma_wait(0"
TAKE_P, TAKE_X = "PT, high, low = warpgroup_mma_wait(0", "X, high, low = warpgroup_mma_wait(0"
STORE_P = "sP.permute((1, 0)).store(KQ.to(sP.dtype))"
UNSTORED = "ends with stores"
PRODUCTS = {
    "prepare does not wait for q and k": Fault("prepare", WAIT, "pass", RACE),
    "wrong phase of landed": Fault("prepare", WAIT, WAIT.replace(", 0)", ", 1)"), RACE),
    "bytes of q and k that never land": Fault("prepare", "2 * 64 * 256", "3 * 64 * 256", PREPARE_STARVES),
    "bytes of q that are not expected": Fault("prepare", "2 * 64 * 256", "64 * 256", RACE),
    "nothing of q and k expected": Fault("prepare", EXPECT_QK, "pass", PREPARE_STARVES),
    "q and k are expected twice": Fault("prepare", EXPECT_QK, f"{EXPECT_QK}; {EXPECT_QK}", "arrivals"),
    "prepare expects more arrivals": Fault("prepare", "count=1)", "count=2)", PREPARE_STARVES),
    "prepare clears the tail before it lands": Fault("prepare", WAIT, f"clear_rows(sK, length); {WAIT}", RACE),
    "prepare takes norms before q and k land": Fault("prepare", WAIT, f"normalise(sQ, sK, own); {WAIT}", RACE),
    "X and P are told of without a fence": Fault("without_state", LAST_FENCE, STORE_HALF, UNFENCED),
    "X is stored behind its fence": Fault("without_state", LAST_FENCE, f"{FENCE}; {STORE_HALF}", UNFENCED),
    "no fence between P and its product": Fault("put_queries", FENCE, "pass", UNFENCED),
    "P is stored behind its fence": Fault("put_queries", STORE_P, f"{FENCE}; {STORE_P}", UNFENCED, FENCE),
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
    "K K and Q K taken too early": Fault("pairs", TAKE_PAIRS, TAKE_PAIRS.replace("0", "1"), EARLY),
    "P taken too early": Fault("without_state", TAKE_P, TAKE_P.replace("0", "1"), EARLY),
    "X taken too early": Fault("without_state", TAKE_X, TAKE_X.replace("0", "1"), EARLY),
    "k overwritten where it is still read": Fault(
        "pairs", TAKE_PAIRS, f"sK.store(sK.load()); {TAKE_PAIRS}", "is overwritten while a product"
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
        "without_state", TAKE_X, f"vectors_in_shared(1, 64); {TAKE_X}", "allocates while its products"
    ),
}
FAULTS = {
    **KEEP,
    **LOAD,
    **{name: fault._replace(groups=fault.groups or MADE) for name, fault in (AHEAD | MAKE).items()},
    **{name: fault._replace(gates="heads") for name, fault in JOBS.items()},
    **{name: fault._replace(groups=(0,), part=128, gates="heads") for name, fault in TURNS.items()},
    **PRODUCTS,
}


@cache
def inputs_of(kind: str, dtype: torch.dtype) -> tuple[Inputs, oracle.Evaluation, oracle.Evaluation]:
    """340 tokens of similar keys, and what 330 of them come to: "weak" gates; "none", with beta 2; "same 1.1", one key
    for all, with this beta and no gates; "norm", weak with q and k to normalise; "heads", weak and several; "strong",
    weak but for two tokens of a chunk that forget everything, so that its decay is beyond 2^-200; "strong norm".
    """
    gates = "none" if kind == "none" or "same" in kind else "weak"
    few, many = (2, 4) if kind == "heads" else (1, 1)
    sizes: dict[str, Any] = {"hq": few, "hk": few, "hv": many, "head_k": 128, "head_v": 128}
    inputs = with_state(prefill_inputs([340], **sizes, dtype=dtype, gates=gates, similar_keys=True))
    if kind == "none":
        inputs = constant(inputs, "beta", 2.0)
    if "same" in kind:
        inputs = constant(inputs | {"k": inputs["k"][:1].repeat(340, 1, 1)}, "beta", float(kind.split()[1]))
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
    plan: Plan, stages: int = 3,
) -> None:  # fmt: skip
    """The first 330 of 340 tokens are a sequence; behind it is NaN. "heads" are two or four jobs for each program."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    serve(monkeypatch, host)
    monkeypatch.setattr(launch, "bind", partial(gluon_emulator.bind, edits=edits, seed=seed))
    monkeypatch.setattr(host, "plan", lambda *_: plan)
    monkeypatch.setattr(host, "STAGES", stages)
    monkeypatch.setattr(host, "_processors", lambda _: 2)
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
                judged(monkeypatch, fault.gates, fault.dtype, {fault.function: edits}, seed, plan, fault.stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16])
@pytest.mark.parametrize(
    ("groups", "part", "stages"),
    [(1, 0, 3), (2, 0, 3), (3, 0, 3), (1, 128, 3), (2, 128, 3), (0, 128, 3), (1, 0, 2), (2, 0, 2), (3, 0, 2)],
)
@pytest.mark.parametrize("kind", ["weak", "none", "same 1.1", "norm", "heads", "strong", "strong norm"])
def test_without_a_fault_all_is_well(
    kind: str, groups: int, part: int, stages: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        judged(monkeypatch, kind, dtype, {}, seed, planned(groups, part), stages)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(monkeypatch, FAULTS[name])
