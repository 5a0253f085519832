"""The operators as torch sees them: ``opcheck``, ``torch.compile``, dynamic shapes, gradients of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import library, reference
from gated_delta.prefill import gates
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, prefill_inputs, recurrent_inputs, with_state
from helpers import nans, normal, starts

Call = tuple[Callable[..., Any], Inputs]


def _prefill(**options: Any) -> Call:
    inputs = with_state(prefill_inputs([5, 0, 70], hq=1, hk=1, hv=2, head_k=32, head_v=64))
    return gd.chunk_gated_delta_rule, {**inputs, **options}


def _prefill_pool(**options: Any) -> Call:
    operator, inputs = _prefill()
    where = {"initial_state": normal(6, 2, 64, 32), "state_indices": torch.tensor([4, -1, 0]), "null_slot": 1}
    return operator, {**inputs, **where, "output_final_state": True, **options}


def _recurrent(operator: Callable[..., Any], count: int = 1, **options: Any) -> Call:
    return operator, {**recurrent_inputs(3, count, h=1, hv=2, head_k=32, head_v=64), **options}


def _pool(operator: Callable[..., Any], count: int = 3, **options: Any) -> Call:
    _, inputs = _recurrent(operator, count)
    del inputs["state"]
    where = {"initial_state": normal(9, 2, 64, 32), "initial_state_indices": torch.tensor([4, -1, 0])}
    return operator, {**inputs, **where, **options}


def _pretransposed_pool(**options: Any) -> Call:
    return _pool(gd.gated_delta_rule_decode_pretranspose, state=None, **options)


def _mtp(**options: Any) -> Call:
    return _pool(gd.gated_delta_rule_mtp, **{"disable_state_update": False, **options})


def _conv(**options: Any) -> Call:
    given = {"x": normal(9, 8), "weight": normal(8, 4, seed=1), "conv_states": normal(3, 8, 5, seed=2)}
    given |= {"cu_seqlens": starts([2, 0, 7]), "state_indices": None, "has_initial_state": None}
    return gd.causal_conv1d, {**given, **options}


def _conv_pool(**options: Any) -> Call:
    where = {"conv_states": normal(6, 5, 8, seed=2).transpose(1, 2), "state_indices": torch.tensor([4, -1, 0])}
    has = torch.tensor([True, True, False])
    return _conv(**where, bias=normal(8, seed=3), has_initial_state=has, null_slot=1, activation=None, **options)


def _update(**options: Any) -> Call:
    given = {"x": normal(3, 2, 8), "conv_states": normal(3, 8, 5), "weight": normal(8, 4), "state_indices": None}
    return gd.causal_conv1d_update, {**given, **options}


def _ragged_update() -> Call:
    accepted = {"num_accepted_tokens": torch.tensor([1, 2, 3]), "cu_seqlens": starts([3, 0, 2])}
    slots = {"state_indices": torch.tensor([2, -1, 0])}
    return _update(x=normal(6, 8), conv_states=normal(4, 8, 5), bias=normal(8), **slots, **accepted)


def _norm(**options: Any) -> Call:
    given = {"x": normal(5, 2, 32), "z": normal(5, 2, 32, seed=1), "weight": normal(32, seed=2), "eps": 1e-6}
    return gd.rms_norm_gated, {**given, **options}


def _gates() -> Call:
    ba, per_head = normal(5, 2, 6), {"A_log": normal(6, seed=1), "dt_bias": normal(6, seed=2)}
    return gates, {**per_head, "a": ba[..., 3:], "b": ba[..., :3], "allow_neg_eigval": True}


CALLS: dict[str, Callable[[], Call]] = {
    "prefill": _prefill,
    "prefill, final state": lambda: _prefill(output_final_state=True, use_qk_l2norm_in_kernel=True, scale=0.5),
    "prefill, nothing given": lambda: _prefill(g=None, beta=None, initial_state=None, g_space="linear"),
    "prefill, the caller's": lambda: _prefill(output=nans(75, 2, 64), output_state=nans(3, 2, 64, 32)),
    "prefill, checkpoints": lambda: _prefill(
        state_checkpoints=nans(2, 2, 64, 32), checkpoint_cu_starts=starts([0, 0, 1]), checkpoint_every_n_tokens=64
    ),
    "prefill, pool": _prefill_pool,
    "prefill, two pools": lambda: _prefill_pool(
        output_state=nans(6, 2, 64, 32), has_initial_state=torch.tensor([True, True, False])
    ),
    "decode": lambda: _recurrent(gd.gated_delta_rule_decode, state=normal(3, 2, 32, 64)),
    "decode, options": lambda: _recurrent(
        gd.gated_delta_rule_decode, state=normal(3, 2, 32, 64), scale=2.0, use_qk_l2norm=False, allow_neg_eigval=True,
        output=nans(3, 1, 2, 64),
    ),
    "pretransposed": lambda: _recurrent(gd.gated_delta_rule_decode_pretranspose),
    "pretransposed, pool": lambda: _pretransposed_pool(output_state_indices=torch.tensor([3, 1, -1]), null_slot=0),
    "mtp": _mtp,
    "mtp, buffer": lambda: _mtp(intermediate_states_buffer=nans(4, 5, 2, 64, 32), disable_state_update=True),
    "mtp, slots": lambda: _mtp(ssm_state_indices=torch.tensor([[1, 2, -1], [3, 3, 3], [5, 6, 7]], dtype=torch.int32)),
    "conv": _conv,
    "conv, stateless": lambda: _conv(conv_states=None),
    "conv, pool": _conv_pool,
    "conv, grouped": lambda: _conv(x=normal(9, 2, 4), head_k=1),
    "update": _update,
    "update, ragged": _ragged_update,
    "norm": _norm,
    "norm, sigmoid": lambda: _norm(activation="sigmoid"),
    "gates": _gates,
}  # fmt: skip
OPERATORS = ("prefill", "recurrent", "causal_conv1d", "causal_conv1d_update", "rms_norm_gated", "gates")
SCHEMAS = {
    "prefill": (
        "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, Tensor cu_seqlens, Tensor? "
        "initial_state, Tensor? has_initial_state, Tensor? state_indices, int null_slot, bool in_place, bool "
        "use_qk_l2norm, bool log_gates, Tensor(a!) output, bool zero_padding, Tensor(b!)? final_state, "
        "Tensor(c!)? checkpoints, Tensor? checkpoint_starts, int checkpoint_every, bool batch_invariant, str "
        "backend"
    ),
    "recurrent": (
        "Tensor q, Tensor k, Tensor v, Tensor(a!) state, bool state_v_first, Tensor? A_log, Tensor a, Tensor"
        "? dt_bias, Tensor b, float scale, bool use_qk_l2norm, bool allow_neg_eigval, Tensor? read_slots, int "
        "null_slot, bool update_state, Tensor? write_slots, Tensor? token_slots, Tensor(b!)? snapshots, "
        "Tensor(c!) output, bool zero_padding, str backend"
    ),
    "causal_conv1d": (
        "Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor cu_seqlens, Tensor? "
        "state_indices, Tensor? has_initial_state, bool activate, int null_slot, int head_k, Tensor(b!) output, str "
        "backend"
    ),
    "causal_conv1d_update": (
        "Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool activate, Tensor? state_indices, "
        "Tensor? num_accepted_tokens, Tensor? cu_seqlens, int null_slot, Tensor(b!) output, str backend"
    ),
    "rms_norm_gated": ("Tensor x, Tensor z, Tensor weight, float eps, str activation, Tensor(a!) output, str backend"),
    "gates": (
        "Tensor A_log, Tensor a, Tensor dt_bias, Tensor b, bool allow_neg_eigval, Tensor(a!) log_alpha, Tensor(b!) "
        "beta, str backend"
    ),
    "gated_delta_net_step": (
        "Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor(a!) conv_states, Tensor conv_weight, "
        "Tensor(b!) state, Tensor A_log, Tensor dt_bias, Tensor norm_weight, float scale, float eps, str "
        "activation, bool allow_neg_eigval, Tensor state_indices, Tensor? cu_seqlens, Tensor? "
        "num_accepted_tokens, Tensor(c!)? tickets, int null_slot, Tensor(d!) output, str backend"
    ),
}
"""Arguments of each operator: programs that torch has exported name them so."""
every_call = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())


def cloned(inputs: Inputs) -> Inputs:
    """Own copies of the tensors, layout kept."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def assert_same(actual: Inputs, expected: Inputs) -> None:
    """Every tensor has the same bits: results and what was mutated in place."""
    for name, x in expected.items():
        if isinstance(x, Tensor):
            torch.testing.assert_close(actual[name], x, rtol=0, atol=0, equal_nan=True, msg=name)


