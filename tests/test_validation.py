"""Every bad argument of every operator: which error, and the sentence that says what it was and what it must be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import errors
from gated_delta.errors import DeviceError, DtypeError, GradientError, LayoutError, OptionError, ShapeError
from gated_delta.testing.inputs import Inputs, prefill_inputs, recurrent_inputs

FLOATS, INDICES = "bfloat16 or float16 or float32", "int32 or int64"
WRONG = {FLOATS: torch.float64, "float32": torch.bfloat16, INDICES: torch.int16, "bool": torch.int32}
"""Which dtypes an argument may have, and one that it may not."""
PREFILL, DECODE, POOLED, MTP, CONV, UPDATE, NORM = (
    "chunk_gated_delta_rule", "gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose",
    "gated_delta_rule_mtp", "causal_conv1d", "causal_conv1d_update", "rms_norm_gated",
)  # fmt: skip


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Something to write into, where a write would show."""
    return torch.full(shape, 7.0, dtype=dtype)


bf16 = partial(filled, dtype=torch.bfloat16)


def prefill() -> Inputs:
    """L=8, N=2, HQ=HK=2, HV=4, K=64, V=32, P=6, everything that may be given."""
    return {
        **prefill_inputs([5, 3], head_k=64, head_v=32),
        "scale": 0.5, "output": bf16(8, 4, 32), "initial_state": filled(6, 4, 32, 64),
        "output_state": filled(6, 4, 32, 64), "state_indices": torch.tensor([4, 1]), "null_slot": 0,
        "has_initial_state": torch.tensor([True, False]), "max_seqlen": 5, "checkpoint_every_n_tokens": 64,
        "state_checkpoints": filled(1, 4, 32, 64), "checkpoint_cu_starts": torch.zeros(3, dtype=torch.int32),
    }  # fmt: skip


def recurrent(tokens: int = 1) -> Inputs:
    """B=3, H=2, HV=4, K=64, V=32, without a state."""
    given = recurrent_inputs(3, tokens, head_k=64, head_v=32)
    del given["state"]
    return {**given, "scale": 0.5, "output": bf16(3, tokens, 4, 32)}


def pooled() -> Inputs:
    return {
        **recurrent(), "state": None, "initial_state": filled(7, 4, 32, 64), "null_slot": 0,
        "initial_state_indices": torch.tensor([1, 2, 3]), "output_state_indices": torch.tensor([1, 2, 4]),
        "intermediate_states_buffer": filled(4, 2, 4, 32, 64),
    }  # fmt: skip


def mtp() -> Inputs:
    return {
        **recurrent(2), "initial_state": filled(7, 4, 32, 64), "initial_state_indices": torch.tensor([1, 2, 3]),
        "ssm_state_indices": torch.tensor([[1, 4], [2, 5], [3, 6]]), "disable_state_update": False,
        "output_state_indices": torch.tensor([-1, -1, -1]), "null_slot": 0,
    }  # fmt: skip


def conv() -> Inputs:
    """L=8, D=6, W=4, N=2, P=5."""
    return {
        "x": filled(8, 6), "weight": filled(6, 4), "bias": filled(6), "conv_states": filled(5, 6, 3), "null_slot": 0,
        "cu_seqlens": torch.tensor([0, 5, 8]), "state_indices": torch.tensor([4, 1]),
        "has_initial_state": torch.tensor([True, False]),
    }  # fmt: skip


def update() -> Inputs:
    """N=2 rows of T=3 tokens, and room for just as many."""
    return {
        "x": filled(2, 3, 6), "conv_states": filled(5, 6, 5), "weight": filled(6, 4), "bias": filled(6),
        "state_indices": torch.tensor([4, 1]), "num_accepted_tokens": torch.tensor([1, 3]), "null_slot": 0,
    }  # fmt: skip


