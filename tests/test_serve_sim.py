"""The script that serves a trace: what a step holds, what comes out for a request, whose kernels served."""

from __future__ import annotations

import copy
import csv
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.autograd.profiler_util import FunctionEvent

import serve_sim
from gated_delta.bench import peers
from gated_delta.bench.cases import Case
from gated_delta.errors import OptionError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from serve_sim import Move, Request, Settings, Simulation, Swap

TRACE = serve_sim.random_trace(9, 0.4, 30, 8, seed=3)
SMALL: dict[str, Any] = {"budget": 40, "batch": 5}


def peer(case: Case, x: dict[str, Any]) -> peers.Bound:
    """An adapter of an implementation that is not ours: the rule token by token in fp32."""
    names = ("q", "k", "v", *(("beta", "initial_state", "cu_seqlens") if case.operation == "prefill" else "ab"))
    given = {name: x[name] for name in names}

    def step() -> oracle.Evaluation:
        found = oracle.recurrent(**given, state=x["state"], A_log=x["A_log"], dt_bias=x["dt_bias"], dtype=torch.float32)
        x["state"].copy_(found.state)
        return found

    call = partial(oracle.prefill, **given, g=x["g"], dtype=torch.float32) if case.operation == "prefill" else step
    return peers.returning(call, lambda output, state, _: {"output": output, "state": state})


@pytest.fixture(autouse=True)
def a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that the package knows, ``a peer``."""
    real = peers.bind
    monkeypatch.setattr(peers, "bind", lambda name, case, x: peer(case, x) if name == "a peer" else real(name, case, x))


class Watched(Simulation):
    """Keeps what came out for every request, and checks what no step may exceed."""

    def __init__(self, trace: list[Request], swap: Swap | None = None, **settings: Any) -> None:
        layers = serve_sim.stack("tiny", None, "cpu", swap)
        super().__init__(layers, trace, Settings(**{**SMALL, **settings}), self.watch)
        self.outputs: dict[int, list[Tensor]] = {}
        self.steps: list[list[tuple[int, int, int]]] = []

    def watch(self, moves: list[Move], output: Tensor) -> None:
        assert sum(move.tokens for move in moves) == len(output) <= self.settings.budget
        assert 0 < len(moves) <= self.settings.batch
        assert all(move.running.request.arrival <= self.now for move in moves)
        self.steps.append([(move.running.number, move.tokens, move.kept) for move in moves])
        for move, own in zip(moves, output.split([move.tokens for move in moves]), strict=True):
            self.outputs.setdefault(move.running.number, []).append(own[: move.kept])


def evaluated(layers: Sequence[GatedDeltaNetAttention], hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A sequence through the stack token by token, from nothing."""
    hidden = hidden.to(dtype)
    for layer in layers:
        own = copy.deepcopy(layer).to(dtype)
        normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])
        hidden = hidden + own.evaluate(normed[None], token_by_token=True, dtype=dtype)[0]
    return hidden


def test_a_seed_is_a_trace() -> None:
    assert serve_sim.random_trace(9, 0.4, 30, 8, seed=3) == TRACE
    assert serve_sim.random_trace(9, 0.4, 30, 8, seed=4) != TRACE
    many = serve_sim.random_trace(4000, 20.0, 300, 80, seed=0)
    assert many == sorted(many)
    assert many[-1].arrival == pytest.approx(200, rel=0.1)
    for name, median in (("prompt", 300), ("output", 80)):
        lengths = sorted(getattr(request, name) for request in many)
        assert lengths[2000] == pytest.approx(median, rel=0.1)
        assert lengths[0] >= 1 and lengths[-1] > 4 * median


