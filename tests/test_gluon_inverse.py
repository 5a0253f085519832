"""Would the tests of Hopper's prefill notice a wrong inverse? Each is judged as test_gluon_faults has it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gated_delta.kernels.gluon.prefill import Plan
from test_gluon_faults import BUDGET, FP16, Fault, assert_noticed, judged

LEFT_OF_X = "beside(gl.zeros([64, 8], gl.float32, SLIM), y, SLIM)"
BETWEEN = "gl.where(is_upper(half), second, 0.0)"
LOWER = "y = left[:, :, 8:]"
ROUNDED = "(left.to(gl.float16), (left * 0).to(gl.float16))"
INVERSE = {
    "blocks of N on the diagonal lie elsewhere": Fault("put", "// 16 + nothing ==", "// 16 + 1 ==", BUDGET),
    "diagonal blocks of 8 swapped": Fault(
        "put", "is_upper(half), first, second", "is_upper(half), second, first", BUDGET
    ),
    "diagonal blocks transposed": Fault(
        "put", "[8, 8, 8]), (0, 2, 1)), FINE)", "[8, 8, 8]), (0, 1, 2)), FINE)", BUDGET
    ),
    "columns of blocks interleaved": Fault(
        "put", "gl.permute(gl.reshape(blocks, [64, 2, 8]), (0, 2, 1))", "gl.reshape(blocks, [64, 8, 2])", BUDGET
    ),
    "what is between blocks of 8 lost": Fault("put", BETWEEN, BETWEEN.replace("second", "first"), BUDGET),
    "columns of N not by blocks": Fault("put", "gl.permute(thin, (1, 0, 2))", "gl.reshape(thin, [4, 64, 16])", BUDGET),
    "upper and lower halves of blocks swapped": Fault("is_upper", "== 0", "== 1", BUDGET),
    "diagonal blocks not inverted": Fault("substitute", "static_range(8)", "static_range(7)", BUDGET),
    "substitution leaves a row out": Fault("substitute", "column < j,", "column < j - 1,", BUDGET),
    "substitution of the wrong row": Fault("substitute", "N[0].slice(j,", "N[0].slice(7 - j,", BUDGET),
    "substitution into the wrong column": Fault(
        "substitute", "gl.where(column == j", "gl.where(column == 7 - j", BUDGET
    ),
    "no unit in substitution": Fault("substitute", "row == j, 1.0", "row == j, 0.0", BUDGET),
    "substitution with the wrong sign": Fault("substitute", "line * x, -0.0", "-(line * x), -0.0", BUDGET),
    "a join forgets its left factor": Fault(
        "joined",
        "y = add_product(zero, halves(left, FINE), between, [4, 16, 8], 0, FINE)",
        "y = between[0].reshape([4, 16, 8]).load().to(gl.float32)",
        BUDGET,
    ),
    "a join forgets its right factor": Fault(
        "joined", "y = add_product(zero, halves(left, FINE), inverses, [4, 16, 8], 0, FINE)", LOWER, BUDGET
    ),
    "a join of what is not between": Fault(
        "joined", "halves(left, FINE), between", "halves(left, FINE), inverses", BUDGET
    ),
    "a join with what is between, twice": Fault(
        "joined", "halves(left, FINE), inverses", "halves(left, FINE), between", BUDGET
    ),
    "a join by the other block's inverse": Fault(
        "joined", "gl.reshape(beside(A, D, SLIM)", "gl.reshape(beside(D, A, SLIM)", BUDGET
    ),
    "a join by the upper block's inverse": Fault(
        "joined",
        LEFT_OF_X,
        LEFT_OF_X.replace("gl.zeros([64, 8], gl.float32, SLIM), y", "y, gl.zeros([64, 8], gl.float32, SLIM)"),
        BUDGET,
    ),
    "upper and lower inverses swapped": Fault(
        "joined",
        "gl.where(upper, x, 0.0), gl.where(upper, 0.0, x)",
        "gl.where(upper, 0.0, x), gl.where(upper, x, 0.0)",
        BUDGET,
    ),
    "a join of the lower half, too": Fault("put", BETWEEN, "second", BUDGET),
    "a join with the wrong sign": Fault("joined", "D + gl", "D - gl", BUDGET),
    "a join into the wrong half": Fault(
        "joined",
        "beside(A, D + gl.convert_layout(gl.reshape(y, [64, 8]), SLIM), SLIM)",
        "beside(A + gl.reshape(y, [64, 8]), D, SLIM)",
        BUDGET,
    ),
    "a join lost": Fault("joined", "D + gl.convert_layout(gl.reshape(y, [64, 8]), SLIM)", "D", BUDGET),
    "blocks of 16 in the wrong columns": Fault("inverse", "own == j, D", "own == 3 - j, D", BUDGET),
    "a column's last product lost": Fault("inverse", "static_range(j)", "static_range(j - 1)", BUDGET),
    "a column's first product lost": Fault("inverse", "static_range(j)", "static_range(min(j, 1), j)", BUDGET),
    "a column's sum lost": Fault("inverse", "add_product(sum, known", "add_product(sum * 0, known", BUDGET),
    "products of the first column alone": Fault("inverse", "known[k]", "known[0]", BUDGET),
    "products of columns in the wrong order": Fault("inverse", "known[k]", "known[j - 1 - k]", BUDGET),
    "rows and columns of blocks of N swapped": Fault("inverse", "64 * j + 16 * k", "64 * k + 16 * j", BUDGET),
    "N of the column before": Fault("inverse", "64 * j + 16 * k", "64 * (j - 1) + 16 * k", BUDGET),
    "N of the block below": Fault("inverse", "64 * j + 16 * k", "64 * j + 16 * (k + 1)", BUDGET),
    "the inverse of the block before": Fault(
        "inverse", "[64, 16], 16 * j, FINE", "[64, 16], 16 * (j - 1), FINE", BUDGET
    ),
    "a column's own inverse lost": Fault(
        "inverse", "add_product(T, halves(sum", "add_product(T * 0, halves(sum", BUDGET
    ),
    "a column's sum not multiplied": Fault(
        "inverse", "T = add_product(T, halves(sum, FINE), inverses, [64, 16], 16 * j, FINE)", "T = T + sum", BUDGET
    ),
    "columns of 16 swapped": Fault("inverse", "columns[0], columns[1]", "columns[1], columns[0]", BUDGET),
    "columns of 32 swapped": Fault("beside", "gl.join(left, right)", "gl.join(right, left)", BUDGET),
    "columns interleaved": Fault(
        "beside", "gl.permute(gl.join(left, right), [0, 2, 1])", "gl.join(left, right)", BUDGET
    ),
}
FINE = {
    "no rests": Fault("halves", "(x - high.to(gl.float32)).to(gl.float16)", "high * 0", BUDGET),
    "no rests of what is written": Fault("write", "room[1].store(low)", "room[1].store(low * 0)", BUDGET),
    "no rests of N": Fault("substitute", "line += N[1]", "line + N[1]", BUDGET),
    "no rests of blocks of 8": Fault("inverse.load", "x += room[1]", "x + room[1]", BUDGET),
    "no rests of left operands": Fault("add_product", "z = mma_v2(low, b, z)", "pass", BUDGET),
    "no rests of right operands": Fault("add_product", "z = mma_v2(high, y[1]", "mma_v2(high, y[1]", BUDGET),
    "a join of the wrong rests": Fault(
        "add_product", "y[1].reshape(SHAPE).slice(ROW", "y[1].reshape(SHAPE).slice(0", BUDGET
    ),
    "no rests of what was known": Fault(
        "inverse",
        "known = known + (halves(T, FINE),)",
        "known = known + ((halves(T, FINE)[0], halves(T * 0, FINE)[0]),)",
        BUDGET,
    ),
    "no rests of sums": Fault("inverse", "halves(sum, FINE)", "(sum.to(gl.float16), (sum * 0).to(gl.float16))", BUDGET),
    "no rests of the left factor of joins": Fault(
        "joined",
        "halves(left, FINE), between",
        f"{ROUNDED}, between",
        BUDGET,
        gates="same 1.1",
    ),
    "no rests of the right factor of joins": Fault(
        "joined", "halves(left, FINE), inverses", f"{ROUNDED}, inverses", BUDGET
    ),
    "rests of N where room is for the next": Fault(
        "room_for", "low = gl.allocate_shared_memory(gl.float16, [COUNT, ROWS, COLUMNS], LAYOUT)", "pass", BUDGET
    ),
}
FAULTS = INVERSE | {
    f"{name}, fp16": fault._replace(gates=fault.gates.replace("weak", "none"), dtype=FP16)
    for name, fault in FINE.items()
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_inverse_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(monkeypatch, FAULTS[name])


ROW, COLUMN = "gl.arange(0, 64)[:, None]", "gl.arange(0, 64)[None, :]"
POISONED = f"gl.where({ROW} < {COLUMN}, N, float('nan'))"


@pytest.mark.parametrize("plan", [Plan(1), Plan(2, make=True)])
@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        ("inverse", "", ""),
        ("substitute", "column < j,", "column <= j,"),
        ("put", BETWEEN, "second"),
    ],
)
def test_the_inverse_does_not_look_below_the_diagonal(
    function: str, right: str, wrong: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What multiplies by zero there is right too, but for NaN."""
    edits = {"put_keys": [("put(N,", f"put({POISONED},")], function: [(right, wrong)]}
    with pytest.raises(AssertionError, match=BUDGET) if wrong else nullcontext():
        judged(monkeypatch, "weak", torch.bfloat16, edits, 0, plan)


@pytest.mark.parametrize(("beta", "is_over"), [(0.5, False), (1.0, False), (1.5, True), (2.0, False)])
def test_one_key_for_all_tokens(beta: float, is_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without decay: a known limit (docs/numerics.md), which is not to become another one unnoticed."""
    with pytest.raises(AssertionError, match=r"state: .* over its") if is_over else nullcontext():
        judged(monkeypatch, f"same {beta}", torch.bfloat16, {}, 0, Plan(2, make=True))
