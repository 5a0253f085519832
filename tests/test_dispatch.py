"""Which backend serves a call and what explains it; and the errors of what is built around the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta import dispatch
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.dispatch import Backend, Request
from gated_delta.errors import BackendError, OptionError, PoolError
from gated_delta.state import StatePool
from gated_delta.testing.inputs import Inputs
from test_validation import CALLS, FLOATS, assert_fault

DECODE = "gated_delta_rule_decode"
CPU = "plain torch, fp32 arithmetic"
NOT_ON_CPU = "it serves tensors on the CPU, and these are on"


def request(device: str, head_k: int = 128) -> Request:
    return Request(DECODE, device, torch.bfloat16, head_k, 128)


def no_odd_heads(asked: Request) -> str | None:
    return None if asked.head_k == 128 else f"it has no K={asked.head_k}"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of two backends: one for K=128 only, and behind it one for the CPU only."""
    rows = (Backend("fast", "quick", no_odd_heads), next(b for b in dispatch.BACKENDS if b.name == "cpu"))
    monkeypatch.setattr(dispatch, "BACKENDS", rows)


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_the_cpu_is_served(operator: str) -> None:
    found = gd.explain(operator)
    assert found.chosen == "cpu"
    assert found.reasons["cpu"] == f"can serve it: {CPU}"
    assert callable(getattr(gd, operator))


def test_the_text_of_an_explanation() -> None:
    found = gd.explain("chunk_gated_delta_rule", dtype=torch.float16, head_k=96, head_v=192)
    head, *reasons = str(found).splitlines()
    assert head == "chunk_gated_delta_rule, cpu, float16, K=96, V=192 -> cpu"
    assert f"  cpu: can serve it: {CPU}" in reasons
    assert len(reasons) == len(dispatch.BACKENDS)


@pytest.mark.parametrize("device", ["meta", "meta:0", torch.device("meta")])
def test_where_no_backend_serves(device: Any) -> None:
    found = gd.explain(DECODE, device=device)
    head, *reasons = str(found).splitlines()
    assert found.chosen is None
    assert head == f"{DECODE}, meta, bfloat16, K=128, V=128 -> no backend"
    assert f"  cpu: {NOT_ON_CPU} meta" in reasons


@pytest.mark.parametrize("name", ["decode", "", None, ["rms_norm_gated"]])
def test_unknown_operator(name: Any) -> None:
    with pytest.raises(BackendError) as caught:
        gd.explain(name)
    known = (
        "chunk_gated_delta_rule, gated_delta_rule_decode, gated_delta_rule_decode_pretranspose, "
        "gated_delta_rule_mtp, gated_delta_net_step, causal_conv1d, causal_conv1d_update, rms_norm_gated"
    )
    assert_fault(caught.value, BackendError, f"explain: operator is {name!r}; it must be one of {known}")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["tpu", "CPU", "", None, ["cpu"]])
def test_unknown_backend(call: str, backend: Any) -> None:
    operator, make = CALLS[call]
    with pytest.raises(BackendError) as caught:
        getattr(gd, operator)(**make(), backend=backend)
    names = ", ".join(row.name for row in dispatch.BACKENDS)
    message = f'{operator}: backend is {backend!r}; it must be "auto" or one of: {names}'
    assert_fault(caught.value, BackendError, message)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_tensors_that_no_backend_serves(call: str, backend: str) -> None:
    """An explicit backend says why it refuses, and so does "auto" when every one does: nothing falls back."""
    operator, make = CALLS[call]
    given = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in make().items()}
    with pytest.raises(BackendError) as caught:
        getattr(gd, operator)(**given, backend=backend)
    message = str(caught.value)
    if backend == "cpu":
        assert message == f"{operator}: backend is 'cpu'; it must be another one: {NOT_ON_CPU} meta"
    else:
        assert message.startswith(f'{operator}: backend is "auto"; it must be served by some backend, but none can (')
        assert f"cpu: {NOT_ON_CPU} meta" in message


@pytest.mark.parametrize("call", CALLS)
def test_a_named_backend_serves(call: str) -> None:
    operator, make = CALLS[call]
    function = getattr(gd, operator)
    named, auto = (function(**make(), backend=backend) for backend in ("cpu", "auto"))
    torch.testing.assert_close(named, auto, rtol=0, atol=0, equal_nan=True)


def test_the_cpu_backend_refuses_other_devices() -> None:
    with pytest.raises(BackendError) as caught:
        dispatch.choose(request("cuda"), "cpu")
    message = f"{DECODE}: backend is 'cpu'; it must be another one: {NOT_ON_CPU} cuda"
    assert_fault(caught.value, BackendError, message)