def results(value: Any) -> Inputs:
    return {f"result {i}": x for i, x in enumerate(value if isinstance(value, tuple) else (value,))}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name: str) -> None:
    """What the records of the arguments say to torch, mutations included."""
    schema = getattr(torch.ops.gated_delta, name).default._schema
    assert str(schema) == f"gated_delta::{name}({SCHEMAS[name]}) -> ()"


@every_call
def test_opcheck(make: Callable[[], Call], monkeypatch: pytest.MonkeyPatch) -> None:
    operator, inputs = make()
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    def record(op: Any) -> Callable[..., None]:
        return lambda *args: seen.append((op, args))

    for name in OPERATORS:
        monkeypatch.setattr(library, name, record(getattr(library, name)))
    operator(**inputs)
    assert len(seen) == 1
    op, args = seen[0]
    args = tuple(x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    outcome = torch.library.opcheck(op, args)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@every_call
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(make: Callable[[], Call], backend: str) -> None:
    torch.compiler.reset()
    operator, inputs = make()
    eager, traced = cloned(inputs), cloned(inputs)
    expected = operator(**eager)
    actual = torch.compile(operator, fullgraph=True, backend=backend)(**traced)
    assert_same(results(actual), results(expected))
    assert_same(traced, eager)
    for name, x in inputs.items():  # the comparison above would miss a mutation that happens in neither
        if name in ("state", "conv_states", "output_state", "output"):
            assert not isinstance(x, Tensor) or not torch.equal(x, eager[name]), name


def test_compiled_again_for_every_dtype_of_the_state() -> None:
    torch.compiler.reset()
    compiled = torch.compile(gd.gated_delta_rule_decode_pretranspose, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = recurrent_inputs(2, state_dtype=dtype)
        eager, traced = cloned(inputs), cloned(inputs)
        assert_same(results(compiled(**traced)), results(gd.gated_delta_rule_decode_pretranspose(**eager)))
        assert_same(traced, eager)


# --- dynamic shapes ---------------------------------------------------------------------------------------------------


def _prefill_of(size: int) -> Call:
    lengths = [3 + size, *range(size)]
    return gd.chunk_gated_delta_rule, with_state(prefill_inputs(lengths, hq=1, hk=1, hv=2, head_k=32, head_v=64))


def _conv_of(size: int) -> Call:
    lengths = [3 + size, *range(size)]
    states = normal(size + 1, 8, 5, seed=2)
    return _conv(x=normal(sum(lengths), 8), conv_states=states, cu_seqlens=starts(lengths))


def _recurrent_of(operator: Callable[..., Any], size: int, layout: str = "V K") -> Call:
    inputs = recurrent_inputs(size, h=1, hv=2, head_k=32, head_v=64)
    if layout == "K V":
        inputs["state"] = inputs["state"].transpose(-1, -2).contiguous()
    return operator, inputs


def _mtp_of(size: int) -> Call:
    operator, inputs = _recurrent_of(gd.gated_delta_rule_mtp, size)
    inputs["initial_state"] = inputs.pop("state")
    return operator, {**inputs, "initial_state_indices": torch.arange(size), "disable_state_update": False}


FIXED = ("A_log", "dt_bias", "weight")
DYNAMIC: dict[str, Callable[[int], Call]] = {
    "prefill": _prefill_of,
    "decode": lambda size: _recurrent_of(gd.gated_delta_rule_decode, size, "K V"),
    "pretransposed": lambda size: _recurrent_of(gd.gated_delta_rule_decode_pretranspose, size),
    "mtp": _mtp_of,
    "conv": _conv_of,
    "update": lambda size: _update(x=normal(size, 2, 8), conv_states=normal(size, 8, 5)),
    "norm": lambda size: _norm(x=normal(size, 2, 32), z=normal(size, 2, 32, seed=1)),
}


@pytest.mark.parametrize("make", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_compiled_once_for_every_size(make: Callable[[int], Call]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(make(2)[0], fullgraph=True, backend="aot_eager")
    for number, size in enumerate((6, 3, 11, 4)):
        operator, inputs = make(size)
        eager, traced = cloned(inputs), cloned(inputs)
        for name, x in traced.items():
            if isinstance(x, Tensor) and name not in FIXED:
                torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            actual = compiled(**traced)
        assert_same(results(actual), results(operator(**eager)))
        assert_same(traced, eager)


# --- gradients of the reference ---------------------------------------------------------------------------------------

LENGTHS = (5, 0, 9, 1)
SPANS = ((0, 5), (5, 5), (5, 14), (14, 15))
Rule = Callable[..., tuple[Tensor, Tensor]]


def _leaves(dtype: torch.dtype, heads: tuple[int, int, int] = (1, 1, 2)) -> list[Tensor]:
    """Inputs, with alpha exactly 0 at two tokens (one inside a chunk, one at its end) and beta 0, 1 and 2."""
    total, states = sum(LENGTHS), max(heads)
    q, k, v = (normal(total, h, size, seed=i) for i, (h, size) in enumerate(zip(heads, (3, 3, 2), strict=True)))
    alpha, beta = torch.sigmoid(normal(total, states, seed=3)), torch.sigmoid(normal(total, states, seed=4))
    alpha[[2, 8]] = 0.0
    beta[[1, 6, 10]] = torch.tensor([0.0, 1.0, 2.0])[:, None]
    leaves = [q, k / 2, v, alpha, beta, normal(len(LENGTHS), states, 2, 3, seed=5)]
    return [x.to(dtype).requires_grad_() for x in leaves]


def _by_chunks(chunk: int) -> Rule:
    def rule(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.chunked(q, k, v, alpha, beta, 0.7, state, SPANS, chunk=chunk, dtype=q.dtype)[:2]

    return rule


def _by_tokens(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs, states = [], []
    for i, (first, last) in enumerate(SPANS):
        parts = (x[None, first:last] for x in (q, k, v, alpha, beta))
        output, final, _ = reference.recurrent(*parts, scale=0.7, state=state[i : i + 1], dtype=q.dtype)
        outputs.append(output[0])
        states.append(final)
    return torch.cat(outputs), torch.cat(states)


RULES = {"token by token": _by_tokens, "chunks of 4": _by_chunks(4), "chunks of 16": _by_chunks(16)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 1, 1)])
def test_gradients_against_differences(rule: Rule, heads: tuple[int, int, int]) -> None:
    assert torch.autograd.gradcheck(rule, _leaves(torch.float64, heads), fast_mode=True)


@pytest.mark.parametrize("rule", list(RULES.values())[1:], ids=list(RULES)[1:])
@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 1, 1)])
def test_gradients_by_chunks_are_those_by_tokens(rule: Rule, heads: tuple[int, int, int]) -> None:
    def gradients(of: Rule, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = _leaves(dtype, heads)
        output, state = of(*leaves)
        loss = (output * normal(*output.shape, seed=6)).sum() + (state * normal(*state.shape, seed=7)).sum()
        return torch.autograd.grad(loss, leaves)

    actual, plain = gradients(rule, torch.float32), gradients(_by_tokens, torch.float32)
    exact = gradients(_by_tokens, torch.float64)
    for name, *judged in zip(("q", "k", "v", "alpha", "beta", "state"), actual, plain, exact, strict=True):
        assert_within_budget(f"gradient of {name}", *judged)
