"""Benchmarks from the inside: what is measured, floors, inputs, checks, timing, rows, comparison, adapters."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta import reference
from gated_delta.bench import cases, check, compare, floors, machine, peers, records, report, soak, timing, worker
from gated_delta.bench.cases import Case, Heads, Selection
from gated_delta.bench.inputs import gates, make_sets, nbytes
from gated_delta.bench.inputs import Maker as make_maker
from gated_delta.bench.records import Row
from gated_delta.errors import OptionError

CPU = torch.device("cpu")
SMALL = Heads(2, 4, 32, 64)
H200 = floors.Ceilings(read=4.39e12, write=4.7e12, in_place=4.13e12, product=780e12, smallest=1.14)
DECODES = [Case("decode", "decode", SMALL, form, batch=3, state="bf16") for form in cases.FORMS["decode"]]
VERIFIES = [Case("verify", "verify", SMALL, form, batch=3, tokens=4) for form in cases.FORMS["verify"]]
PREFILL = Case("prefill", "prefill", SMALL, sequences="70+3+130")
AROUND = [
    *(Case("conv", "conv", SMALL, form, batch=5) for form in ("update W", "update D")),
    Case("conv", "conv", SMALL, "prefill", sequences="9+1+20"),
    Case("norm", "norm", SMALL, batch=7),
]
EVERY = [PREFILL, *DECODES, *VERIFIES, *AROUND]


def named(case: Case) -> str:
    return f"{case.operation} {case.form}"


# --- cases ------------------------------------------------------------------------------------------------------------


def test_the_default_prefill_cases_are_the_51_of_the_published_table() -> None:
    found = cases.select(Selection(groups=["prefill"]))
    assert len(found) == len(set(found)) == 51
    assert {str(case.heads) for case in found} == {"2/8", "4/16", "16/32", "16/48", "16/64"}
    largest = [case for case in found if case.heads.hv > 32]
    assert max(sum(case.lengths) for case in largest) == 32768
    assert {case.sequences for case in found if case.heads.hv <= 32} == set(cases.SEQUENCES)


def test_every_group_has_cases_and_quick_has_fewer() -> None:
    for group in cases.GROUPS:
        full, quick = (cases.select(Selection(groups=[group], quick=quick)) for quick in (False, True))
        assert full
        assert {case.group for case in full} == {group}
        assert len(quick) < len(full) or group in ("conv", "norm", "host", "layer")
    assert "layer" not in cases.DEFAULT_GROUPS


def test_small_cases_stay_small() -> None:
    for case in cases.select(Selection(groups=cases.GROUPS, small=True)):
        assert case.heads == Heads(2, 4)
        assert sum(case.lengths) <= 512


def test_a_selection_is_obeyed() -> None:
    chosen = Selection(
        groups=["decode", "verify"], heads=[SMALL], batches=[5], tokens=[3], states=["fp16"], gates=["none", "weak"]
    )
    found = cases.select(chosen)
    assert {(case.heads, case.batch, case.state) for case in found} == {(SMALL, 5, "fp16")}
    assert {case.tokens for case in found if case.group == "verify"} == {3}
    assert {case.gates for case in found} == {"none", "weak"}
    assert {case.form for case in found if case.group == "decode"} == {"pool", "K-major"}
    prefills = cases.select(Selection(groups=["prefill"], heads=[Heads(16, 64)], sequences=["1x131072"]))
    assert [case.name for case in prefills] == ["16/64 1x131072"]  # left out unless it is asked for
    slots = cases.select(Selection(groups=["verify"], tokens=[1]))
    assert {case.form for case in slots} == {"outputs", "final", "snapshots"}


@pytest.mark.parametrize(
    ("word", "lengths"),
    [("1x2048", (2048,)), ("2048x4", (2048,) * 4), ("64x256", (64,) * 256), ("28672+4096", (28672, 4096)), ("7", (7,))],
)
def test_sequences(word: str, lengths: tuple[int, ...]) -> None:
    assert cases.parse_sequences(word) == lengths


def test_ragged_mixes_have_names() -> None:
    for name in cases.RAGGED:
        assert len(set(cases.parse_sequences(name))) > 8


@pytest.mark.parametrize(
    ("word", "heads"),
    [("16/32", Heads(16, 32)), ("30/30", Heads(30, 30, 96, 192)), ("2/4@64/32", Heads(2, 4, 64, 32)),
     ("30/30@128/128", Heads(30, 30)), ("3/6", Heads(3, 6))],
)  # fmt: skip
def test_heads(word: str, heads: Heads) -> None:
    assert cases.parse_heads(word) == heads
    assert cases.parse_heads(str(heads)) == heads or heads == Heads(30, 30)


def test_cases_survive_the_way_to_the_worker() -> None:
    for case in EVERY:
        assert Case.load(case.dump()) == case


# --- floors -----------------------------------------------------------------------------------------------------------


def test_the_floor_of_a_long_prefill_is_its_products() -> None:
    needed = floors.work(Case("prefill", "prefill", Heads(2, 8), sequences="1x2048"))
    chunk = 2 * 2 * 64 * 64 * 128 + 64**3 // 3 + 3 * 2 * 64 * 128 * 128 + 2 * 2 * 64 * 64 * 128
    assert chunk == pytest.approx(10.57e6, rel=1e-3)  # as counted for 128 x 128
    assert needed.operations == chunk * 8 * 32
    assert floors.floor(needed, H200) == pytest.approx(3.47, abs=0.01)
    ragged = floors.work(Case("prefill", "prefill", Heads(2, 8), sequences="1+64+65"))
    assert ragged.operations == chunk * 8 * (1 + 1 + 2)


def test_the_floor_of_many_short_prefills_is_their_traffic() -> None:
    needed = floors.work(Case("prefill", "prefill", Heads(2, 8), sequences="64x256"))
    tokens, states = 64 * 256, 256 * 8 * 128 * 128 * 4
    assert needed.read == tokens * ((2 * 2 + 8) * 128 * 2 + 8 * 2 * 4) + states
    assert needed.written == tokens * 8 * 128 * 2 + states
    seconds = 2 * needed.written / 4.13e12 + (needed.read - needed.written) / 4.39e12
    assert floors.floor(needed, H200) == pytest.approx(seconds * 1e6)
    assert floors.floor(needed, H200) == pytest.approx(84.1, rel=0.03)  # of the table, which has 4.2 TB/s throughout


@pytest.mark.parametrize(("state", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_floor_of_decode_is_its_states_twice(state: str, size: int) -> None:
    needed = floors.work(Case("decode", "decode", Heads(16, 32), "V-major", batch=64, state=state))
    states = 64 * 32 * 128 * 128 * size
    assert needed.read - states == 64 * ((2 * 16 + 32) * 128 + 2 * 32) * 2
    assert needed.written - states == 64 * 32 * 128 * 2
    assert floors.floor(needed, H200) == pytest.approx(2 * states / 4.13e6, rel=0.03)
    alone = floors.work(Case("decode", "decode", Heads(2, 8), "V-major", batch=1, state=state))
    assert floors.floor(alone, H200) == 1.14  # no kernel is shorter


@pytest.mark.parametrize(("form", "written"), [("outputs", 0), ("final", 1), ("snapshots", 4), ("slots", 4)])
def test_what_a_verification_writes(form: str, written: int) -> None:
    needed = floors.work(Case("verify", "verify", Heads(16, 32), form, batch=8, tokens=4))
    states, outputs = 8 * 32 * 128 * 128 * 4, 8 * 4 * 32 * 128 * 2
    assert needed.written == outputs + written * states
    assert states < needed.read < 1.1 * states


def test_the_work_around_the_rule() -> None:
    channels = 2 * 16 * 128 + 32 * 128
    update = floors.work(Case("conv", "conv", Heads(16, 32), "update W", batch=64))
    assert update == (64 * channels * 8, 64 * channels * 8, 0)
    norm = floors.work(Case("norm", "norm", Heads(16, 32), batch=64))
    assert norm == (2 * 64 * 32 * 128 * 2, 64 * 32 * 128 * 2, 0)
    layer = floors.work(Case("layer", "layer", Heads(16, 32), "decode", batch=8))
    weights = 2048 * (channels + 2 * 32 * 128 + 2 * 32)
    assert layer.operations == 2 * 8 * weights
    assert layer.read == 2 * weights + 8 * (2048 * 2 + 32 * 128 * 128 * 4 + channels * 6)


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", {"cpu": 0.02})
    ceilings, found = floors.measure(CPU)
    assert all(value > 0 for value in ceilings)
    assert {row.name for row in found} >= {"product", "smallest", "read", "write", "in-place 32 MiB"}
    assert ceilings.read == max(row.rate for row in found if row.name == "read")


# --- inputs and checks ------------------------------------------------------------------------------------------------


def log_decay(kind: str) -> Tensor:
    raw = gates(make_maker(CPU), kind, 500, 8, dtype=torch.float32)
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
        assert first.isnan().all() if name in ("output", "output_state", "snapshots") else first.any()
    for name in {"cu_seqlens", "slots", "token_slots"} & {*several[0]}:
        assert several[0][name] is several[1][name]  # peers keep what they derive from these


@pytest.mark.parametrize("case", EVERY, ids=named)
def test_ours_is_right_and_anything_else_is_found_wrong(case: Case) -> None:
    inputs = make_sets(case, CPU, 0)[0]
    truth = check.exact(case, inputs)
    (contender,) = peers.load("ours").contenders(case)
    bound = contender.bind(inputs)
    bound.call()
    results = bound.results()
    verdict = check.judge(truth, results, None)
    assert verdict.ok, verdict
    assert 0 < verdict.error < 1e-2 or case.operation in ("conv", "norm")
    assert truth is not None and set(truth.results) == set(results)
    for name, x in results.items():
        others = {key: value for key, value in results.items() if key != name}
        assert not check.judge(truth, {**others, name: x * 1.03}, None).ok
        assert not check.judge(truth, {**others, name: x.roll(1, 0)}, None).ok
        assert not check.judge(truth, others, None).ok
        broken = x.clone()
        broken.flatten()[-1] = torch.nan
        assert check.judge(truth, {**others, name: broken}, None).words == f"{name} is not finite"


def test_what_float64_does_not_see_is_compared_with_a_right_one() -> None:
    case = Case("prefill", "prefill", Heads(4, 4, 32, 32), sequences="50+20")
    inputs = make_sets(case, CPU, 0)[0]
    truth = check.exact(case, inputs)
    assert truth is not None and truth.part is not None and truth.part[1].tolist() == [0, 3]
    bound = peers.load("ours").contenders(case)[0].bind(inputs)
    bound.call()
    right = {name: x.clone() for name, x in bound.results().items()}
    right["output"][:, 1] *= 1.5
    assert check.judge(truth, bound.results(), None).ok
    verdict = check.judge(truth, bound.results(), right)
    assert not verdict.ok
    assert verdict.words.startswith("output against a contender that is right: error ")


def test_errors_of_another_shape_are_infinite() -> None:
    assert check.relative_error(torch.ones(2), torch.ones(3)) == float("inf")


def test_a_layer_is_not_judged_here() -> None:
    case = Case("layer", "layer", SMALL, "decode", batch=2)
    inputs = make_sets(case, CPU, 0)[0]
    assert check.exact(case, inputs) is None
    found = peers.load("ours").contenders(case)
    assert [c.name for c in found] == [peers.OURS, *(f"of it: {part}" for part in ("products", "conv", "conv + rule", "norm"))]
    with torch.no_grad():
        for contender in found:
            bound = contender.bind(inputs)
            bound.call()
            assert check.judge(None, bound.results(), None).ok
    assert nbytes(inputs) > sum(p.nbytes for p in inputs["layer"].parameters())


# --- timing -----------------------------------------------------------------------------------------------------------


def test_spread() -> None:
    found = timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 100.0], 3)
    assert found == (6.0, 2.0, 10.0, 11, 3)


def test_contenders_take_turns_and_times_are_those_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", {"cpu": 0.05})
    said: list[str] = []
    slow, fast = (timing.Timer([lambda s=s: time.sleep(s)] * 2, CPU) for s in (4e-3, 1e-3))
    found = timing.in_turns({"slow": slow, "fast": fast}, CPU, said.append)
    assert said == ["slow", "fast"] * (timing.LEAST_REPLAYS + 1)
    assert 4e3 < found["slow"].median < 12e3
    assert 1e3 < found["fast"].median < 4e3
    assert found["slow"].replays == timing.LEAST_REPLAYS
    assert found["slow"].calls == 2


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timing.host(lambda: time.sleep(1e-3), CPU)
    assert 1e3 < found.median < 4e3
    assert found.calls > 5


class FakeGraph:
    """Stands in for a CUDA graph: what is called while it is captured is what a replay runs."""

    capturing: list[str] | None = None
    log: list[str] = []

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
        ("CUDAGraph", FakeGraph), ("Event", FakeEvent), ("graph", fake_capture), ("synchronize", lambda: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    captured: list[int] = []

    def call(i: int) -> None:
        if FakeGraph.capturing is not None:
            FakeGraph.capturing.append(str(i))
            captured.append(i)

    # Three calls take 30 us when launched alone, so 1000 us need 101.
    timer = timing.Timer([lambda i=i: call(i) for i in range(sets)], torch.device("cuda"))
    count = 101 if sets >= 3 else 34
    assert timer.calls == max(count, calls if sets > 101 else count)
    assert captured == [i % sets for i in range(timer.calls)]
    FakeGraph.log.clear()
    assert timer.replay() == pytest.approx(300 / timer.calls)
    lead = f"replay of {timer.calls}"
    assert FakeGraph.log == [lead, "event", lead, "event"]  # the first hides the launch of the second


# --- rows and tables --------------------------------------------------------------------------------------------------


def row(case: str, contender: str = peers.OURS, us: float | None = 10.0, **facts: Any) -> Row:
    return Row("prefill", case, contender, us=us, **facts)


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [
        row("a, with a comma", us=1.25, p10=1.0, tokens=7, note='said "no"\nand left', error=1.5e-3, bytes=2**40),
        row("b", "fla", us=None, status="crashed"),
    ]
    records.write(tmp_path / "x.csv", rows)
    assert records.read(tmp_path / "x.csv") == rows


@pytest.mark.parametrize(
    ("text", "was"),
    [("a,b\n1,2\n", "unexpected keyword"), ("group,case,contender,us\ng,c,x,fast\n", "could not convert")],
)
def test_another_csv_is_refused(tmp_path: Path, text: str, was: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(OptionError, match=was) as caught:
        records.read(tmp_path / "x.csv")
    assert "it must be a CSV that gated-delta bench wrote" in str(caught.value)


def test_the_best_peer() -> None:
    rows = [row("a"), row("a", "fla", 40.0), row("a", "flashinfer", 15.0), row("a", "of it: norm", 1.0)]
    ours, *others = records.with_best_peer([*rows, row("a", "flashqla", None, status="wrong")], peers.OURS)
    assert (ours.best_peer, ours.speedup) == ("flashinfer", 1.5)
    assert all(other.speedup is None for other in others)
    assert records.with_best_peer(rows[:1], peers.OURS) == rows[:1]


def test_the_summary_says_where_we_lose() -> None:
    rows = [
        row("good", us=10, over_floor=2.0, speedup=4.0), row("bad", us=10, over_floor=8.0, speedup=0.5),
        row("alone", us=10, over_floor=4.0),
    ]  # fmt: skip
    assert report.summary(rows) == (
        "4.00 times the floor (geometric mean of 3); worst 8.00 in bad; "
        "1.41 times as fast as the best peer (geometric mean of 2); worst 0.50 in bad; "
        "slower than a peer in 1 of 2 cases"
    )


def test_units() -> None:
    assert report.rate(4.125, None) == "4.12 TB/s"
    assert report.rate(0.012, None) == "12 GB/s"
    assert report.rate(0.5, 455.0) == "455 TFLOP/s"
    assert report.rate(None, None) == ""


def test_a_comparison_finds_what_got_slower() -> None:
    before = [row("same", us=100), row("slow", us=100), row("fast", us=100), row("short", us=2), row("gone", us=5)]
    after = [row("same", us=101), row("slow", us=130), row("fast", us=50), row("short", us=3), row("new", us=5)]
    before = [replace(each, commit="aaa", device="GPU") for each in before]
    after = [replace(each, commit="bbb", device="GPU") for each in after]
    found = compare.compare(before, after)
    assert [change.after.case for change in found.changes] == ["short", "slow", "same", "fast"]
    assert found.differing == {"commit": ("aaa", "bbb")}
    assert compare.table(found, 0.03).row_count == 3
    assert compare.words(found, 0.03) == [
        "commit: aaa before, bbb after",
        "only before: 1 times, such as prefill gone (gated-delta)",
        "only after: 1 times, such as prefill new (gated-delta)",
        "gated-delta: 2 of 4 cases slower by more than 3%, 1 faster; geometric mean -0.4 %",
        "largest change of a case over 20 us: -50.0 % (prefill fast)",
    ]


def test_a_comparison_of_nothing() -> None:
    found = compare.compare([row("a", us=None, status="failed")], [row("a")])
    assert found.changes == []
    assert compare.words(found, 0.03)[-1] == "no case of gated-delta was timed in both"


def test_facts_of_this_machine() -> None:
    found = machine.facts("cpu")
    assert found["torch"] == torch.__version__
    assert "CPU" in found["device"]
    assert set(found) <= {field for field in Row.__dataclass_fields__}
    assert machine.sample("1980, 312.45\n") == {"sm_mhz": 1980.0, "watts": 312.45}
    assert machine.sample("[N/A], 75") == {"watts": 75.0}


def test_soak_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = soak.soak(40, CPU)
    assert (found.calls, found.faults, found.leaks) == (40, [], False)
    monkeypatch.setattr(gd, "rms_norm_gated", lambda x, z, weight, eps: x)
    monkeypatch.setattr(gd, "causal_conv1d", lambda *args, **options: 1 / 0)
    grown = iter((100.0, 1000.0))
    monkeypatch.setattr(soak, "memory_mib", lambda device: next(grown))
    told: list[str] = []
    worse = soak.soak(40, CPU, tell=told.append)
    assert worse.faults == told
    assert {fault.split(", ")[1].split()[0] for fault in told} == {"norm", "conv"}
    assert any("ZeroDivisionError" in fault for fault in told)
    assert worse.leaks
    assert worse.words().startswith(f"40 calls on cpu: {len(told)} wrong; memory grew by 900.0 MiB")


# --- adapters ---------------------------------------------------------------------------------------------------------


def flashinfer_prefill(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    use_qk_l2norm_in_kernel=False, output=None, output_state=None, max_seqlen=None,
):  # fmt: skip
    """With its own arguments, the gate linear."""
    return gd.chunk_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, output,
        output_state, max_seqlen=max_seqlen,
    )  # fmt: skip


def log_prefill(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, state_v_first=False,
):  # fmt: skip
    """A prefill of FLA's and FlashQLA's arguments: a batch of one, the gate in logarithms."""
    assert state_v_first and len(q) == 1
    output, state = gd.chunk_gated_delta_rule(
        q[0], k[0], v[0], g[0], beta[0], scale, initial_state, True, cu_seqlens, use_qk_l2norm_in_kernel, g_space="log"
    )
    return output[None], state


def fla_recurrent(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, state_v_first=False,
):  # fmt: skip
    assert use_gate_in_kernel and use_beta_sigmoid_in_kernel and output_final_state
    state = initial_state.clone() if state_v_first else initial_state.transpose(-1, -2).contiguous()
    output, state = gd.gated_delta_rule_decode_pretranspose(
        q, k, v, state, A_log, g, dt_bias, beta, scale, None, use_qk_l2norm_in_kernel
    )
    return output, state if state_v_first else state.transpose(-1, -2)


def fla_conv(x, weight=None, initial_state=None, output_final_state=False, activation=None, cu_seqlens=None):
    states = initial_state[..., 1:].contiguous()
    y = gd.causal_conv1d(
        x[0], weight, conv_states=states, cu_seqlens=cu_seqlens, state_indices=None, has_initial_state=None,
        activation=activation,
    )  # fmt: skip
    return y[None], torch.nn.functional.pad(states, (1, 0), value=float("nan"))


def fla_norm(x, g, weight, bias, activation="swish", eps=1e-6):
    assert bias is None
    return gd.rms_norm_gated(x, g, weight, eps, activation)


def naive_chunk(q, k, v, g, beta, initial_state=None, output_final_state=False):
    """The torch references: equal sequences as a batch, heads repeated, states ``[K, V]``."""
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    rows, length = q.shape[:2]
    starts = torch.arange(rows + 1) * length
    flat = [y.flatten(0, 1) for y in (q, k, v, g, beta)]
    state = initial_state.transpose(-1, -2).contiguous()
    output, state = gd.chunk_gated_delta_rule(
        *flat, initial_state=state, output_final_state=True, cu_seqlens=starts, g_space="log"
    )
    return output.unflatten(0, (rows, length)), state.transpose(-1, -2)


FAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": flashinfer_prefill},
    "flashinfer.gdn_decode": {
        name: getattr(gd, name)
        for name in ("gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp")
    },
    "flash_qla": {"chunk_gated_delta_rule": log_prefill},
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": log_prefill, "fused_recurrent_gated_delta_rule": fla_recurrent,
    },
    "fla.ops.gated_delta_rule.naive": {"naive_chunk_gated_delta_rule": naive_chunk},
    "fla.modules.causal_conv1d.ops": {"causal_conv1d": fla_conv},
    "fla.modules.norm.fused_norm_gate": {"rms_norm_gated": fla_norm},
    "transformers.models.qwen3_next.modeling_qwen3_next": {"torch_chunk_gated_delta_rule": naive_chunk},
}  # fmt: skip
"""Peers' functions with the arguments that the real ones take (and no more, so that another one is an error)."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in FAKES.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:i])) or ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)
        for function, value in functions.items():
            monkeypatch.setattr(sys.modules[name], function, value, raising=False)


