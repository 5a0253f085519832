"""Warm-up: its cases are calls that the operators serve, its processes share them, and its errors say what failed."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta import library
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import OptionError, WarmupError
from gated_delta.interop import fla, transformers
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import StatePool

module = sys.modules["gated_delta.warmup"]
CONFIG = GatedDeltaNetConfig(hidden_size=64, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=32)
EXPANDED = pytest.mark.filterwarnings("ignore:Use of index_put_ on expanded tensors:UserWarning")


def shapes(**options: Any) -> Any:
    given: dict[str, Any] = {"dtype": torch.bfloat16, "state_dtype": torch.float16, "max_batch": 3, "num_spec": 2}
    return module._Shapes(CONFIG, **{**given, **options}, device="cpu")


@EXPANDED
@pytest.mark.parametrize("num_spec", [0, 2])
def test_every_case_runs(num_spec: int) -> None:
    cases = module._cases(shapes(num_spec=num_spec))
    assert len(cases) == (29 if num_spec else 21)
    for case in cases:
        case()


def by_plug_ins(device: str) -> None:
    """A token of three rows, of a cache of either layout, as the layers of Transformers and FLA ask for it: the
    logarithm of alpha in fp32, beta as the activations are.
    """
    q, k, v = (torch.randn(3, 1, heads, 32, device=device).bfloat16() for heads in (2, 2, 4))
    state, g = torch.zeros(3, 4, 32, 32, device=device), -torch.rand(3, 1, 4, device=device)
    beta = g.exp().bfloat16()
    for initial in (state, state.mT):
        transformers._recurrent(q, k, v, g, beta, initial, True, True)
    fla.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state, use_qk_l2norm_in_kernel=True)


Asked = list[tuple[Any, ...]]


def asked_of(operator: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Asked, Asked]:
    """What the cases that are ``case`` ask of an operator, by all that a kernel is compiled for (sizes and floats left
    out), and a list of what is asked from then on.
    """
    asked: Asked = []

    def look(*args: Any) -> None:
        kinds = (x.dtype if isinstance(x, torch.Tensor) else x for x in args)
        asked.append(tuple(x for x in kinds if not isinstance(x, float)))

    monkeypatch.setattr(library, operator, look)
    for found in module._cases(shapes(state_dtype=torch.float32)):
        if found.func is case:
            found()
    warmed = asked.copy()
    asked.clear()
    return warmed, asked


@EXPANDED
def test_a_token_of_the_plug_ins_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed, asked = asked_of("recurrent", module._recurrent, monkeypatch)
    by_plug_ins("cpu")
    assert len(asked) == 3
    assert set(asked) <= set(warmed)


def test_a_prefill_of_the_layer_is_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed, asked = asked_of("prefill", module._prefill, monkeypatch)
    layer, state = GatedDeltaNetAttention(CONFIG).bfloat16(), StatePool(CONFIG, layers=1, slots=1).layer(0)
    with torch.no_grad():
        layer(torch.zeros(70, 64).bfloat16(), GatedDeltaNetBatch.build([Row(70, 0, fresh=True)]), state)
    assert len(asked) == 1
    assert asked[0] in warmed


def test_steps_of_the_layer_are_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed, asked = asked_of("gated_delta_net_step", module._step, monkeypatch)
    layer, state = GatedDeltaNetAttention(CONFIG).bfloat16(), StatePool(CONFIG, layers=1, slots=4, num_spec=2).layer(0)
    rows = [Row(1, 3)], [SpecRow(3, [0, 1, 2], 1)]
    with torch.no_grad():
        for some in rows:
            batch = GatedDeltaNetBatch.build(some, num_spec=2)
            layer(torch.zeros(batch.num_actual_tokens, 64).bfloat16(), batch, state)
    assert len(asked) == 2
    assert set(asked) <= set(warmed)


def test_processes_share_the_cases() -> None:
    done: list[None] = []
    s = shapes(max_batch=1)
    module._in_processes(s, 2, lambda: done.append(None))
    assert len(done) == len(module._cases(s))


def test_a_process_may_say_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds, as every import of a verbose interpreter is."""
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    s = shapes(max_batch=1, num_spec=0)
    done: list[None] = []
    module._in_processes(s, 1, lambda: done.append(None))
    assert len(done) == len(module._cases(s))


def test_a_process_that_fails_is_heard() -> None:
    with pytest.raises(WarmupError, match=r"a worker process failed: (?s:.*)RuntimeError: .*nowhere"):
        module._in_processes(replace(shapes(), device="nowhere"), 1, lambda: None)


def test_the_cpu_has_nothing_to_compile() -> None:
    assert gd.warmup(CONFIG, device="cpu") == (0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "warmup: max_batch is 0; it must be at least 1"),
        ({"num_spec": -1}, "warmup: num_spec is -1; it must be at least 0"),
        ({"workers": -1}, "warmup: workers is -1; it must be at least 0"),
        ({"dtype": torch.int8}, "warmup: dtype is torch.int8; it must be bfloat16 or float16 or float32"),
        ({"state_dtype": torch.float64}, "warmup: state_dtype is torch.float64; it must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as found:
        gd.warmup(CONFIG, **options)
    assert str(found.value).startswith(message)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling needs a GPU")
def test_afterwards_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs  # noqa: PLC0415 (with a GPU only)

    gd.warmup(CONFIG, max_batch=4, num_spec=2, workers=2)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"]) and False)
    for case in module._cases(module._Shapes(
        CONFIG, torch.bfloat16, torch.float32, 4, 2, "cuda"
    )):  # fmt: skip
        case()
    pool = torch.zeros(9, 4, 32, 32, device="cuda")
    rows = {
        name: torch.randn(3, 1, heads, 32, device="cuda").bfloat16() for name, heads in (("q", 2), ("k", 2), ("v", 4))
    }
    gates: dict[str, Any] = {name: torch.randn(3, 1, 4, device="cuda").bfloat16() for name in ("a", "b")}
    gd.gated_delta_rule_decode_pretranspose(
        **rows, **gates, state=None, A_log=torch.zeros(4, device="cuda"), dt_bias=torch.zeros(4, device="cuda"),
        initial_state=pool, initial_state_indices=torch.arange(3, device="cuda", dtype=torch.int32),
    )  # fmt: skip
    by_plug_ins("cuda")
    assert compiled == []
