"""The plug-in for SGLang: every kind of batch through SGLang's own GDN backend, and what register() does.

Where SGLang's Python files are (scripts/test_sglang) with its loader, flags, backend, pools and metadata, elsewhere
with a small stand-in for them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fakes import sglang_real, sglang_stand_in
from gated_delta import reference
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.interop import sglang as plugin
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from helpers import normal, starts

REAL = find_spec("sglang") is not None
pytestmark = pytest.mark.filterwarnings("default" if REAL else "error")
SHAPE = GatedDeltaNetConfig(hidden_size=64, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=64)
DRAFTS = 3
ALL = {"linear_attn_backend": plugin.NAME}


@pytest.fixture(scope="module")
def sglang() -> Iterator[Any]:
    """Makes a backend; the plug-in was loaded before, as SGLang does it."""
    with pytest.MonkeyPatch.context() as patch:
        fake: Any = sglang_real if REAL else sglang_stand_in
        fake.install(patch)
        fake.load_plugins()
        yield fake


class Weights(NamedTuple):
    conv: Tensor
    bias: Tensor
    A_log: Tensor
    dt_bias: Tensor


@dataclass
class Request:
    """Inputs of one request, planned ahead, and what came out so far."""

    number: int
    qkv: Tensor
    a: Tensor
    b: Tensor
    done: int = 0
    outputs: list[Tensor] = field(default_factory=list)


class Engine:
    """One layer of SGLang's: steps over requests, whose outputs are judged in the end."""

    def __init__(self, sglang: Any, dtype: torch.dtype = torch.float32, drafts: int = 0, **flags: str) -> None:
        c, self.dtype = SHAPE, dtype
        self.weights = Weights(
            normal(c.conv_dim, c.conv_width, seed=1, dtype=dtype) / 2, normal(c.conv_dim, seed=2, dtype=dtype) / 4,
            torch.logspace(-1.3, 1.2, c.num_v_heads).log(), normal(c.num_v_heads, seed=3, dtype=dtype) - 2,
        )  # fmt: skip
        self.served = sglang.Backend(c, self.weights, dtype, drafts, flags or ALL)
        self.drafts, self.requests = drafts, list[Request]()
        for states in self.states:
            states[0] = torch.nan  # nothing that counts may depend on the slot of padding

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        return self.served.cache.conv[0], self.served.cache.temporal

    def add(self, tokens: int, seed: int | None = None) -> Request:
        number, c = len(self.requests) + 1, SHAPE
        qkv, a, b = (
            normal(tokens, size, seed=seed or number, dtype=self.dtype)
            for size in (c.conv_dim, c.num_v_heads, c.num_v_heads)
        )
        self.requests.append(Request(number, qkv, a, b))
        for states in self.states:
            states[number] = 0  # as SGLang does it when it gives a slot away
        return self.requests[-1]

    def step(self, kind: str, *moves: tuple[Request, int], padding: int = 0, **track: Any) -> None:
        """Rows of some tokens each, which are kept. Drafts behind them are rubbish; so are rows of padding."""
        rows = [self.drafts if kind == "verify" else count for _, count in moves]
        inputs = []
        for name in ("qkv", "a", "b"):
            parts = []
            for (request, count), length in zip(moves, rows, strict=True):
                whole = getattr(request, name)
                parts += [whole[request.done : request.done + count], whole.flip(0)[: length - count]]
            rubbish = padding * (self.drafts if kind == "verify" else 1)
            inputs.append(torch.cat([*parts, parts[0].new_full((rubbish, parts[0].shape[1]), torch.nan)]))
        known = [request.done for request, _ in moves]
        numbers = [request.number for request, _ in moves]
        output = self.served.forward(kind, *inputs, numbers, rows, known, padding, **track)
        for row, ((request, count), own) in enumerate(zip(moves, output[: sum(rows)].split(rows), strict=True)):
            request.outputs.append(own[:count])
            request.done += count
            if kind == "verify":
                cache = self.served.cache
                for states, after in zip(
                    self.states, (cache.intermediate_conv_window[0], cache.intermediate_ssm), strict=True
                ):
                    states[request.number] = after[row, count - 1]

    def evaluate(self, request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Outputs and the last state, token by token from nothing."""
        c, w, length = SHAPE, self.weights, request.done
        qkv, history = request.qkv[:length], torch.zeros(1, c.conv_width - 1, c.conv_dim)
        mixed = oracle.conv(qkv, w.conv, w.bias, history, starts([length]), "silu", dtype=dtype)
        mixed = mixed if dtype == torch.float64 else mixed.to(self.dtype).to(dtype)
        q, k, v = mixed[None].split([c.key_dim, c.key_dim, c.value_dim], -1)
        q, k = (reference.l2norm(x.unflatten(-1, (c.num_k_heads, c.head_k_dim))) for x in (q, k))
        alpha = reference.decay(w.A_log, request.a[None, :length], w.dt_bias, dtype=dtype)
        beta = reference.write_strength(request.b[None, :length], dtype=dtype)
        state = torch.zeros(1, c.num_v_heads, c.head_v_dim, c.head_k_dim, dtype=dtype)
        v = v.unflatten(-1, (c.num_v_heads, c.head_v_dim))
        output, state, _ = reference.recurrent(q, k, v, alpha, beta, c.head_k_dim**-0.5, state, dtype=dtype)
        return output[0], state[0]

    def assert_right(self) -> None:
        found = []
        for request in self.requests:
            given = torch.cat(request.outputs), self.states[1][request.number]
            both = (self.evaluate(request, dtype) for dtype in (torch.float32, torch.float64))
            found.append([*zip(given, *both, strict=True)])
            history = request.qkv[: request.done][-SHAPE.conv_width + 1 :].mT
            assert torch.equal(self.states[0][request.number][:, -history.shape[1] :], history)
        for name, parts in zip(("outputs", "states"), zip(*found, strict=True), strict=True):
            actual, plain, exact = (torch.cat([x.flatten() for x in kind]) for kind in zip(*parts, strict=True))
            assert_within_budget(name, actual, plain, exact)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def engine(
    sglang: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    made, module = list[Engine](), importlib.import_module(plugin.MODULE)
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(module, name, getattr(module, name))  # back to SGLang's own afterwards

    def make(drafts: int = 0, **flags: str) -> Engine:
        made.append(Engine(sglang, request.param, drafts, **flags))
        plugin.served.clear()
        return made[-1]

    with torch.inference_mode():
        yield make
    for one in made:
        one.served.close()


def test_extends_and_decodes(engine: Any) -> None:
    run = engine()
    a, b, c = (run.add(n) for n in (150, 40, 20))
    run.step("extend", (a, 70), (b, 5))
    run.step("extend", (a, 66), (c, 1), (b, 20))  # behind a prefix and without one; one token
    run.step("decode", (a, 1), (b, 1), (c, 1))
    run.step("decode", (c, 1), (a, 1))
    run.assert_right()
    assert +plugin.served == {"extend": 2, "decode": 2, "conv": 4}


def test_rows_that_pad_a_graph(engine: Any) -> None:
    run = engine()
    a, b = run.add(50), run.add(40)
    run.step("extend", (a, 30), (b, 8))
    before = [states.clone() for states in run.states]
    run.step("decode", (b, 1), (a, 1), padding=2)
    run.assert_right()
    for states, old in zip(run.states, before, strict=True):
        assert torch.equal(states[3:], old[3:])
        assert states[0].isnan().all()


def test_rows_in_the_slot_that_is_thrown_away(engine: Any) -> None:
    """Without a graph, rows that pad a batch share SGLang's slot 0, which is read and written."""
    run = engine()
    a, b = run.add(50), run.add(40)
    nobody = Request(0, a.qkv * torch.nan, a.a, a.b)
    run.step("extend", (a, 30), (b, 8))
    run.step("decode", (nobody, 1), (b, 1), (nobody, 1), (a, 1))
    run.assert_right()


def test_verification(engine: Any) -> None:
    run = engine(DRAFTS)
    a, b = run.add(60), run.add(40)
    run.step("extend", (a, 30), (b, 2))
    run.step("verify", (a, 1), (b, 3))
    run.step("verify", (b, 2), (a, 3), padding=1)
    run.step("decode", (b, 1), (a, 1))
    run.step("verify", (b, 3))
    run.assert_right()
    assert +plugin.served == {"extend": 1, "verify": 3, "decode": 1, "conv": 5}


@pytest.mark.parametrize("engine", [torch.float32], indirect=True, ids=["fp32"])
@pytest.mark.parametrize("case", ["other rows", "few rows"])
def test_states_after_drafts_go_to_the_rows_that_are_named(engine: Any, case: str) -> None:
    """Pipelines name rows; a batch that was padded beyond the pool lets rows of padding share the last one."""
    run, c = engine(DRAFTS), SHAPE
    rows = torch.tensor([4, 2, 0] if case == "other rows" else [0, 1, 1], dtype=torch.int32)
    slots = torch.tensor([2, 1, -1], dtype=torch.int32)
    states = normal(4, c.num_v_heads, c.head_v_dim, c.head_k_dim)
    kept = torch.full((5 if case == "other rows" else 2, DRAFTS, *states.shape[1:]), 7.0)
    q, k = (normal(1, 3 * DRAFTS, c.num_k_heads, c.head_k_dim, seed=seed) for seed in (1, 2))
    v = normal(1, 3 * DRAFTS, c.num_v_heads, c.head_v_dim, seed=3)
    a, b = (normal(3 * DRAFTS, c.num_v_heads, seed=seed) for seed in (4, 5))
    before = states.clone()
    output = run.served.dispatcher.verify_kernel.target_verify(
        A_log=run.weights.A_log, dt_bias=run.weights.dt_bias, q=q, k=k, v=v, a=a, b=b, ssm_states=states,
        cache_indices=slots, query_start_loc=starts([DRAFTS] * 3), intermediate_states_buffer=kept,
        intermediate_state_indices=rows, cache_steps=DRAFTS, retrieve_parent_token=None,
        stable_rows=case == "other rows",
    )  # fmt: skip
    assert torch.equal(states, before)
    q, k, v, a, b = (x.unflatten(0, (3, DRAFTS))[:2] for x in (q[0], k[0], v[0], a, b))
    plain, exact = (
        oracle.recurrent(q, k, v, states[[2, 1]], run.weights.A_log, a, run.weights.dt_bias, b, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget("output", output[0, : 2 * DRAFTS], plain.output.flatten(0, 1), exact.output.flatten(0, 1))
    if case == "other rows":
        assert_within_budget("kept", kept[[4, 2]], torch.stack(plain.kept, 1), torch.stack(exact.kept, 1))
        assert (kept[[1, 3]] == 7).all()
    else:
        assert_within_budget("kept", kept[:1], torch.stack(plain.kept, 1)[:1], torch.stack(exact.kept, 1)[:1])


def test_states_for_the_prefix_cache(engine: Any) -> None:
    """A prefill that ends inside a chunk leaves the state of its last whole chunk to others, who go on from there."""
    run = engine()
    a, b, prefix = run.add(40), run.add(200, seed=7), run.add(200, seed=7)
    run.step("extend", (a, 20))
    run.step("extend", (b, 150), (a, 20), track={b.number: (prefix.number, 150 if REAL else 128)})
    prefix.done = 128
    run.step("extend", (prefix, 30))
    prefix.outputs.insert(0, torch.cat(b.outputs)[:128])
    run.assert_right()
    assert +plugin.served == {"extend": 3, "conv": 3}


# --- flags ------------------------------------------------------------------------------------------------------------


def kernels(run: Engine) -> dict[str, bool]:
    """Which phases are ours."""
    phases = ("decode", "extend", "verify", "tree_verify")
    return {phase: isinstance(getattr(run.served.dispatcher, f"{phase}_kernel"), plugin._Kernel) for phase in phases}


@pytest.mark.parametrize("engine", [torch.float32], indirect=True, ids=["fp32"])
@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        ("", "decode extend verify"), ("triton", ""), ("triton decode", "decode verify"), ("triton prefill", "extend"),
        ("triton verify", "verify"), ("gated_delta not-verify", "decode extend"), ("gated_delta not-decode", "extend"),
    ],
)  # fmt: skip
def test_flags_choose_phases(engine: Any, flags: str, ours: str) -> None:
    base, _, phase = (flags or plugin.NAME).partition(" ")
    chosen = {"linear_attn_backend": base}
    if phase:
        name = f"linear_attn_{phase.removeprefix('not-')}_backend"
        chosen[name] = "triton" if phase.startswith("not-") else plugin.NAME
    module = importlib.import_module(plugin.MODULE)
    stock = module.causal_conv1d_fn, module.causal_conv1d_update
    run = engine(DRAFTS, **chosen)
    assert {phase for phase, served in kernels(run).items() if served} == set(ours.split())
    assert run.served.dispatcher.supports_packed_decode == ("decode" not in ours)
    assert (module.causal_conv1d_fn is not stock[0]) == ("extend" in ours)
    assert (module.causal_conv1d_update is not stock[1]) == ("decode" in ours or "verify" in ours)


@pytest.mark.parametrize("engine", [torch.float32], indirect=True, ids=["fp32"])
def test_a_tree_of_drafts_stays_with_sglang(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = importlib.import_module(plugin.MODULE), list[Any]()
    monkeypatch.setattr(module, "causal_conv1d_update", lambda *args, **named: calls.append((args, named)) or "stock")
    run = engine(DRAFTS)
    args = (1, 2, 3, None, "silu")
    named = {name: name for name in (
        "conv_state_indices", "intermediate_conv_window", "intermediate_state_indices", "retrieve_next_token",
        "retrieve_next_sibling", "retrieve_parent_token",
    )}  # fmt: skip
    assert module.causal_conv1d_update(*args, **named) == "stock"
    assert calls == [(args, named)]
    assert not kernels(run)["tree_verify"]
    assert not +plugin.served


@pytest.mark.parametrize("engine", [torch.float32], indirect=True, ids=["fp32"])
def test_a_line_in_the_log(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, plugin.__name__):
        engine()
    root = Path(__file__).parents[1]
    page = (root / "docs" / "integrate" / "sglang.md").read_text()
    (said,) = {message for message in caplog.messages if message.startswith("gated_delta")}
    assert said in page
    assert 'gated_delta = "gated_delta.interop.sglang:register"' in (root / "pyproject.toml").read_text()


def test_sglang_takes_the_flag(sglang: Any) -> None:
    choices = sglang.of("arg_groups.choices").LINEAR_ATTN_KERNEL_BACKEND_CHOICES
    assert choices.count(plugin.NAME) == 1
    plugin.register()  # SGLang may load it twice
    assert choices.count(plugin.NAME) == 1


@pytest.mark.skipif(not REAL, reason="needs SGLang's Python files: scripts/test_sglang")
def test_sglang_parses_the_flags(sglang: Any) -> None:
    parser = argparse.ArgumentParser()
    sglang.of("server_args").ServerArgs.add_cli_args(parser)
    flags = [f"--linear-attn-{phase}backend" for phase in ("", "decode-", "prefill-", "verify-")]
    given = parser.parse_args(["--model-path", "some", *(x for flag in flags for x in (flag, plugin.NAME))])
    assert {given.linear_attn_backend, given.linear_attn_verify_backend} == {plugin.NAME}


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0rc1", "1.0.0", "dev"])
def test_an_unknown_version_is_left_alone(sglang: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = sglang.of("arg_groups.choices")
    monkeypatch.setattr(choices, "LINEAR_ATTN_KERNEL_BACKEND_CHOICES", [])
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.warns(UserWarning, match=f"leaves SGLang {version} as it is: it was tested with 0.5.23"):
        plugin.register()
    assert choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES == []


def test_importing_loads_no_engine() -> None:
    program = (
        "import sys, gated_delta.interop.sglang; print({'sglang', 'vllm', 'transformers', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"