CALLS: dict[str, tuple[str, Callable[[], Inputs]]] = {
    PREFILL: (PREFILL, prefill),
    DECODE: (DECODE, lambda: {**recurrent(), "state": filled(3, 4, 64, 32)}),
    POOLED: (POOLED, pooled),
    "one state a row": (POOLED, lambda: {**recurrent(2), "state": filled(3, 4, 32, 64)}),
    MTP: (MTP, mtp),
    CONV: (CONV, conv),
    UPDATE: (UPDATE, update),
    "ragged": (UPDATE, lambda: {**update(), "x": filled(5, 6), "cu_seqlens": torch.tensor([0, 3, 5])}),
    NORM: (NORM, lambda: {"x": filled(5, 6), "z": filled(5, 6), "weight": filled(6), "eps": 1e-6}),
}
"""Good calls, and the operator of each."""

_GATES = [("A_log", "[HV]", "float32"), ("dt_bias", "[HV]", FLOATS)]
_ONE = [*_GATES, ("q", "[B, 1, H, K]", FLOATS), ("v", "[B, 1, HV, V]", FLOATS), ("a", "[B, 1, HV]", FLOATS)]
_MANY = [*_GATES, ("q", "[B, T, H, K]", FLOATS), ("k", "[B, T, H, K]", FLOATS), ("v", "[B, T, HV, V]", FLOATS),
         ("a", "[B, T, HV]", FLOATS), ("b", "[B, T, HV]", FLOATS), ("output", "[B, T, HV, V]", FLOATS),
         ("initial_state", "[P, HV, V, K]", FLOATS), ("initial_state_indices", "[B]", INDICES),
         ("output_state_indices", "[B]", INDICES)]  # fmt: skip
_CONV = [("weight", "[D, W]", FLOATS), ("bias", "[D]", FLOATS), ("conv_states", "[P, D, *]", FLOATS),
         ("state_indices", "[N]", INDICES)]  # fmt: skip
TENSORS: dict[str, list[tuple[str, str, str]]] = {
    PREFILL: [
        ("q", "[L, HQ, K]", FLOATS), ("k", "[L, HK, K]", FLOATS), ("v", "[L, HV, V]", FLOATS),
        ("g", "[L, HS]", "float32"), ("beta", "[L, HS]", "float32"), ("cu_seqlens", "[N+1]", INDICES),
        ("output", "[L, HS, V]", FLOATS), ("initial_state", "[P, HS, V, K]", FLOATS),
        ("output_state", "[P, HS, V, K]", FLOATS), ("state_indices", "[N]", INDICES),
        ("has_initial_state", "[N]", "bool"), ("state_checkpoints", "[*, HS, V, K]", FLOATS),
        ("checkpoint_cu_starts", "[N+1]", INDICES),
    ],
    DECODE: [*_ONE, ("k", "[B, 1, H, K]", FLOATS), ("b", "[B, 1, HV]", FLOATS), ("output", "[B, 1, HV, V]", FLOATS),
             ("state", "[B, HV, K, V]", FLOATS)],
    POOLED: [*_MANY, ("intermediate_states_buffer", "[>=B, >=T, HV, V, K]", FLOATS)],
    "one state a row": [("state", "[B, HV, V, K]", FLOATS)],
    MTP: [*_MANY, ("ssm_state_indices", "[B, T]", INDICES)],
    CONV: [*_CONV, ("x", "[L, D]", FLOATS), ("cu_seqlens", "[N+1]", INDICES), ("has_initial_state", "[N]", "bool")],
    UPDATE: [*_CONV, ("num_accepted_tokens", "[N]", INDICES)],
    "ragged": [("x", "[L, D]", FLOATS), ("cu_seqlens", "[N+1]", INDICES)],
    NORM: [("z", "[D0, V]", FLOATS), ("weight", "[V]", FLOATS)],
}  # fmt: skip
"""Of each good call, its tensors: shape as the contract writes it, and the dtypes that it may have."""
EACH = [pytest.param(call, *row, id=f"{call}-{row[0]}") for call, rows in TENSORS.items() for row in rows]
FIRST = {UPDATE: "x", "ragged": "x", CONV: "x", NORM: "x"}