FULL = Heads(1, 2)
OF_PEERS = {
    "flashinfer": [
        *(Case("x", "decode", FULL, form, batch=2, state=state)
          for form, state in (("V-major", "fp32"), ("V-major allocated", "fp32"), ("K-major", "fp32"), ("pool", "bf16"))),
        *(Case("x", "verify", FULL, form, batch=2, tokens=3, state=state)
          for form, state in (("outputs", "fp32"), ("final", "bf16"), ("snapshots", "bf16"), ("slots", "fp32"))),
        Case("x", "prefill", FULL, sequences="40+3"),
    ],
    "flashqla": [Case("x", "prefill", FULL, sequences="40+3")],
    "fla": [
        Case("x", "prefill", FULL, sequences="40+3"), Case("x", "norm", FULL, batch=3),
        Case("x", "conv", FULL, "prefill", sequences="9+1"), Case("x", "decode", FULL, "V-major", batch=2),
        Case("x", "decode", FULL, "K-major", batch=2), Case("x", "verify", FULL, "final", batch=2, tokens=3),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name} {named(case)}") for name in OF_PEERS for case in OF_PEERS[name]]
)
@pytest.mark.usefixtures("fakes")
def test_adapters_speak_their_peers_language(monkeypatch: pytest.MonkeyPatch, name: str, case: Case) -> None:
    """Given functions of the peers' arguments, every adapter gives right results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    inputs = make_sets(case, CPU, 0)[0]
    truth = check.exact(case, inputs)
    (contender,) = peers.load(name).contenders(case)
    bound = contender.bind(inputs)
    bound.call()
    verdict = check.judge(truth, bound.results(), None)
    assert verdict.ok, verdict


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["fla", "transformers", "reference"])
def test_references_on_the_cpu(name: str) -> None:
    case = Case("x", "prefill", SMALL, sequences="33x3")
    inputs = make_sets(case, CPU, 0)[0]
    truth = check.exact(case, inputs)
    found = peers.load(name).contenders(case)
    assert len(found) == 1 + (name == "reference")
    for contender in found:
        bound = contender.bind(inputs)
        bound.call()
        assert check.judge(truth, bound.results(), None).ok
    assert name == "reference" or peers.load(name).contenders(replace(case, sequences="33+4")) == []


@pytest.mark.parametrize(
    ("name", "case"),
    [("flashinfer", PREFILL), ("flashinfer", AROUND[0]), ("flashqla", PREFILL), ("flashqla", DECODES[0]),
     ("flashinfer", Case("x", "decode", FULL, "K-major", batch=1, state="bf16")),
     ("flashinfer", Case("x", "verify", FULL, "slots", batch=1, tokens=2, state="bf16")),
     ("flashinfer", Case("x", "verify", FULL, "outputs", batch=1, tokens=2, state="fp16")),
     ("fla", Case("x", "decode", FULL, "pool", batch=1, state="bf16")), ("fla", AROUND[0])],
)  # fmt: skip
def test_adapters_pass_on_what_their_peer_cannot_do(monkeypatch: pytest.MonkeyPatch, name: str, case: Case) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peers.load(name).contenders(case) == []


def test_which_peers_run() -> None:
    chosen, absent = peers.choose(["auto"], "cpu")
    assert chosen[:2] == ["ours", "reference"]
    assert absent["flashinfer"] in ("it is not installed", "it does not run on cpu")
    assert peers.choose(["none"], "cpu") == (["ours", "reference"], {})
    assert peers.choose(["none"], "cuda") == (["ours"], {})
    assert peers.choose(["gated_delta.bench.peers.reference"], "cpu")[0][-1] == "gated_delta.bench.peers.reference"


@pytest.mark.parametrize(
    ("word", "reason"),
    [("nonsense", "there is no such adapter"), ("no.such.module", "its adapter cannot be imported"),
     ("flashqla", "it is not installed"), ("gated_delta.bench.peers.flashqla", "it is not installed")],
)  # fmt: skip
def test_peers_that_are_asked_for_must_be_there(word: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        peers.choose([word], "cpu")


def test_versions() -> None:
    assert peers.version_of("ours") == gd.__version__
    assert peers.version_of("reference") == ""
    assert peers.version_of("flashqla") == ""


def test_rates_of_a_row() -> None:
    case = Case("decode", "decode", Heads(16, 32), "V-major", batch=64)
    found = worker._rates(case, timing.Spread(70.0, 69.0, 71.0, 21, 10), H200)
    needed = floors.work(case)
    assert found["over_floor"] == pytest.approx(70.0 / floors.floor(needed, H200))
    assert found["tb_s"] == pytest.approx((needed.read + needed.written) / 70e-6 / 1e12)
    assert "tflop_s" not in found
    assert "floor_us" not in worker._rates(replace(case, group="host"), timing.Spread(7, 6, 8, 9, 100), H200)


def test_signatures_of_the_fakes_are_used_in_full() -> None:
    """Every keyword that an adapter passes exists: the fakes take no others."""
    for functions in FAKES.values():
        for function in functions.values():
            assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
