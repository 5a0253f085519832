"""Would the tests of Hopper's prefill notice a wrong formula? Each is judged as test_gluon_faults has it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gated_delta.kernels.gluon.prefill import Plan
from test_gluon_faults import APART, BUDGET, FP16, MADE, OUTPUT, UNFENCED, Fault, assert_noticed, judged

INVERTED, JOINED = "inverse(N, nothing, FINE)", "x * below - y * (1.0 - below)"
ROWS_OF_P, COLUMNS_OF_P = "rows_of(vectors, ROWS_OF_P, COUNT)", "columns_of(vectors, COLUMNS_OF_P, FIRST, COUNT)"
ROWS_OF_X, SPREAD = "X * rows_of(vectors, ROWS_OF_X)", "gl.exp2(columns_of(vectors, HIGH, FIRST, COUNT)"
SWAPPED = "sP.slice(32 - first, WIDTH, dim=0).permute((1, 0)).store"
LEFT = "gl.exp2(whole - high) * rest * shrunk"
TAKE_P, TAKE_X = "deps=(product2(high, low, tile)", "x = product2(high, low"
MOVED = f"{UNFENCED}|{BUDGET}"
"""Where X, or half of P, comes to lie on what a product still has to read."""
BOTH = (2, 3)
"""The groups of a program with both halves of a state."""
CHAIN = {
    "decay of the state forgotten": Fault("keep", "S = S * vector_of", "S = S + 0 * vector_of", BUDGET),
    "decay of K S forgotten": Fault("keep", "KS * vector_of(factors, stage, FROM_K, c)[None, :]", "KS * -1.0", BUDGET),
    "decay of q forgotten": Fault("outputs_of", "o * factor[None, :]", "o * 0.088", OUTPUT),
    "Q S forgotten": Fault("outputs_of", "o * factor[None, :]", "o * 0", OUTPUT),
    "decay of other tokens": Fault("outputs_of", "from_q.slice(FIRST", "from_q.slice(32 - FIRST", OUTPUT, groups=MADE),
    "outputs of other tokens": Fault("outputs_of", "sO.slice(FIRST", "sO.slice(0", OUTPUT, groups=MADE),
    "queries of other tokens": Fault("outputs_of", "sQ.slice(FIRST", "sQ.slice(0", OUTPUT, groups=MADE),
    "P of other tokens": Fault("outputs_of", "sP.slice(FIRST", "sP.slice(0", OUTPUT, groups=MADE),
    "outputs of some tokens": Fault("keep", "static_range(0, 64, AT", "static_range(0, 32, AT", OUTPUT, groups=MADE),
    "P not transposed": Fault("without_state", "dim=0).permute((1, 0))", "dim=0)", OUTPUT, groups=MADE),
    "P not transposed before its product": Fault("without_state", "sP.permute((1, 0)).store", "sP.store", OUTPUT),
    "outputs of the state after the chunk": Fault(
        "keep", "outputs_of(state", "outputs_of(warpgroup_mma_wait(0, deps=(s,)).to(dtype)", OUTPUT
    ),
    "wrong half of v": Fault("keep", "GROUPS * buffer + GROUP", "GROUPS * buffer", BUDGET, groups=BOTH),
    "wrong half of v is loaded": Fault("load", "v_column + 64 * group", "v_column", BUDGET, groups=BOTH),
    "wrong half of v for a program": Fault("chain", "v_head) + own", "v_head)", BUDGET, groups=(1,)),
    "wrong half of the state": Fault("keep_from", "GROUP * 64", "0", BUDGET, groups=BOTH),
    "wrong half of the output": Fault("keep", "output + GROUP * 64", "output", BUDGET, groups=BOTH),
    "values behind the sequence": Fault("keep", "if length - t * 64 < 64", "if False", BUDGET),
    "a value behind the sequence": Fault("keep", "< length - t * 64, Y", "<= length - t * 64, Y", BUDGET),
    "values lost in the last chunk": Fault("keep", "< length - t * 64, Y", "< length - t * 64 - 1, Y", BUDGET),
    "outputs a chunk early": Fault("keep", "sO, t - 1", "sO, t", OUTPUT),
    "outputs before the sequence": Fault("store_outputs", "(row >= 0) & ", "", "memory"),
    "outputs behind the sequence": Fault("store_outputs", " & (row < length)", "", "memory|behind"),
    "values in what a state becomes": Fault("keep_summary", "unit == 0", "True", BUDGET, part=128),
    "no unit matrix": Fault("keep_summary", "unit, 1.0", "unit, 0.0", BUDGET, gates="none", part=128),
    "wrong half of the unit matrix": Fault("keep_summary", "GROUP * 64 + ", "", BUDGET, gates="none", part=128),
    "parts start a part early": Fault("chain", "first = begin + before", "first = begin", BUDGET, part=128),
    "the first part writes the last state": Fault("chain", "before + part >= length", "before == 0", BUDGET, part=128),
}
GATES = {
    "gates behind the sequence": Fault("gates_of", "mask=row < length", "mask=row >= 0", f"memory|{BUDGET}"),
    "gates of the first chunk": Fault("load", "at = wide(t * 64)", "at = wide(0)", BUDGET, groups=MADE),
    "gates of the next sequence": Fault("load", "beta_row, left", "beta_row, 64", f"memory|{BUDGET}", groups=MADE),
    "keys behind the sequence": Fault("copy_rows", "mask=n < left", "mask=n >= 0", f"memory|{BUDGET}"),
    "keys of the next sequence": Fault("load", "not MAKE or left >= 64", "True", BUDGET, groups=MADE),
    "keys of the first chunk at the end": Fault("load", "k_rows + t * 64", "k_rows + 0 * 64", BUDGET, groups=MADE),
    "logarithms to the base e": Fault("gates_of", "x * 1.4426950408889634", "x", BUDGET),
    "alpha 0 without a bound": Fault("gates_of", "gl.maximum(x, -160.0), b", "x, b", BUDGET, gates="strong"),
    "decay of K S with the wrong sign": Fault("store_vectors", "eight(-start", "eight(start", BUDGET),
    "scale of Q S forgotten": Fault("store_vectors", "start * scale", "start", OUTPUT),
    "rest of the decay forgotten": Fault(
        "store_vectors", "decay = gl.exp2(whole) * rest", "decay = gl.exp2(whole)", BUDGET
    ),
    "rest of the decay of X forgotten": Fault("store_vectors", "* rest * shrunk", "* shrunk", BUDGET),
    "rest of the decay of rows of X forgotten": Fault("store_vectors", "* rest * shrunk", "* rest", BUDGET),
    "decay of X, of the whole chunk": Fault("store_vectors", LEFT, LEFT.replace(" - high", ""), BUDGET),
    "rest of rows of P forgotten": Fault(
        "store_vectors", "exp2(middle - high) * shrunk", "exp2(middle - high)", BUDGET
    ),
    "rest of columns of P forgotten": Fault(
        "store_vectors", "exp2(high - middle) * grown", "exp2(high - middle)", OUTPUT
    ),
    "decay of rows of P forgotten": Fault("store_vectors", "gl.exp2(middle - high) * shrunk", "1.0", BUDGET),
    "decay of columns of P forgotten": Fault("store_vectors", "gl.exp2(high - middle) * grown", "all + 1", OUTPUT),
    "decay of X forgotten": Fault("store_vectors", f"left, flag = {LEFT}", "left, flag = all + 1", BUDGET),
    "beta of P forgotten": Fault("store_vectors", "shrunk * strength)", "shrunk)", OUTPUT),
    "beta of X forgotten": Fault("store_vectors", "left * strength", "left", BUDGET),
    "beta of columns forgotten": Fault("store_vectors", "eight(strength", "eight(all + 1", BUDGET),
    "scale of P forgotten": Fault("store_vectors", "up * scale, all", "up, all", OUTPUT),
    "scale of P forgotten, fp16": Fault("store_vectors", "of_q = scale + all", "of_q = all + 1", OUTPUT, dtype=FP16),
    "scale of P twice, fp16": Fault("store_vectors", "if not OF_Q_APART", "if True", OUTPUT, dtype=FP16),
    "diagonal of P forgotten": Fault("upper", ">= row", "> row", OUTPUT),
    "P not triangular": Fault("without_state", "gl.where(upper(0, 64, nothing), ", "gl.where(True, ", OUTPUT),
    "rows of P forgotten": Fault("decayed", f"{ROWS_OF_P} * ", "", OUTPUT),
    "columns of P forgotten": Fault("decayed", f" * {COLUMNS_OF_P}", "", OUTPUT),
    "rows and columns of P swapped": Fault(
        "decayed",
        f"{ROWS_OF_P} * {COLUMNS_OF_P}",
        "columns_of(vectors, ROWS_OF_P, FIRST, COUNT) * rows_of(vectors, COLUMNS_OF_P, COUNT)",
        OUTPUT,
    ),
    "columns of the first half of P for the second": Fault(
        "decayed", "COLUMNS_OF_P, FIRST", "COLUMNS_OF_P, 0", OUTPUT, groups=APART
    ),
    "columns of N forgotten": Fault("without_state", " * columns_of(vectors, OF_K)", "", BUDGET),
    "rows of X forgotten": Fault("without_state", ROWS_OF_X, "X", BUDGET),
    "rows of half of X forgotten": Fault("without_state", ROWS_OF_X, f"({ROWS_OF_X} if half else X)", BUDGET),
}
STRONG = {
    "strong decay not seen": Fault("store_vectors", "< -200.0", "< -1e9", BUDGET),
    "strong decay not told of": Fault("store_vectors", "gl.where(strong, 1.0, 0.0) + all", "all", BUDGET),
    "strong decay seen where there is none": Fault("decayed", "axis=0) > 0", "axis=0) >= 0", OUTPUT),
    "columns of P decay twice": Fault("store_vectors", "up = gl.where(strong, 1.0, ", "up = (", BUDGET),
    "rows of P decay twice": Fault("store_vectors", "down = gl.where(strong, strength, ", "down = (", BUDGET),
    "X decays as where it is not strong": Fault("store_vectors", "left * strength", "down", BUDGET),
    "rows of X forgotten where strong": Fault("without_state", ROWS_OF_X, "X", BUDGET),
    "beta of P forgotten where strong": Fault("store_vectors", "strong, strength", "strong, 1.0", OUTPUT),
    "beta of X forgotten where strong": Fault("store_vectors", "left * strength", "left", BUDGET),
    "no decays": Fault("decayed", "PT = PT * decays", "decays = PT * decays", OUTPUT),
    "decays of other rows and columns forgotten": Fault("decayed", "PT = PT * decays", "PT = decays", OUTPUT),
    "decays not triangular": Fault("decayed", "gl.where(upper(FIRST, COUNT, nothing)", "gl.where(True", OUTPUT),
    "decays of the diagonal forgotten": Fault("upper", ">= row", "> row", OUTPUT),
    "decays of the first half for the second": Fault("decayed", "HIGH, FIRST", "HIGH, 0", OUTPUT, groups=APART),
    "decays of other columns kept": Fault("decayed", "upper(FIRST", "upper(32 - FIRST", OUTPUT, groups=APART),
    "decays the other way": Fault("decayed", SPREAD, f"{SPREAD} * -1 - 2 * -rows_of(vectors, HIGH, COUNT)", OUTPUT),
    "rest of decays of rows forgotten": Fault("decayed", " * rows_of(vectors, SHRUNK, COUNT)", "", OUTPUT),
    "rest of decays of columns forgotten": Fault("decayed", " * columns_of(vectors, GROWN, FIRST, COUNT)", "", OUTPUT),
    "rest of what is left forgotten": Fault("store_vectors", "* rest * shrunk", "* shrunk", BUDGET),
    "rest of what is left of rows forgotten": Fault("store_vectors", "* rest * shrunk", "* rest", BUDGET),
    "what is left, of the whole chunk": Fault("store_vectors", LEFT, LEFT.replace(" - high", ""), BUDGET),
}
NORMS = {
    "norm of half of a row": Fault("row_norms", "x * x + y * y", "x * x", BUDGET),
    "norm of q in P forgotten": Fault("normalise", "multiply(line_of(vectors, OF_Q), q_norm)", "pass", OUTPUT),
    "norm of q in Q S forgotten": Fault("normalise", "multiply(line_of(vectors, FROM_Q), q_norm)", "pass", OUTPUT),
    "norm of k in columns of N forgotten": Fault(
        "normalise", "multiply(line_of(vectors, OF_K), k_norm)", "pass", BUDGET
    ),
    "norm of k in K S forgotten": Fault("normalise", "multiply(line_of(vectors, FROM_K), k_norm)", "pass", BUDGET),
    "norm of k in rows forgotten": Fault("without_state", "N = N * rows_of(vectors, NORM_K)", "pass", BUDGET),
    "norm of k in X forgotten": Fault("without_state", "T = T * columns_of(vectors, NORM_K)", "pass", BUDGET),
    "norm of k in P forgotten, fp16": Fault(
        "without_state", "KQ = KQ * rows_of(vectors, NORM_K)", "pass", OUTPUT, dtype=FP16
    ),
    "norm of k in P twice, fp16": Fault("without_state", "NORM and not FINE", "NORM", OUTPUT, dtype=FP16),
    "norm of k in X forgotten, fp16": Fault(
        "without_state", "parts(T * columns_of(vectors, NORM_K), dtype)", "parts(T, dtype)", BUDGET, dtype=FP16
    ),
    "norm of q not multiplied": Fault("without_state", "KQ = KQ * columns_of(vectors, OF_Q)", "pass", OUTPUT),
    "the norm of q left where that of k is": Fault(
        "normalise",
        "k_norm = row_norms(sK, line_of(vectors, NORM_K))",
        "k_norm = row_norms(sK, line_of(vectors, OF_Q))",
        BUDGET,
    ),
    "norms of q and k swapped": Fault("normalise", "row_norms(sQ", "row_norms(sK", OUTPUT),
    "make forgets norms": Fault("make", "if NORM:", "if False:", BUDGET),
    "prepare forgets norms": Fault("prepare", "if NORM:", "if False:", BUDGET),
}
PLACES = {
    "the tail by the copy engine": Fault("prepare", "if length == 64", "if True", BUDGET),
    "keys behind the tail": Fault("prepare", "k_row, length", "k_row, 64", f"memory|{BUDGET}"),
    "a key of the tail lost": Fault("prepare", "k_row, length", "k_row, length - 1", BUDGET),
    "queries of the tail lost": Fault("prepare", "q_row, length", "q_row, 1", OUTPUT),
    "k of another chunk": Fault("prepare", "copy_tile(k, [narrow(first)", "copy_tile(k, [narrow(0)", BUDGET),
    "q of another chunk": Fault("prepare", "copy_tile(q, [narrow(first)", "copy_tile(q, [narrow(0)", OUTPUT),
    "k of another head": Fault("prepare", "narrow(head // RK * k_head)", "0", BUDGET, gates="heads"),
    "q of another head": Fault("prepare", "narrow(head // RQ * q_head)", "0", OUTPUT, gates="heads"),
    "k of a head of the state": Fault("prepare", "narrow(head // RK", "narrow(head", BUDGET, gates="heads"),
    "q of a head of the state": Fault("prepare", "narrow(head // RQ", "narrow(head", OUTPUT, gates="heads"),
    "k of another head in the tail": Fault("prepare", "+ head // RK * k_head)", ")", BUDGET, gates="heads"),
    "q of another head in the tail": Fault("prepare", "+ head // RQ * q_head)", ")", OUTPUT, gates="heads"),
    "k of another chunk in the tail": Fault("prepare", "k_rows + (first *", "k_rows + (0 *", BUDGET),
    "q of another chunk in the tail": Fault("prepare", "q_rows + (first *", "q_rows + (0 *", OUTPUT),
    "X a chunk late": Fault("prepare", "x, [narrow(chunk * 64)", "x, [narrow(chunk * 64 + 64)", BUDGET),
    "P a chunk late": Fault("prepare", "p, [narrow(chunk * 64)", "p, [narrow(chunk * 64 + 64)", OUTPUT),
    "X half a tile to the right": Fault("prepare", "0], sK", "64], sK", BUDGET),
    "P half a tile to the right": Fault("prepare", "0], sP", "32], sP", OUTPUT),
    "q in the place of X": Fault("prepare", "0], sK)\n    store", "0], sQ)\n    store", BUDGET),
    "chunks of heads on each other": Fault("prepare", "gl.num_programs(1) + head", "1 + head", BUDGET, gates="heads"),
    "X into the place of q": Fault("prepare", "sP, sK, own", "sP, sQ, own", BUDGET),
}
INVERSE = {
    "halves of X swapped": Fault("without_state", "sX.slice(half", "sX.slice(64 - half", MOVED),
    "halves of k swapped": Fault("without_state", "sK.slice(half", "sK.slice(64 - half", MOVED),
    "halves of P swapped": Fault("without_state", "tile.store", SWAPPED, MOVED, groups=APART),
    "T in one part": Fault("without_state", TAKE_X, f"low = low * 0; {TAKE_X}", BUDGET, gates="none"),
    "T in one part, fp16": Fault("without_state", TAKE_X, f"low = low * 0; {TAKE_X}", BUDGET, gates="none", dtype=FP16),
    "T in one part for P": Fault("without_state", TAKE_P, TAKE_P.replace("low", "low * 0"), OUTPUT, gates="none"),
    "the inverse in one part, fp16": Fault(
        "without_state", INVERTED, "inverse(N, nothing, False)", BUDGET, gates="none", dtype=FP16
    ),
    "a rest of the inverse forgotten, fp16": Fault(
        "product", "z = warpgroup_mma(rest, sX, z, is_async=True)", "pass", BUDGET, gates="none", dtype=FP16
    ),
    "another rest of the inverse forgotten, fp16": Fault(
        "product", "z = warpgroup_mma(a, sY, z, is_async=True)", "pass", BUDGET, gates="none", dtype=FP16
    ),
    "diagonal blocks not inverted": Fault("substitute", "static_range(16)", "static_range(15)", BUDGET),
    "substitution leaves a column out": Fault("substitute", "column < j,", "column < j - 1,", BUDGET),
    "diagonal blocks transposed": Fault("substitute", "(0, 2, 1)", "(0, 1, 2)", BUDGET),
    "blocks of 16 not joined": Fault("inverse", "(i < j)", "(i > j)", BUDGET),
    "blocks of 32 not joined": Fault("inverse", "i // 2 < j // 2", "i // 2 > j // 2", BUDGET),
    "blocks of 16 on the diagonal joined": Fault("inverse", "(i < j)", "(i <= j)", BUDGET),
    "blocks of 32 on the diagonal joined": Fault("inverse", "i // 2 < j // 2", "i // 2 <= j // 2", BUDGET),
    "blocks joined with the wrong sign": Fault("inverse", JOINED, JOINED.replace("-", "+", 1), BUDGET),
    "lower blocks lost": Fault("inverse", "x - x * below", "x", BUDGET),
    "a join forgets its left factor": Fault(
        "inverse", "product(diagonal, product(near, x, 16, FINE), 16, FINE)", "product(near, x, 16, FINE)", BUDGET
    ),
    "a join forgets its right factor": Fault("inverse", "product(far, x, 32", "product(far, x * 0 + 1, 32", BUDGET),
}
FAULTS = {
    **CHAIN,
    **GATES,
    **{name: fault._replace(gates="strong") for name, fault in STRONG.items()},
    **{name: fault._replace(gates="norm") for name, fault in NORMS.items()},
    **{f"{name}, strong": fault._replace(gates="strong norm") for name, fault in NORMS.items()},
    **PLACES,
    **INVERSE,
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_formulas_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(monkeypatch, FAULTS[name])


POISONED = "gl.where(gl.arange(0, 64)[:, None] < gl.arange(0, 64)[None, :], N, float('nan'))"


@pytest.mark.parametrize("plan", [Plan(1), Plan(2, make=True)])
@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        ("inverse", "", ""),
        ("inverse", "(i < j)", "(i != j)"),
        ("inverse", "i // 2 < j // 2", "i // 2 != j // 2"),
        ("substitute", "column < j,", "column <= j,"),
    ],
)
def test_the_inverse_does_not_look_below_the_diagonal(
    function: str, right: str, wrong: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What multiplies by zero there is right too, but for NaN."""
    edits = {"without_state": [("inverse(N,", f"inverse({POISONED},")], function: [(right, wrong)]}
    with pytest.raises(AssertionError, match=BUDGET) if wrong else nullcontext():
        judged(monkeypatch, "weak", torch.bfloat16, edits, 0, plan)