def run(call: str, **changes: Any) -> Any:
    """The good call with some arguments changed; a function changes what is there."""
    operator, make = CALLS[call]
    given = make()
    for name, new in changes.items():
        given[name] = new(given[name]) if callable(new) else new
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor) and x.layout is torch.strided}
    try:
        return getattr(gd, operator)(**given)
    except errors.GatedDeltaError:
        for name, x in before.items():
            assert x.is_meta or torch.equal(x, given[name]), f"{name} was written before the call failed"
        raise


def assert_fault(raised: BaseException, error: type[errors.ArgumentError], message: str, whole: bool = True) -> None:
    """The class and the sentence are right, and both survive the way to another process."""
    assert type(raised) is error
    assert str(raised) == message if whole else str(raised).startswith(message)
    copy = pickle.loads(pickle.dumps(raised))
    assert (type(copy), str(copy), vars(copy)) == (type(raised), str(raised), vars(raised))


def check(call: str, error: type[errors.ArgumentError], message: str, changes: Inputs, *, whole: bool = True) -> None:
    with pytest.raises(errors.GatedDeltaError) as caught:
        run(call, **changes)
    assert_fault(caught.value, error, f"{CALLS[call][0]}: {message}", whole)


@pytest.mark.parametrize("call", CALLS)
def test_the_good_calls_are_good(call: str) -> None:
    run(call)


@pytest.mark.parametrize(
    ("error", "base"),
    [(DtypeError, TypeError), (ShapeError, ValueError), (LayoutError, ValueError), (DeviceError, ValueError),
     (OptionError, ValueError), (GradientError, ValueError), (errors.DataError, ValueError),
     (errors.BackendError, ValueError), (errors.PoolError, ValueError)],
)  # fmt: skip
def test_errors_are_the_builtin_kind_too(error: type[errors.ArgumentError], base: type[Exception]) -> None:
    assert issubclass(error, errors.ArgumentError)
    assert issubclass(error, errors.GatedDeltaError)
    assert issubclass(error, base)
    raised = error("here", "this", [1], "that")
    assert_fault(raised, error, "here: this is [1]; it must be that")
    assert (raised.where, raised.argument, raised.was, raised.must) == ("here", "this", [1], "that")


@pytest.mark.parametrize(("call", "name", "shape", "dtypes"), EACH)
def test_no_tensor(call: str, name: str, shape: str, dtypes: str) -> None:
    check(call, DtypeError, f"{name} is a list; it must be a tensor {shape} of {dtypes}", {name: [1.0]})


@pytest.mark.parametrize(
    ("call", "name"),
    [(c, n) for c in (DECODE, POOLED, MTP) for n in ("q", "k", "v", "A_log", "a", "dt_bias", "b")]
    + [(PREFILL, n) for n in ("q", "k", "v", "cu_seqlens")]
    + [(MTP, "initial_state"), (DECODE, "state"), (CONV, "x"), (CONV, "weight"), (CONV, "cu_seqlens")]
    + [(UPDATE, "weight"), (NORM, "z"), (NORM, "weight")],
)
def test_required_tensor_left_out(call: str, name: str) -> None:
    check(call, DtypeError, f"{name} is None; it must be a tensor [", {name: None}, whole=False)


@pytest.mark.parametrize(("call", "name", "shape", "dtypes"), EACH)
def test_dtype(call: str, name: str, shape: str, dtypes: str) -> None:
    wrong = WRONG[dtypes]
    check(call, DtypeError, f"{name} is {str(wrong)[6:]}; it must be {dtypes}", {name: lambda x: x.to(wrong)})


@pytest.mark.parametrize("call", [PREFILL, DECODE, POOLED, MTP])
@pytest.mark.parametrize("name", ["k", "v"])
def test_q_k_and_v_are_of_one_dtype(call: str, name: str) -> None:
    check(call, DtypeError, f"{name} is float16; it must be bfloat16, as q is", {name: lambda x: x.half()})


