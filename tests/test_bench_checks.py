"""Benchmarks: random inputs, the check before the time is taken, and the time itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gated_delta import reference
from gated_delta.bench import peers, timing
from gated_delta.bench.cases import Case, Heads
from gated_delta.bench.inputs import make_sets, nbytes
from gated_delta.testing import oracle
from gated_delta.testing.inputs import raw_gates
from helpers import DEVICE

CPU = torch.device("cpu")
SMALL = Heads(2, 4, 32, 64)
EVERY = [
    Case("prefill", "prefill", SMALL, sequences="70+3+130"),
    *(Case("decode", "decode", SMALL, form, batch=3, state="bf16") for form in ("V-major", "pool", "K-major")),
    *(Case("verify", "verify", SMALL, form, batch=3, tokens=4) for form in ("outputs", "final", "snapshots", "slots")),
    *(Case("conv", "conv", SMALL, form, batch=5) for form in ("update W", "update D")),
    Case("conv", "conv", SMALL, "prefill", sequences="9+1+20"),
    Case("norm", "norm", SMALL, batch=7),
    Case("step", "step", SMALL, batch=3, state="bf16"),
]


def named(case: Case) -> str:
    return f"{case.operation} {case.form}"


def log_decay(kind: str) -> Tensor:
    raw = raw_gates(kind, 500, 8)
    return reference.decay(raw["A_log"], raw["a"], raw["dt_bias"]).log()


def test_gates_are_what_they_are_called() -> None:
    assert log_decay("none").abs().max() < 1e-6
    weak = log_decay("weak")
    assert (weak.min().item(), weak.max().item()) == (pytest.approx(-0.05, abs=2e-3), pytest.approx(-0.005, abs=2e-3))
    mix = log_decay("mix")
    assert mix[:, 3::4].abs().max() < 1e-6
    expected = torch.nn.functional.logsigmoid(torch.randn(10**5)).mean().item() / 16
    assert mix[:, 0].mean().item() == pytest.approx(expected, rel=0.1)
    model = log_decay("model").mean(0)
    assert (model.diff() < 0).all()
    assert model[-1] / model[0] == pytest.approx(10**2.5, rel=0.3)


@pytest.mark.parametrize("case", EVERY, ids=named)
def test_sets_of_inputs(case: Case) -> None:
    one = make_sets(case, CPU, 0)
    assert len(one) == 1
    several = make_sets(case, CPU, 3 * nbytes(one[0]) - 1)
    assert len(several) == 3
    floats = [name for name, x in several[0].items() if isinstance(x, Tensor) and x.is_floating_point()]
    for name in floats:
        first, second = several[0][name], several[1][name]
        weight = name in ("weight", "A_log", "dt_bias")
        assert weight or first.data_ptr() != second.data_ptr()
        assert first.isnan().all() if name in ("output", "output_state", "intermediate_states_buffer") else first.any()
    for name in {"cu_seqlens", "state_indices", "initial_state_indices", "ssm_state_indices"} & {*several[0]}:
        assert several[0][name] is several[1][name]  # peers keep what they derive from these


@pytest.mark.parametrize("case", EVERY, ids=named)
def test_ours_is_right_and_anything_else_is_found_wrong(case: Case) -> None:
    inputs = make_sets(case, CPU, 0)[0]
    truth = peers.exact(case, inputs)
    bound = peers.ours(case, inputs)
    bound.call()
    results = bound.results()
    error, fault = peers.judge(truth, results)
    assert fault == ""
    assert error is not None and (0 < error < 1e-2 or case.operation in ("conv", "norm"))
    assert set(truth) == set(results)
    for name, x in results.items():
        others = {key: value for key, value in results.items() if key != name}
        for wrong in (x * 1.03, x.roll(1, 0), x[..., :-1]):
            assert peers.judge(truth, {**others, name: wrong})[1].startswith(f"{name}: relative error ")
        assert peers.judge(truth, others) == (None, f"it gives no {name}")
        broken = x.clone()
        broken[(-1,) * broken.dim()] = torch.nan
        assert peers.judge(truth, {**others, name: broken}) == (None, f"{name} is not finite")


@pytest.mark.parametrize("case", EVERY, ids=named)
def test_float64_by_parts_is_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_sets(case, CPU, 0)[0]
    whole = peers.exact(case, inputs)
    monkeypatch.setattr(oracle, "AT_ONCE", 1)
    for name, x in peers.exact(case, inputs).items():
        torch.testing.assert_close(x, whole[name])


def test_errors_of_another_shape_are_infinite() -> None:
    assert peers.relative_error(torch.ones(2), torch.ones(3)) == float("inf")


def test_a_step_by_separate_kernels_is_judged_too() -> None:
    case = Case("step", "step", SMALL, batch=3, state="bf16")
    inputs = make_sets(case, torch.device(DEVICE), 0)[0]
    truth, bound = peers.exact(case, inputs), peers.separate(case, inputs)
    assert bound is not None
    bound.call()
    assert peers.judge(truth, bound.results())[1] == ""
    assert peers.separate(Case("norm", "norm", SMALL, batch=7), inputs) is None


@pytest.mark.parametrize("part", ["", " core"])
@pytest.mark.parametrize("size", [{"batch": 2}, {"sequences": "9+4"}], ids=["decode", "prefill"])
def test_a_layer_is_not_judged_here(size: dict[str, Any], part: str) -> None:
    case = Case("layer", "layer", SMALL, ("prefill" if "sequences" in size else "decode") + part, **size)
    inputs = make_sets(case, CPU, 0)[0]
    assert peers.exact(case, inputs) == {}
    with torch.no_grad():
        bound = peers.ours(case, inputs)
        bound.call()
        assert peers.judge({}, bound.results()) == (None, "")
    assert nbytes(inputs) > sum(p.nbytes for p in inputs["layer"].parameters())


def test_spread() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 100.0]) == (6.0, 2.0, 10.0)
    assert timing.spread([5.0]) == (5.0, 5.0, 5.0)


def test_contenders_take_turns_and_times_are_those_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", {"cpu": 0.05})
    said: list[str] = []
    slow, fast = (timing.timer([lambda s=s: time.sleep(s)], CPU) for s in (8e-3, 2e-3))
    found = timing.in_turns({"slow": slow, "fast": fast}, CPU, said.append)
    assert said == ["slow", "fast"] * (timing.LEAST_REPLAYS + 1)
    assert 8e3 < found["slow"].us < 24e3
    assert 2e3 < found["fast"].us < 8e3


def test_host_times() -> None:
    assert 1e3 < timing.host(lambda: time.sleep(1e-3))() < 4e3


class FakeGraph:
    """Stands in for a CUDA graph: what is called while it is captured is what a replay runs."""

    capturing: list[str] | None = None
    log: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.calls: list[str] = []

    def replay(self) -> None:
        FakeGraph.log.append(f"replay of {len(self.calls)}")


class FakeEvent:
    """Ten microseconds pass between two events, 300 once a graph has run."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self) -> None:
        self.at = len(FakeGraph.log)
        FakeGraph.log.append("event")

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, last: FakeEvent) -> float:
        return 0.3 if any(entry.startswith("replay") for entry in FakeGraph.log[self.at : last.at]) else 0.03