@pytest.mark.parametrize("swap", [None, "a peer"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_every_request_is_served_as_if_alone(drafts: int, swap: str | None) -> None:
    """All of its tokens come out, once each and right, whatever else is in the batch and whoever serves the rule."""
    swapped = None if swap is None else Swap(swap)
    served = Watched(TRACE, swapped, drafts=drafts)
    found = served.run()
    assert not served.running and served.pool.free_slots == served.pool.slots
    assert found["steps"] == len(served.steps)
    assert max(map(len, served.steps)) > 3
    rejected = sum(tokens - kept for step in served.steps for _, tokens, kept in step)
    assert (rejected > 0) == (drafts > 0)
    rows: list[list[Tensor]] = [[], [], []]
    for number, (_, prompt, output) in enumerate(TRACE):
        ids = (7919 * number + torch.arange(prompt + output - 1)) % serve_sim.EMBEDDINGS
        hidden = served.embeddings[ids]
        actual = torch.cat(served.outputs[number])
        assert len(actual) == len(hidden)
        plain, exact = (evaluated(served.layers, hidden, dtype) for dtype in (torch.float32, torch.float64))
        for kept, x in zip(rows, (actual, plain, exact), strict=True):
            kept.append(x)
    assert_within_budget("outputs", *map(torch.cat, rows))
    number = 4
    alone = Watched([TRACE[number]], swapped, drafts=drafts)
    alone.waiting = deque([(number, TRACE[number])])
    alone.run()
    torch.testing.assert_close(
        torch.cat(alone.outputs[number]), torch.cat(served.outputs[number]), rtol=1e-4, atol=1e-4
    )
    if swapped is not None:
        assert swapped.served["prefill by a peer"] > 0
        assert (swapped.served["decode by a peer"] > 0) == (drafts == 0)
        assert not any(peers.OURS in who for who in swapped.served)


def test_steps_are_the_same_with_anybodys_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer without a decode leaves it to our fused step from the second call on."""
    monkeypatch.setattr(peers, "bind", lambda name, case, x, bind=peers.bind: (
        None if name != peers.OURS and case.operation == "decode" else bind(name, case, x)
    ))  # fmt: skip
    swap = Swap("a peer")
    ours, swapped = Watched(TRACE), Watched(TRACE, swap)
    ours.run()
    swapped.run()
    assert ours.steps == swapped.steps
    steps = sum(any(tokens == 1 for _, tokens, _ in step) for step in ours.steps)
    assert swap.served["decode by gated-delta"] == 2 * steps
    assert "decode by a peer" not in swap.served
    again = Watched(TRACE, seed=1, drafts=2, acceptance=0.0)
    again.run()
    assert all(kept in (1, tokens) for step in again.steps for _, tokens, kept in step)
    assert len(again.steps) >= len(ours.steps)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """How often the parts' functions were called in steps that were profiled, and how many ranges there were."""
    calls, ranges = Counter[str](), Counter[str]()

    def counted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            calls[part] += _profiler_enabled()
            return function(*args, **kwargs)

        return count

    for room in (sys.modules[GatedDeltaNetAttention.__module__], serve_sim):
        for name in serve_sim.MARKED.keys() & vars(room):
            monkeypatch.setattr(room, name, counted(serve_sim.MARKED[name], vars(room)[name]))

    def parts(profiler: Any, real: Any = serve_sim.parts) -> Counter[str]:
        ranges.update(event.name for event in profiler.events() if event.name in serve_sim.MARKED.values())
        return real(profiler)

    monkeypatch.setattr(serve_sim, "parts", parts)
    return calls, ranges


@pytest.mark.parametrize("swap", [None, "a peer"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_parts_of_a_step(
    drafts: int, swap: str | None, ran: tuple[Counter[str], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that ran is among them, whoever serves the rule."""
    monkeypatch.setattr(serve_sim, "PROFILED", 2)
    served = Watched(TRACE[:4], None if swap is None else Swap(swap), drafts=drafts)
    found = served.run()
    assert served.profiled == len(served.steps) // 2
    timed = served.steps[::2]
    assert served.tokens == sum(kept for step in timed for _, _, kept in step)
    parts = {name.removesuffix(" us"): us for name, us in found.items() if name.endswith(" us")}
    expected = {"projections", "convolution", "gates", "rule", "norm", "other"}
    expected |= {"fused step"} if swap is None or drafts else set()
    assert set(parts) == expected | ({"translation"} if swap else set())
    assert all(us > 0 for us in parts.values())
    assert 0 < found["p50 ms"] <= found["p99 ms"]
    calls, ranges = ran
    if swap:  # by a range, not by a function
        assert ranges.pop("rule") > 0
    assert calls == ranges
    assert set(calls) == (expected - {"projections", "other"} - ({"rule"} if swap else set()))


def test_a_kernel_counts_where_it_was_launched() -> None:
    """Ours have no operator of torch's around them, and share numbers with operators that have nothing to do with them.
    The threads of launches are other numbers, too.
    """

    def event(name: str, start: float, end: float, above: FunctionEvent | None = None, **more: Any) -> FunctionEvent:
        made = FunctionEvent(**{"id": 0, "name": name, "thread": 1, "start_us": start, "end_us": end, **more})
        if above is not None:
            made.set_cpu_parent(above)
        return made

    def work(number: int, us: float, name: str = "kernel", **more: Any) -> FunctionEvent:
        return event(name, 200 + number, 200 + number + us, id=number, device_type=DeviceType.CUDA, **more)

    step = event("step", 0, 100, id=1)
    linear, rule = event("aten::linear", 1, 10, step, id=7), event("rule", 50, 70, step, id=5)
    host = [
        step, linear, event("cudaLaunchKernel", 4, 5, linear, id=40), event("fused step", 20, 40, step, id=2),
        event("cuLaunchKernelEx", 25, 26, id=7, thread=9), rule, event("norm", 55, 65, rule, id=6),
        event("cuLaunchKernelEx", 60, 61, id=8, thread=9), event("cudaMemcpyAsync", 80, 81, step, id=9),
    ]  # fmt: skip
    device = [work(40, 3), work(7, 5), work(2, 5, "fused step", is_user_annotation=True), work(8, 4), work(9, 2)]
    given: Any = SimpleNamespace(events=lambda: [*host, *device, work(99, 1)])
    expected = {"projections": 3, "fused step": 5, "rule": 4, "other": 2, "unknown": 1}
    assert serve_sim.parts(given) == expected


def test_late_requests_are_waited_for() -> None:
    served = Watched([Request(0.0, 3, 2), Request(100.0, 3, 2)])
    served.run()
    assert [[number for number, _, _ in step] for step in served.steps] == [[0], [0], [1], [1]]


def test_a_trace_from_a_file(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Request._fields)
        writer.writerows(TRACE[::-1])
    assert serve_sim.read_trace(tmp_path / "x.csv") == TRACE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival,prompt,output\n0,1,1\n1,x,1\n", "a.csv, row 2, column prompt is 'x'; it must be a whole number of"),
        ("arrival,prompt,output\n0,1,0\n", "row 1, column output is '0'; it must be a whole number of at least 1"),
        ("arrival,prompt\n0,1\n", "row 1, column output is None; it must be a whole"),
        ("arrival,prompt,output\nnan,1,1\n", "row 1, column arrival is 'nan'; it must be a number of at least 0"),
        ("arrival,prompt,output\n-1,1,1\n", "row 1, column arrival is '-1'"),
        (None, "it must be a CSV file"),
    ],
)  # fmt: skip
def test_a_broken_trace_is_one_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "a.csv").write_text(text)
    with pytest.raises(OptionError) as found:
        serve_sim.read_trace(tmp_path / "a.csv")
    assert message in str(found.value)


def test_a_budget_without_room() -> None:
    with pytest.raises(OptionError, match="budget is 14; it must be at least 15, a token and its drafts of each of 5"):
        Settings(**{**SMALL, "budget": 14, "drafts": 2})


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["serve_sim.py", "tiny", "--device", "cpu", *words])
    with pytest.raises(SystemExit) as ended:
        serve_sim.main()
    return ended.value.code


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that raises costs its own line."""
    monkeypatch.setattr(
        peers, "choose", lambda words, device: ([peers.OURS, "fla", "transformers"], {"flashqla": "absent"})
    )

    def bind(name: str, case: Any, x: Any, real: Any = peers.bind) -> Any:
        if name == "fla":
            raise RuntimeError("on purpose")
        return real("a peer" if name == "transformers" else name, case, x)

    monkeypatch.setattr(peers, "bind", bind)
    (tmp_path / "trace.csv").write_text("arrival,prompt,output\n0,20,20\n1.5,5,4\n")
    words = ("--trace", str(tmp_path / "trace.csv"), "--layers", "1", "--out", str(tmp_path / "o"))
    assert not command(monkeypatch, *words)
    assert "on purpose" in capsys.readouterr().out
    with (tmp_path / "o" / "serve-sim.csv").open() as file:
        ours, broken, swapped = csv.DictReader(file)
    assert (ours["rule by"], ours["requests"], ours["layers"]) == ("gated-delta", "2", "1")
    assert ours["steps"] == swapped["steps"] == "20"
    assert float(ours["tokens/s"]) > 0 and ours["failed"] == ours["calls"] == ""
    assert broken["failed"] == "RuntimeError: on purpose"
    assert "decode by transformers" in swapped["calls"]


def test_a_command_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in ((("--budget", "3"), "budget is 3"), (("--state", "fp8"), "--state is 'fp8'")):
        assert message in str(command(monkeypatch, *words))