@pytest.mark.parametrize(("call", "name", "shape", "dtypes"), EACH)
def test_rank(call: str, name: str, shape: str, dtypes: str) -> None:
    have = [1, *CALLS[call][1]()[name].shape]
    wrong = {name: lambda x: x.unsqueeze(0)}
    check(call, ShapeError, f"{name} is of shape {have}; it must be {shape}", wrong, whole=False)


@pytest.mark.parametrize(("call", "name", "shape", "dtypes"), EACH)
def test_device(call: str, name: str, shape: str, dtypes: str) -> None:
    first = FIRST.get(call, "q")
    where, other = ("cpu", "meta") if name == first else ("meta", "cpu")
    named = {CONV: "cu_seqlens", "ragged": "cu_seqlens"}.get(call, "k") if name == first else name
    message = f"{named} is on {where}; it must be on {other}, where {first} is"
    check(call, DeviceError, message, {name: lambda x: x.to("meta")})


@pytest.mark.parametrize(("call", "name", "shape", "dtypes"), EACH)
def test_innermost_stride(call: str, name: str, shape: str, dtypes: str) -> None:
    wide = {name: lambda x: x.repeat_interleave(2, -1)[..., ::2]}
    if dtypes == INDICES or name in ("conv_states", "has_initial_state") or (name, shape) == ("weight", "[D, W]"):
        run(call, **wide)  # these may have any stride
        return
    was, must = "strided by 2 elements in", "contiguous in its last dimension (other strides are free)"
    check(call, LayoutError, f"{name} is {was} its last dimension; it must be {must}", wide)


@pytest.mark.parametrize(("call", "name"), [row.values[:2] for row in EACH if "float" in str(row.values[3])])
def test_gradients(call: str, name: str) -> None:
    message = f"{name} is a tensor that requires grad; it must be detached or used under torch.no_grad()"
    wants: dict[str, Any] = {name: lambda x: x.requires_grad_()}
    check(call, GradientError, message, wants, whole=False)
    with torch.no_grad():
        run(call, **wants)


