"""``gated_delta.interop.fla`` against the plain token loop, through flash-linear-attention's own arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.errors import ArgumentError, GradientError
from gated_delta.interop.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs
from helpers import normal, same_bits, starts

FUNCTIONS = (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
# Parameters of flash-linear-attention 0.6.0 in their order, with defaults where those are not None.
CHUNK = (
    "q k v g beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
    "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False cu_seqlens=None cu_seqlens_cpu=None "
    "chunk_indices=None cp_context=None"
)
CHUNK_KEYWORDS = "use_gate_in_kernel=False A_log=None dt_bias=None chunk_size=64 transpose_state_layout=None"
RECURRENT = (
    "q k v g=None gk=None gv=None beta=None scale=None initial_state=None output_final_state=False "
    "use_qk_l2norm_in_kernel=False use_gate_in_kernel=False A_log=None dt_bias=None use_beta_sigmoid_in_kernel=False "
    "allow_neg_eigval=False state_v_first=False cu_seqlens=None"
)


def written(function: Callable[..., Any], *, keywords: bool) -> str:
    """The parameters of a function, one kind of them, as above."""
    parameters = inspect.signature(function).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY if keywords else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return " ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is kind
    )  # fmt: skip


def test_signatures_are_theirs_with_every_keyword_named() -> None:
    assert written(chunk_gated_delta_rule, keywords=False) == CHUNK
    assert written(chunk_gated_delta_rule, keywords=True) == CHUNK_KEYWORDS
    assert written(fused_recurrent_gated_delta_rule, keywords=False) == RECURRENT
    assert written(fused_recurrent_gated_delta_rule, keywords=True) == "transpose_state_layout=None"


def batch(rows: int = 2, tokens: int = 70, *, dtype: torch.dtype = torch.float32, states: int | None = None) -> Inputs:
    """Their arguments, K = 32 and V = 64: gates as logarithms, a state for every sequence."""
    return {
        "q": normal(rows, tokens, 2, 32, seed=1).to(dtype),
        "k": normal(rows, tokens, 2, 32, seed=2).to(dtype),
        "v": normal(rows, tokens, 4, 64, seed=3).to(dtype),
        "g": -normal(rows, tokens, 4, seed=4).abs() / 8,
        "beta": torch.sigmoid(normal(rows, tokens, 4, seed=5)).to(dtype),
        "initial_state": normal(rows if states is None else states, 4, 32, 64, seed=6) / 6,
        "use_qk_l2norm_in_kernel": True,
    }


def raw(inputs: Inputs, *, doubled: bool = False, bias: bool = True) -> Inputs:
    """The same with gates for the kernel to make."""
    return {
        **inputs,
        "g": normal(*inputs["g"].shape, seed=7),
        "beta": normal(*inputs["beta"].shape, seed=8).to(inputs["q"].dtype),
        "A_log": torch.tensor([0.1, 1.0, 4.0, 16.0]).log(),
        "dt_bias": torch.tensor([-4.0, -2.0, 0.0, 1.0]) if bias else None,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": doubled,
    }


def evaluate(given: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and final states ``[N, HV, K, V]`` of the token loop in ``dtype``."""
    rows, tokens = given["q"].shape[:2]
    gates: dict[str, Any] = {"g": given.get("g"), "beta": given.get("beta"), "g_space": "log"}
    if given.get("use_gate_in_kernel"):
        bias = torch.zeros(4) if given["dt_bias"] is None else given["dt_bias"]
        gates |= {"g": reference.decay(given["A_log"], given["g"], bias, dtype=dtype), "g_space": "linear"}
    if given.get("use_beta_sigmoid_in_kernel"):
        doubled = given["allow_neg_eigval"]
        gates["beta"] = reference.write_strength(given["beta"], allow_neg_eigval=doubled, dtype=dtype)
    for name in ("g", "beta"):
        gates[name] = None if gates[name] is None else gates[name].flatten(0, 1)
    state = given.get("initial_state")
    cu_seqlens = given["cu_seqlens"] if given.get("cu_seqlens") is not None else starts([tokens] * rows)
    done = oracle.prefill(
        *(given[name].flatten(0, 1) for name in "qkv"), **gates, cu_seqlens=cu_seqlens, scale=given.get("scale"),
        initial_state=None if state is None else state.mT, dtype=dtype,
        use_qk_l2norm_in_kernel=given["use_qk_l2norm_in_kernel"],
    )  # fmt: skip
    return done.output.unflatten(0, (rows, tokens)), done.state.mT


def check(function: Callable[..., Any], given: Inputs, *, v_first: bool = False) -> None:
    """The function's output and final states are within the budget, and what it was given is as it was."""
    state = given.get("initial_state")
    passed = {**given, "initial_state": state.mT.contiguous() if v_first and state is not None else state}
    before = {name: x.clone() for name, x in passed.items() if isinstance(x, Tensor)}
    output, final = function(**passed, output_final_state=True, state_v_first=v_first)
    plain, exact = evaluate(given, torch.float32), evaluate(given, torch.float64)
    assert final.dtype == torch.float32
    assert_within_budget("output", output, plain[0], exact[0])
    assert_within_budget("state", final.mT if v_first else final, plain[1], exact[1])
    assert all(same_bits(passed[name], x) for name, x in before.items())
    alone = function(**passed, state_v_first=v_first)
    assert alone[1] is None
    assert same_bits(alone[0], output)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_batches(function: Callable[..., Any], v_first: bool, dtype: torch.dtype, tokens: int) -> None:
    check(function, batch(tokens=tokens, dtype=dtype), v_first=v_first)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "change",
    [
        {"initial_state": None},
        {"scale": 0.3},
        {"use_qk_l2norm_in_kernel": False, "scale": 0.02},
        {"initial_state": (normal(2, 4, 32, 64, seed=6) / 6).to(torch.bfloat16)},
        {"g": torch.zeros(2, 70, 4)},
        {"beta": torch.full((2, 70, 4), 1.5)},
    ],
)
def test_options(function: Callable[..., Any], change: Inputs) -> None:
    given = {**batch(), **change}
    if not given["use_qk_l2norm_in_kernel"]:
        given |= {name: reference.l2norm(given[name]) for name in "qk"}
    check(function, given)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gates", ["ready", "raw"])
