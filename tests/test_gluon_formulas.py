"""Would the tests of Hopper's prefill notice a wrong formula? Each is judged as test_gluon_faults has it."""

from __future__ import annotations

import pytest

from test_gluon_faults import (
    APART,
    BOTH,
    BUDGET,
    CLEAR,
    FP16,
    MADE,
    OUTPUT,
    PUT_N,
    PUT_P,
    STORE,
    UNFENCED,
    Fault,
    assert_noticed,
)

KQ, OF_K = "gl.where(upper(0, 64, nothing), pairs(sQ, sK), 0.0)", "-columns_of(vectors, OF_K)"
ADVANCED = "own = gates_of(g + g_row * wide(64), beta + beta_row * wide(64), left - 64, g_row, beta_row, LOG)"
AHEAD = "left - 64, g_row"
ROWS_OF_P, COLUMNS_OF_P = "rows_of(vectors, ROWS_OF_P, COUNT)", "columns_of(vectors, COLUMNS_OF_P, FIRST, COUNT)"
ROWS_OF_X, SPREAD = "X * rows_of(vectors, ROWS_OF_X)", "gl.exp2(columns_of(vectors, HIGH, FIRST, COUNT)"
SWAPPED = "sP.slice(32 - first, WIDTH, dim=0).permute((1, 0)).store"
LEFT = "gl.exp2(whole - high) * rest * shrunk"
TAKE_P, TAKE_X = "deps=(product2(high, low, tile)", "x = product2(high, low"
MOVED = f"{UNFENCED}|{BUDGET}"
"""Where X, or half of P, comes to lie on what a product still has to read."""
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
    "P not transposed before its product": Fault("put_queries", "sP.permute((1, 0)).store", "sP.store", OUTPUT),
    "outputs of the state after the chunk": Fault(
        "keep", "outputs_of(state", "outputs_of(warpgroup_mma_wait(0, deps=(s,)).to(dtype)", OUTPUT
    ),
    "wrong half of v": Fault("keep", "GROUPS * buffer + GROUP", "GROUPS * buffer", BUDGET, groups=BOTH),
    "wrong half of v is loaded": Fault("copy_values", "column + 64 * group", "column", BUDGET, groups=BOTH),
    "wrong half of v for a program": Fault("sources_of", "v_head + values", "v_head", BUDGET, groups=(1,)),
    "wrong half of the state": Fault("keep_all", "values * wide(s_line)", "0", BUDGET),
    "wrong half of the output": Fault("keep_all", "values += GROUP * 64", "pass", BUDGET, groups=BOTH),
    "values behind the sequence": Fault("keep", "if length - t * 64 < 64", "if False", BUDGET),
    "a value behind the sequence": Fault("keep", "< length - t * 64, Y", "<= length - t * 64, Y", BUDGET),
    "values lost in the last chunk": Fault("keep", "< length - t * 64, Y", "< length - t * 64 - 1, Y", BUDGET),
    "outputs a chunk early": Fault("keep", "sO, t - 1", "sO, t", OUTPUT),
    "outputs before the sequence": Fault("store_outputs", "(row >= 0) & ", "", "memory"),
    "outputs behind the sequence": Fault("store_outputs", " & (row < length)", "", "memory|behind"),
    "values in what a state becomes": Fault("keep_summary", "unit == 0", "True", BUDGET, part=128),
    "no unit matrix": Fault("keep_summary", "unit, 1.0", "unit, 0.0", BUDGET, gates="none", part=128),
    "wrong half of the unit matrix": Fault("keep_summary", "GROUP * 64 + ", "", BUDGET, gates="none", part=128),
    "parts start a part early": Fault("tokens_of", "begin + before", "begin", BUDGET, part=128),
    "the first part writes the last state": Fault("keep_all", "before + part < length", "before > 0", BUDGET, part=128),
}
GATES = {
    "gates behind the sequence": Fault("gates_of", "mask=row < length", "mask=row >= 0", f"memory|{BUDGET}"),
    "gates of the first chunk": Fault("pair", "g += g_row * wide(64)", "pass", BUDGET),
    "beta of the first chunk": Fault("pair", "beta += beta_row * wide(64)", "pass", BUDGET),
    "gates a chunk early": Fault("pair", STORE, f"{ADVANCED}; {STORE}", BUDGET),
    "gates of the next sequence": Fault("pair", AHEAD, "64, g_row", f"memory|{BUDGET}"),
    "gates behind the next chunk": Fault("pair", AHEAD, "left, g_row", f"memory|{BUDGET}"),
    "gates of the tail lost": Fault("pair", AHEAD, "left - 65, g_row", BUDGET),
    "gates of a short sequence": Fault("pair", "beta, length, g_row", "beta, length - 329, g_row", BUDGET),
    "keys of the next sequence": Fault("pair", "if left < 64", "if False", BUDGET),
    "a key of the next sequence": Fault("pair", CLEAR, CLEAR.replace("left", "left + 1"), BUDGET),
    "a key lost": Fault("pair", CLEAR, CLEAR.replace("left", "left - 1"), BUDGET),
    "queries cleared for keys": Fault("pair", CLEAR, CLEAR.replace("k,", "q,"), BUDGET),
    "a row too few cleared": Fault("clear_rows", "row < left", "row <= left", BUDGET, groups=BOTH),
    "half of the columns cleared": Fault("clear_rows", "(0, 128, 64)", "(0, 64, 64)", BUDGET, groups=BOTH),
    "the other half of the columns cleared": Fault("clear_rows", "(0, 128, 64)", "(64, 128, 64)", BUDGET, groups=BOTH),
    "the rows before the end cleared": Fault(
        "clear_rows",
        "row < left, columns.load(layout), 0.0",
        "row < left, 0.0, columns.load(layout)",
        BUDGET,
        groups=BOTH,
    ),
    "k of the first chunk": Fault("copy_pair", "[row, k_column]", "[first, k_column]", BUDGET),
    "q of the first chunk": Fault("copy_pair", "[row, q_column]", "[first, q_column]", OUTPUT),
    "k of the first head": Fault("copy_pair", "[row, k_column]", "[row, 0]", BUDGET, gates="heads"),
    "q of the first head": Fault("copy_pair", "[row, q_column]", "[row, 0]", OUTPUT, gates="heads"),
    "q in the place of k": Fault("copy_pair", "copy_tile(k, ", "copy_tile(q, ", BUDGET),
    "k in the place of q": Fault("copy_pair", "copy_tile(q, ", "copy_tile(k, ", OUTPUT),
    "N of the wrong stage of k": Fault("pair", PUT_N, PUT_N.replace("(k,", "(sK.index((stage + 1) % STAGES),"), BUDGET),
    "P of k": Fault("pair", PUT_P, PUT_P.replace("(q,", "(k,"), OUTPUT),
    "logarithms to the base e": Fault("log2_of", "x * 1.4426950408889634", "x", BUDGET),
    "alpha 0 without a bound": Fault("log2_of", "return gl.maximum(x, -160.0)", "return x", BUDGET, gates="strong"),
    "decay of K S with the wrong sign": Fault("store_vectors", "one_of(-start", "one_of(start", BUDGET),
    "scale of Q S forgotten": Fault("store_vectors", "start * scale", "start", OUTPUT),
    "rest of the decay forgotten": Fault(
        "store_vectors", "decay = gl.exp2(whole) * rest", "decay = gl.exp2(whole)", BUDGET
    ),
    "rest of the decay of X forgotten": Fault("store_vectors", "* rest * shrunk", "* shrunk", BUDGET),
    "rest of the decay of rows of X forgotten": Fault("store_vectors", "* rest * shrunk", "* rest", BUDGET),
    "decay of X, of the whole chunk": Fault("store_vectors", LEFT, LEFT.replace(" - high", ""), BUDGET),
    "rest of rows of P forgotten": Fault(
        "store_vectors", "exp2(middle - high) * shrunk", "exp2(middle - high)", OUTPUT
    ),
    "rest of columns of P forgotten": Fault(
        "store_vectors", "exp2(high - middle) * grown", "exp2(high - middle)", OUTPUT
    ),
    "decay of rows of P forgotten": Fault("store_vectors", "gl.exp2(middle - high) * shrunk", "1.0", OUTPUT),
    "decay of columns of P forgotten": Fault("store_vectors", "gl.exp2(high - middle) * grown", "all + 1", OUTPUT),
    "decay of X forgotten": Fault("store_vectors", f"left, flag = {LEFT}", "left, flag = all + 1", BUDGET),
    "beta of P forgotten": Fault("store_vectors", "shrunk * strength)", "shrunk)", OUTPUT),
    "beta of X forgotten": Fault("store_vectors", "left * strength", "left", BUDGET),
    "beta of columns forgotten": Fault("store_vectors", "one_of(strength", "one_of(all + 1", BUDGET),
    "scale of P forgotten": Fault("store_vectors", "up * scale, all", "up, all", OUTPUT),
    "scale of P forgotten, fp16": Fault("store_vectors", "= scale + all, up", "= all + 1, up", OUTPUT, dtype=FP16),
    "scale of P twice, fp16": Fault("store_vectors", "all, up", "all, up * scale", OUTPUT, dtype=FP16),
    "decay of columns of P forgotten, fp16": Fault("store_vectors", "all, up", "all, all + 1", OUTPUT, dtype=FP16),
    "decay of columns of P before its product": Fault(
        "store_vectors", "all, up", "all * 0 + up * scale, all + 1", OUTPUT, dtype=FP16
    ),
    "columns of P as in fp16": Fault("store_vectors", "if FINE", "if True", OUTPUT),
    "columns of P as in bf16": Fault("store_vectors", "if FINE", "if False", OUTPUT, dtype=FP16),
    "diagonal of P forgotten": Fault("upper", ">= row", "> row", OUTPUT),
    "P not triangular": Fault("put_queries", KQ, KQ.replace("upper(0, 64, nothing)", "True"), OUTPUT),
    "columns of P before its product forgotten": Fault(
        "put_queries", "KQ = KQ * columns_of(vectors, OF_Q)", "pass", OUTPUT
    ),
    "rows of P before its product": Fault("put_queries", "columns_of(vectors, OF_Q)", "rows_of(vectors, OF_Q)", OUTPUT),
    "queries and keys swapped in P": Fault("put_queries", "pairs(sQ, sK)", "pairs(sK, sQ)", OUTPUT),
    "rows of P forgotten": Fault("decayed", f"PT = PT * {ROWS_OF_P}", "pass", OUTPUT),
    "rows of P for columns": Fault("decayed", ROWS_OF_P, "columns_of(vectors, ROWS_OF_P, FIRST, COUNT)", OUTPUT),
    "columns of P forgotten, fp16": Fault("decayed", f"PT = PT * {COLUMNS_OF_P}", "pass", OUTPUT, dtype=FP16),
    "columns of P for rows, fp16": Fault(
        "decayed", COLUMNS_OF_P, "rows_of(vectors, COLUMNS_OF_P, COUNT)", OUTPUT, dtype=FP16
    ),
    "columns of P twice": Fault("decayed", "if FINE", "if True", OUTPUT),
    "columns of the first half of P for the second, fp16": Fault(
        "decayed", "COLUMNS_OF_P, FIRST", "COLUMNS_OF_P, 0", OUTPUT, groups=APART, dtype=FP16
    ),
    "N with the wrong sign": Fault("put_keys", OF_K, OF_K[1:], BUDGET),
    "rows of N for columns": Fault("put_keys", OF_K, "-rows_of(vectors, OF_K)", BUDGET),
    "columns of N forgotten": Fault("put_keys", OF_K, "-1.0", BUDGET),
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
    "norm of k in rows forgotten": Fault("put_keys", "N = N * rows_of(vectors, NORM_K)", "pass", BUDGET),
    "norm of k in X forgotten": Fault("without_state", "T = T * columns_of(vectors, NORM_K)", "pass", BUDGET),
    "norm of k in P twice": Fault("put_queries", "NORM and FINE", "NORM", OUTPUT),
    "norm of k in P forgotten, fp16": Fault(
        "put_queries", "KQ = KQ * rows_of(vectors, NORM_K)", "pass", OUTPUT, dtype=FP16
    ),
    "norm of k in P twice, fp16": Fault("without_state", "NORM and not FINE", "NORM", OUTPUT, dtype=FP16),
    "norm of k in X forgotten, fp16": Fault(
        "without_state", "parts(T * columns_of(vectors, NORM_K), dtype)", "parts(T, dtype)", BUDGET, dtype=FP16
    ),
    "norm of q not multiplied": Fault("put_queries", "KQ = KQ * columns_of(vectors, OF_Q)", "pass", OUTPUT),
    "the norm of q left where that of k is": Fault(
        "normalise",
        "k_norm = row_norms(sK, line_of(vectors, NORM_K))",
        "k_norm = row_norms(sK, line_of(vectors, OF_Q))",
        BUDGET,
    ),
    "norms of q and k swapped": Fault("normalise", "row_norms(sQ", "row_norms(sK", OUTPUT),
    "load forgets norms": Fault("pair", "if NORM:", "if False:", BUDGET),
    "prepare forgets norms": Fault("prepare", "if NORM:", "if False:", BUDGET),
}
PLACES = {
    "the tail not cleared": Fault("prepare", "if length < 64", "if False", BUDGET),
    "a key behind the tail": Fault("prepare", "clear_rows(sK, length)", "clear_rows(sK, length + 1)", BUDGET),
    "a key of the tail lost": Fault("prepare", "clear_rows(sK, length)", "clear_rows(sK, length - 1)", BUDGET),
    "the tail of q cleared": Fault("prepare", "clear_rows(sK, length)", "clear_rows(sQ, length)", BUDGET),
    "gates of another chunk": Fault("prepare", "g += first * g_row", "g += 0 * g_row", BUDGET),
    "beta of another chunk": Fault("prepare", "beta += first * beta_row", "beta += 0 * beta_row", BUDGET),
    "k of another chunk": Fault("prepare", "copy_tile(k, [narrow(first)", "copy_tile(k, [narrow(0)", BUDGET),
    "q of another chunk": Fault("prepare", "copy_tile(q, [narrow(first)", "copy_tile(q, [narrow(0)", OUTPUT),
    "k of another head": Fault("prepare", "narrow(head // RK * k_head)", "0", BUDGET, gates="heads"),
    "q of another head": Fault("prepare", "narrow(head // RQ * q_head)", "0", OUTPUT, gates="heads"),
    "k of a head of the state": Fault("prepare", "narrow(head // RK", "narrow(head", BUDGET, gates="heads"),
    "q of a head of the state": Fault("prepare", "narrow(head // RQ", "narrow(head", OUTPUT, gates="heads"),
    "X a chunk late": Fault("prepare", "x, [narrow(chunk * 64)", "x, [narrow(chunk * 64 + 64)", BUDGET),
    "P a chunk late": Fault("prepare", "p, [narrow(chunk * 64)", "p, [narrow(chunk * 64 + 64)", OUTPUT),
    "X half a tile to the right": Fault("prepare", "0], sK", "64], sK", BUDGET),
    "P half a tile to the right": Fault("prepare", "0], sP", "32], sP", OUTPUT),
    "q in the place of X": Fault("prepare", "0], sK)", "0], sQ)", BUDGET),
    "chunks of heads on each other": Fault(
        "prepare", "place.to(gl.int64) * heads", "place.to(gl.int64)", BUDGET, gates="heads"
    ),
    "X into the place of q": Fault("prepare", "sP, sK, room", "sP, sQ, room", BUDGET),
}
PRODUCTS = {
    "halves of X swapped": Fault("without_state", "sX.slice(half", "sX.slice(64 - half", MOVED),
    "halves of k swapped": Fault("without_state", "sK.slice(half", "sK.slice(64 - half", MOVED),
    "halves of P swapped": Fault("without_state", "tile.store", SWAPPED, MOVED, groups=APART),
    "T in one part": Fault("without_state", TAKE_X, f"low = low * 0; {TAKE_X}", BUDGET, gates="none"),
    "T in one part, fp16": Fault("without_state", TAKE_X, f"low = low * 0; {TAKE_X}", BUDGET, gates="none", dtype=FP16),
    "T in one part for P": Fault("without_state", TAKE_P, TAKE_P.replace("low", "low * 0"), OUTPUT, gates="same 1.1"),
}
FAULTS = {
    **CHAIN,
    **GATES,
    **{name: fault._replace(gates="strong") for name, fault in STRONG.items()},
    **{name: fault._replace(gates="norm") for name, fault in NORMS.items()},
    **{f"{name}, strong": fault._replace(gates="strong norm") for name, fault in NORMS.items()},
    **PLACES,
    **PRODUCTS,
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_formulas_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(monkeypatch, FAULTS[name])