@contextmanager
def fake_capture(graph: FakeGraph) -> Iterator[None]:
    FakeGraph.capturing = graph.calls
    yield
    FakeGraph.capturing = None


@pytest.mark.parametrize(("sets", "calls"), [(1, 101), (7, 101), (150, 150)])
def test_a_graph_goes_round_the_sets(monkeypatch: pytest.MonkeyPatch, sets: int, calls: int) -> None:
    FakeGraph.log = []
    for name, fake in (
        ("CUDAGraph", FakeGraph), ("Event", FakeEvent), ("graph", fake_capture),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    captured: list[int] = []

    def call(i: int) -> None:
        if FakeGraph.capturing is not None:
            FakeGraph.capturing.append(str(i))
            captured.append(i)

    # Three calls take 30 us when launched alone, so 1000 us need 101.
    timer = timing.timer([lambda i=i: call(i) for i in range(sets)], torch.device("cuda"))
    count = 101 if sets >= 3 else 34
    calls = max(count, calls if sets > 101 else count)
    assert captured == [i % sets for i in range(calls)]
    FakeGraph.log.clear()
    assert timer() == pytest.approx(300 / calls)
    lead = f"replay of {calls}"
    assert FakeGraph.log == [lead, "event", lead, "event"]  # the first hides the launch of the second