QKV, STATES = "B=3 (from q)", "V=32 (from v), K=64 (from q)"
POOL_ROW = f"HV=4 (from v), {STATES}"
SHAPES: list[tuple[str, str, tuple[int, ...], str]] = [
    (PREFILL, "k", (9, 2, 64), "[L, HK, K] with L=8 (from q), K=64 (from q)"),
    (PREFILL, "k", (8, 2, 32), "[L, HK, K] with L=8 (from q), K=64 (from q)"),
    (PREFILL, "v", (7, 4, 32), "[L, HV, V] with L=8 (from q)"),
    (PREFILL, "g", (8, 2), "[L, HS] with L=8 (from q), HS=4 (from max(HQ, HV))"),
    (PREFILL, "beta", (9, 4), "[L, HS] with L=8 (from q), HS=4 (from max(HQ, HV))"),
    (PREFILL, "cu_seqlens", (0,), "[N+1]"),
    (PREFILL, "output", (8, 4, 64), "[L, HS, V] with L=8 (from q), HS=4 (from max(HQ, HV)), V=32 (from v)"),
    (PREFILL, "state_indices", (3,), "[N] with N=2 (from cu_seqlens)"),
    (PREFILL, "has_initial_state", (3,), "[N] with N=2 (from cu_seqlens)"),
    (PREFILL, "checkpoint_cu_starts", (2,), "[N+1] with N=2 (from cu_seqlens)"),
    (PREFILL, "initial_state", (6, 4, 64, 32), f"[P, HS, V, K] with HS=4 (from max(HQ, HV)), {STATES}"),
    (PREFILL, "output_state", (5, 4, 32, 64),
     f"[P, HS, V, K] with P=6 (from initial_state), HS=4 (from max(HQ, HV)), {STATES}"),
    (PREFILL, "state_checkpoints", (1, 2, 32, 64), f"[*, HS, V, K] with HS=4 (from max(HQ, HV)), {STATES}"),
    (DECODE, "q", (3, 2, 2, 64), "[B, 1, H, K]"),
    (DECODE, "k", (3, 1, 1, 64), f"[B, 1, H, K] with {QKV}, H=2 (from q), K=64 (from q)"),
    (DECODE, "v", (2, 1, 4, 32), f"[B, 1, HV, V] with {QKV}"),
    (DECODE, "state", (3, 4, 32, 64), f"[B, HV, K, V] with {QKV}, HV=4 (from v), K=64 (from q), V=32 (from v)"),
    (DECODE, "A_log", (2,), "[HV] with HV=4 (from v)"),
    (DECODE, "dt_bias", (3,), "[HV] with HV=4 (from v)"),
    (DECODE, "a", (3, 1, 2), f"[B, 1, HV] with {QKV}, HV=4 (from v)"),
    (DECODE, "b", (3, 2, 4), f"[B, 1, HV] with {QKV}, HV=4 (from v)"),
    (DECODE, "output", (3, 1, 4, 64), f"[B, 1, HV, V] with {QKV}, HV=4 (from v), V=32 (from v)"),
    (POOLED, "k", (3, 2, 2, 64), f"[B, T, H, K] with {QKV}, T=1 (from q), H=2 (from q), K=64 (from q)"),
    (POOLED, "initial_state", (7, 2, 32, 64), f"[P, HV, V, K] with {POOL_ROW}"),
    (POOLED, "initial_state_indices", (2,), f"[B] with {QKV}"),
    (POOLED, "output_state_indices", (4,), f"[B] with {QKV}"),
    (POOLED, "intermediate_states_buffer", (2, 2, 4, 32, 64),
     f"[>=B, >=T, HV, V, K] with {QKV}, T=1 (from q), {POOL_ROW}"),
    ("one state a row", "state", (2, 4, 32, 64), f"[B, HV, V, K] with {QKV}, {POOL_ROW}"),
    (MTP, "v", (3, 1, 4, 32), f"[B, T, HV, V] with {QKV}, T=2 (from q)"),
    (MTP, "a", (3, 1, 4), f"[B, T, HV] with {QKV}, T=2 (from q), HV=4 (from v)"),
    (MTP, "ssm_state_indices", (3, 3), f"[B, T] with {QKV}, T=2 (from q)"),
    (CONV, "weight", (5, 4), "[D, W] with D=6 (from x)"),
    (CONV, "bias", (5,), "[D] with D=6 (from x)"),
    (CONV, "conv_states", (5, 4, 3), "[P, D, *] with D=6 (from x)"),
    (CONV, "state_indices", (3,), "[N] with N=2 (from cu_seqlens)"),
    (CONV, "has_initial_state", (1,), "[N] with N=2 (from cu_seqlens)"),
    (UPDATE, "x", (6,), "[N, D]"),
    (UPDATE, "state_indices", (3,), "[N] with N=2 (from x)"),
    (UPDATE, "num_accepted_tokens", (1,), "[N] with N=2 (from x)"),
    ("ragged", "x", (2, 3, 6), "[L, D]"),
    ("ragged", "num_accepted_tokens", (3,), "[N] with N=2 (from cu_seqlens)"),
    (NORM, "z", (4, 6), "[D0, V] with D0=5 (from x), V=6 (from x)"),
    (NORM, "weight", (5,), "[V] with V=6 (from x)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "shape", "must"), SHAPES)
def test_size(call: str, name: str, shape: tuple[int, ...], must: str) -> None:
    wrong = {name: lambda x: torch.zeros(shape, dtype=x.dtype)}
    check(call, ShapeError, f"{name} is of shape {list(shape)}; it must be {must}", wrong)


HEADS = "such that HQ = HK divides HV (grouped values) or HK = HV divides HQ (grouped queries)"
HEAD_SIZES = "one of 32, 64, 96, 128, 192, 256"
WORDS = '"linear" (g is the forget gate alpha itself, in [0, 1]) or "log" (g is its natural logarithm, at most 0)'
CONV_WORDS = "'silu' or 'swish' or None"
NO_POOL: Inputs = dict.fromkeys(("state_indices", "initial_state", "output_state", "has_initial_state"))
NO_UPDATE = "disable_state_update is True, so no final state is written"
NEED, LEAVE = "is None; it must be given:", "is given; it must be left out:"
OPTIONS: dict[str, list[tuple[str, Inputs]]] = {
    PREFILL: [
        (f"g_space is 'exp'; it must be {WORDS}", {"g_space": "exp"}),
        (f"g_space is None; it must be {WORDS}", {"g_space": None}),
        ("max_seqlen is -1; it must be at least 0", {"max_seqlen": -1}),
        ("deterministic is True; it must be None or 'batch_invariant'", {"deterministic": True}),
        (f"initial_state {NEED} state_indices needs a pool", {**NO_POOL, "state_indices": torch.tensor([4, 1])}),
        (f"initial_state {NEED} has_initial_state says which of its rows count", {"initial_state": None}),
        (f"state_indices {NEED} null_slot names a slot of a pool", NO_POOL),
        ("checkpoint_every_n_tokens is -64; it must be at least 0", {"checkpoint_every_n_tokens": -64}),
        ("checkpoint_every_n_tokens is 96; it must be a multiple of 64", {"checkpoint_every_n_tokens": 96}),
        (f"state_checkpoints {NEED} checkpoint_every_n_tokens is 64", {"state_checkpoints": None}),
        (f"checkpoint_cu_starts {NEED} checkpoint_every_n_tokens is 64", {"checkpoint_cu_starts": None}),
        (f"state_checkpoints {LEAVE} checkpoint_every_n_tokens is 0", {"checkpoint_every_n_tokens": 0}),
        (f"checkpoint_cu_starts {LEAVE} checkpoint_every_n_tokens is 0",
         {"checkpoint_every_n_tokens": 0, "state_checkpoints": None}),
    ],
    POOLED: [
        (f"initial_state {LEAVE} state is given, and they exclude each other", {"state": filled(3, 4, 32, 64)}),
        (f"initial_state_indices {LEAVE} they index initial_state, and state is given",
         {"state": filled(3, 4, 32, 64), "initial_state": None}),
        (f"state {NEED} or the pool initial_state with initial_state_indices", {"initial_state": None}),
        (f"initial_state_indices {NEED} initial_state is a pool", {"initial_state_indices": None}),
        (f"output_state_indices {LEAVE} {NO_UPDATE}", {"disable_state_update": True}),
    ],
    "one state a row": [
        (f"initial_state_indices {NEED} output_state_indices name slots of a pool",
         {"output_state_indices": torch.tensor([0, 1, 2])}),
        (f"initial_state_indices {NEED} null_slot names a slot of a pool", {"null_slot": 0}),
    ],
    MTP: [
        ("the number of tokens T is 0; it must be at least 1", recurrent(0)),
        (f"output_state_indices {LEAVE} {NO_UPDATE}", {"disable_state_update": True}),
        ("disable_state_update is True; it must be False with ssm_state_indices, which write states",
         {"disable_state_update": True, "output_state_indices": None}),
        (f"intermediate_states_buffer {LEAVE} ssm_state_indices keeps the same states",
         {"intermediate_states_buffer": filled(3, 2, 4, 32, 64)}),
        (f"ssm_state_indices {LEAVE} it needs T >= 2 (one token has only a final state)",
         {**recurrent(1), "ssm_state_indices": torch.tensor([[1], [2], [3]])}),
    ],
    CONV: [
        (f"activation is 'relu'; it must be {CONV_WORDS}", {"activation": "relu"}),
        (f"conv_states {NEED} state_indices speaks of its rows", {"conv_states": None}),
        (f"conv_states {NEED} has_initial_state speaks of its rows",
         {"conv_states": None, "state_indices": None, "null_slot": None}),
        (f"state_indices {NEED} null_slot names a slot of a pool",
         {"state_indices": None, "conv_states": filled(2, 6, 3)}),
    ],
    UPDATE: [
        (f"activation is 'sigmoid'; it must be {CONV_WORDS}", {"activation": "sigmoid"}),
        (f"conv_states {NEED} an update reads and writes it", {"conv_states": None}),
        (f"state_indices {NEED} null_slot names a slot of a pool",
         {"state_indices": None, "conv_states": filled(2, 6, 5)}),
        ("the number of tokens T is 4; it must be at most 3 (conv_states keeps 5 columns for a width of 4)",
         {"x": filled(2, 4, 6)}),
    ],
    NORM: [("activation is None; it must be 'silu' or 'swish' or 'sigmoid'", {"activation": None})],
}  # fmt: skip
FAULTS: list[tuple[str, type[errors.ArgumentError], str, Inputs]] = [
    *((call, OptionError, message, changes) for call, rows in OPTIONS.items() for message, changes in rows),
    (PREFILL, ShapeError, f"(HQ, HK, HV) is (2, 2, 3); it must be {HEADS}", {"v": bf16(8, 3, 32)}),
    (PREFILL, ShapeError, f"(HQ, HK, HV) is (3, 2, 4); it must be {HEADS}", {"q": bf16(8, 3, 64)}),
    (PREFILL, ShapeError, f"(HQ, HK, HV) is (4, 2, 4); it must be {HEADS}", {"q": bf16(8, 4, 64)}),
    (PREFILL, ShapeError, f"(HQ, HK, HV) is (0, 0, 4); it must be {HEADS}",
     dict.fromkeys("qk", bf16(8, 0, 64))),
    (PREFILL, ShapeError, f"head size K (from q) is 40; it must be {HEAD_SIZES}", dict.fromkeys("qk", bf16(8, 2, 40))),
    (MTP, ShapeError, f"head size V (from v) is 512; it must be {HEAD_SIZES}", {"v": bf16(3, 2, 4, 512)}),
    (DECODE, ShapeError, "v is of 3 heads; it must be of a multiple of the 2 heads of q and k",
     {"v": bf16(3, 1, 3, 32)}),
    (MTP, ShapeError, "v is of 4 heads; it must be of a multiple of the 0 heads of q and k",
     dict.fromkeys("qk", bf16(3, 2, 0, 64))),
    (PREFILL, DtypeError, "max_seqlen is a float; it must be a whole number of at least 0", {"max_seqlen": 5.0}),
    (PREFILL, DtypeError, "checkpoint_every_n_tokens is a bool; it must be a whole number of at least 0",
     {"checkpoint_every_n_tokens": True}),
    *((call, ShapeError, f"weight is of width {w}; it must be of width 2 to 5", {"weight": filled(6, w)})
      for call in (CONV, UPDATE) for w in (1, 6)),
    *((call, ShapeError, "conv_states is of 2 columns; it must be of at least 3 columns for a width of 4",
       {"conv_states": filled(5, 6, 2)}) for call in (CONV, UPDATE)),
    (NORM, DtypeError, "eps is a str; it must be a number", {"eps": "1e-6"}),
    *((call, DtypeError, f"scale is a {type(scale).__name__}; it must be a number", {"scale": scale})
      for call, scale in ((PREFILL, "0.5"), (DECODE, True), (POOLED, 1j), (MTP, torch.tensor(0.5)))),
    *((call, error, f"null_slot is {was}; it must be {must}", {"null_slot": value})
      for call in (PREFILL, POOLED, MTP, CONV, UPDATE, "ragged")
      for error, was, must, value in ((OptionError, "-1", "at least 0", -1),
                                      (DtypeError, "a bool", "a whole number of at least 0", False))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message", "changes"), [pytest.param(*row, id=f"{row[0]}-{row[2][:60]}") for row in FAULTS]
)
def test_option(call: str, error: type[errors.ArgumentError], message: str, changes: Inputs) -> None:
    check(call, error, message, changes)