def test_packed_sequences(function: Callable[..., Any], gates: str) -> None:
    given = {**batch(1, states=4), "cu_seqlens": starts([33, 0, 36, 1])}
    check(function, raw(given) if gates == "raw" else given)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gates_made_in_the_kernel(function: Callable[..., Any], v_first: bool, doubled: bool, tokens: int) -> None:
    check(function, raw(batch(3, tokens), doubled=doubled), v_first=v_first)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gates_made_in_the_kernel_without_a_bias_a_state_or_one_of_them(function: Callable[..., Any]) -> None:
    check(function, {**raw(batch(), bias=False), "initial_state": None, "scale": 0.3})
    check(function, {**raw(batch()), "use_gate_in_kernel": False, "g": batch()["g"]})
    check(function, {**raw(batch()), "use_beta_sigmoid_in_kernel": False, "beta": batch()["beta"]})


def test_the_recurrent_function_does_without_gates() -> None:
    check(fused_recurrent_gated_delta_rule, {**batch(), "g": None, "beta": None})


def test_raw_gates_of_equal_sequences_go_to_the_recurrent_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gated_delta.chunk_gated_delta_rule", None)
    check(fused_recurrent_gated_delta_rule, raw(batch(tokens=3)))
    with pytest.raises(TypeError, match="not callable"):
        chunk_gated_delta_rule(**raw(batch(tokens=3)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gates", ["ready", "raw"])
def test_any_strides(function: Callable[..., Any], gates: str) -> None:
    """Heads before tokens, channels before tokens, a slice of a fused buffer, gates with channels in front."""
    given = raw(batch(tokens=6)) if gates == "raw" else batch(tokens=6)
    moved = {
        **given,
        "q": given["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": given["k"].flatten(2).mT.contiguous().mT.unflatten(2, (2, 32)),
        "v": torch.cat((given["v"], given["v"]), -1)[..., :64],
        "g": given["g"].mT.contiguous().mT,
        "beta": given["beta"].mT.contiguous().mT,
        "initial_state": given["initial_state"].mT.contiguous().mT,
    }
    assert not any(moved[name].is_contiguous() for name in ("q", "k", "v", "g", "beta", "initial_state"))
    check(function, moved)


def test_decode_goes_on_from_prefill() -> None:
    """The state that one function returns, the other takes, in either gate dialect."""
    whole = raw(batch(tokens=40))
    per_token = ("q", "k", "v", "g", "beta")
    state, outputs = whole["initial_state"], []
    for function, own in (
        (chunk_gated_delta_rule, slice(0, 38)),
        *((fused_recurrent_gated_delta_rule, slice(i, i + 1)) for i in (38, 39)),
    ):
        part = {**whole, **{name: whole[name][:, own] for name in per_token}, "initial_state": state}
        output, state = function(**part, output_final_state=True)
        outputs.append(output)
    assert state is not None
    plain, exact = evaluate(whole, torch.float32), evaluate(whole, torch.float64)
    assert_within_budget("output", torch.cat(outputs, 1), plain[0], exact[0])
    assert_within_budget("state", state, plain[1], exact[1])


COMMON_REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("transpose_state_layout", {"transpose_state_layout": True}),
    ("allow_neg_eigval", {"allow_neg_eigval": True}),
    ("A_log", {"use_gate_in_kernel": True}),
    ("q", {"cu_seqlens": starts([70, 70])}),
    ("q", {"q": normal(2, 70, 64)}),
    ("k", {"k": normal(2, 70, 3, 32)}),
    ("beta", {"beta": normal(2, 70, 2)}),
    ("initial_state", {"state_v_first": True}),
    ("initial_state", {"initial_state": normal(1, 4, 32, 64)}),
]


@pytest.mark.parametrize(
    ("function", "argument", "change"),
    [
        *((function, *refusal) for function in FUNCTIONS for refusal in COMMON_REFUSALS),
        (chunk_gated_delta_rule, "cp_context", {"cp_context": object()}),
        (fused_recurrent_gated_delta_rule, "gk", {"gk": normal(2, 70, 4, 32)}),
        (fused_recurrent_gated_delta_rule, "gv", {"gv": normal(2, 70, 4, 64)}),
        (fused_recurrent_gated_delta_rule, "g", {"use_gate_in_kernel": True, "g": None, "A_log": torch.zeros(4)}),
    ],
)
def test_what_is_not_served_is_named(function: Callable[..., Any], argument: str, change: Inputs) -> None:
    with pytest.raises(ArgumentError, match=rf"^fla\.{function.__name__}: {argument} is ") as caught:
        function(**{**batch(), **change})
    assert caught.value.argument == argument


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_is_refused_not_dropped(function: Callable[..., Any]) -> None:
    given = batch()
    given["v"].requires_grad_()
    with pytest.raises(GradientError, match="v is a tensor that requires grad"):
        function(**given)
    with torch.no_grad():
        function(**given)


def test_the_page_runs() -> None:
    """The example of docs/integrate/fla.md; its decode goes on from its prefill."""
    page = (Path(__file__).parents[1] / "docs" / "integrate" / "fla.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["output"].shape == (2, 1, 8, 64)
    assert names["state"].shape == (2, 8, 64, 64)