@pytest.mark.parametrize(("device", "installed", "reason"), [
    ("cuda", False, "it needs the package triton, which is not installed"),
    ("cpu", True, "it serves tensors on a GPU, and these are on cpu"),
    ("meta", True, "it serves tensors on a GPU, and these are on meta"),
])  # fmt: skip
def test_what_the_triton_backend_refuses(
    device: str, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_HAS_TRITON", installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError) as caught:
        dispatch.choose(request(device), "triton")
    assert_fault(caught.value, BackendError, f"{DECODE}: backend is 'triton'; it must be another one: {reason}")


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_a_gpu_is_served_by_triton(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_hopper", lambda: False)
    assert gd.explain(operator, device="cuda").chosen == "triton"


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("device", "head_k", "backend", "chosen"),
    [
        ("cpu", 128, "auto", "fast"),
        ("cuda", 128, "auto", "fast"),
        ("cpu", 64, "auto", "cpu"),
        ("cpu", 128, "cpu", "cpu"),
        ("cuda", 128, "fast", "fast"),
    ],
)
def test_the_first_that_can_is_chosen(device: str, head_k: int, backend: str, chosen: str) -> None:
    assert dispatch.choose(request(device, head_k), backend) == chosen
    if backend == "auto":
        assert gd.explain(DECODE, device=device, head_k=head_k).chosen == chosen


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "backend is 'fast'; it must be another one: it has no K=64"),
        ("cpu", f"backend is 'cpu'; it must be another one: {NOT_ON_CPU} cuda"),
        ("slow", "backend is 'slow'; it must be \"auto\" or one of: fast, cpu"),
        ("auto", 'backend is "auto"; it must be served by some backend, but none can (fast: it has no K=64; '
         f"cpu: {NOT_ON_CPU} cuda)"),
    ],
)  # fmt: skip
def test_nothing_falls_back(backend: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        dispatch.choose(request("cuda", 64), backend)
    assert_fault(caught.value, BackendError, f"{DECODE}: {message}")


@pytest.mark.usefixtures("two")
def test_an_explanation_lists_every_backend() -> None:
    assert str(gd.explain(DECODE, head_k=64)).splitlines() == [
        f"{DECODE}, cpu, bfloat16, K=64, V=128 -> cpu",
        "  fast: it has no K=64",
        f"  cpu: can serve it: {CPU}",
    ]


CONFIG = GatedDeltaNetConfig(hidden_size=64, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=32)
SLOTS = "it must be of a slot a token, at most num_spec + 1 = 2"
OBJECTS: list[tuple[Callable[..., object], Inputs, str]] = [
    *((partial(replace, CONFIG), change, f"GatedDeltaNetConfig: {message}") for change, message in (
        ({"num_v_heads": 3}, "num_v_heads is 3; it must be a multiple of num_k_heads=2"),
        ({"projection": "split"}, "projection is 'split'; it must be \"interleaved\" or \"flat\" or \"merged\""),
        ({"output_gate": "relu"}, "output_gate is 'relu'; it must be \"silu\", \"swish\" or \"sigmoid\""),
    )),
    *((partial(StatePool, CONFIG), {"layers": 1, "slots": 1, **change}, f"StatePool: {message}")
      for change, message in (
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"reserve_null": True}, "slots is 1; it must be at least 2"),
        ({"num_spec": -1}, "num_spec is -1; it must be at least 0"),
        ({"conv_dtype": torch.float64}, f"conv_dtype is torch.float64; it must be {FLOATS}"),
        ({"state_dtype": torch.int8}, f"state_dtype is torch.int8; it must be {FLOATS}"),
        ({"conv_layout": "NHWC"}, "conv_layout is 'NHWC'; it must be \"SD\" or \"DS\""),
    )),
    *((partial(GatedDeltaNetBatch.build, num_spec=1), {"rows": rows}, f"GatedDeltaNetBatch.build: {message}")
      for rows, message in (
        ([Row(1, 0), Row(0, 1)], "rows[1] is of 0 tokens; it must be of at least 1 token"),
        ([Row(3, 0, fresh=True), Row(1, 1)], "rows is with a decode behind a prefill; it must be decodes first"),
        ([SpecRow(2, [1], 1)], f"rows[0] is of 2 tokens and 1 slots; {SLOTS}"),
        ([SpecRow(2, [1, 2, 3], 1)], f"rows[0] is of 2 tokens and 3 slots; {SLOTS}"),
        ([SpecRow(2, [1, 2], 0)], "rows[0].accepted is 0; it must be in [1, 2], one of its slots"),
        ([SpecRow(2, [1, 2], 3)], "rows[0].accepted is 3; it must be in [1, 2], one of its slots"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("make", "given", "message"), [pytest.param(*row, id=row[2][:60]) for row in OBJECTS])
def test_object(make: Callable[..., object], given: Inputs, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make(**given)
    assert_fault(caught.value, OptionError, message)


def test_slots_that_a_pool_does_not_have() -> None:
    pool = StatePool(CONFIG, layers=1, slots=3)
    held = pool.allocate(2)
    for change, message in (
        (lambda: pool.allocate(2), "allocate: count is 2; it must be in [0, 1], the slots that are free"),
        (lambda: pool.allocate(-1), "allocate: count is -1; it must be in [0, 1], the slots that are free"),
        (lambda: pool.free([held[0], 2]), "free: slots is [0, 2]; it must be held slots, each once: 2 is not"),
        (lambda: pool.free([held[1]] * 2), "free: slots is [1, 1]; it must be held slots, each once: 1 is not"),
    ):
        with pytest.raises(PoolError) as caught:
            change()
        assert_fault(caught.value, PoolError, f"StatePool.{message}")
        assert pool.free_slots == 1  # all or none


def test_rows_that_tiles_are_taken_of() -> None:
    prefill = pytest.importorskip("gated_delta.kernels.gluon.prefill")
    room = torch.zeros(4, 2056, dtype=torch.bfloat16)
    heads = room[:, :2048].unflatten(-1, (-1, 128))
    assert not prefill.tileable(heads), "the compiler would not know that rows begin at multiples of 16 bytes"
    assert prefill.tileable(heads.contiguous())
    assert not prefill.tileable(heads.contiguous()[:, :, 4:])


def test_a_plan_that_is_given_ends_with_its_case() -> None:
    prefill = pytest.importorskip("gated_delta.kernels.gluon.prefill")
    seen: list[object] = []
    prefill.planned(prefill.PLANS[2], lambda: seen.append(prefill._TAKEN.get()))
    with pytest.raises(ZeroDivisionError):
        prefill.planned(prefill.PLANS[0], lambda: 1 // 0)
    assert (seen, prefill._TAKEN.get()) == ([prefill.PLANS[2]], None)
