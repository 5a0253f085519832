"""Benchmarks: the parent outlives peers that raise, lie, end the process or never come back, and the command line."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from gated_delta import cli
from gated_delta.bench import cases, peers, records, run
from gated_delta.bench.cases import Case, Heads
from gated_delta.bench.peers import TRANSFORMERS
from gated_delta.bench.records import Row
from gated_delta.bench.run import STARTING, Bench, BenchError, Step, Worker
from test_cli import Result

HEADS = Heads(1, 1, 32, 32)
CASES = [Case("prefill", "prefill", HEADS, sequences=f"1x{tokens}") for tokens in (1, 2, 3, 4, 5)]
CASES.append(Case("norm", "norm", HEADS, batch=2))

PEER = """
import os, time
from collections import Counter
import torch
import gated_delta as gd

calls = Counter()


def chunks(q, k, v, g, beta, initial_state, output_final_state):
    tokens = q.shape[1]
    calls[tokens] += 1
    deed = DEEDS.get(tokens, "right")
    if deed == "writes":
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{len(q[0])} {os.environ['FLA_CACHE_RESULTS']}\\n")
    if deed == "raises":
        raise RuntimeError("on purpose")
    if deed == "exits":
        os._exit(7)
    if deed == "sleeps" or (deed == "sleeps later" and calls[tokens] > 2):
        time.sleep(60)
    output, state = gd.chunk_gated_delta_rule(
        q[0], k[0], v[0], g[0], beta[0], initial_state=initial_state.transpose(-1, -2).contiguous(),
        output_final_state=True, cu_seqlens=torch.tensor([0, tokens]), g_space="log",
    )
    factor = {"lies": 1.1, "not finite": float("inf")}.get(deed, 1.0)
    return factor * output[None], state.transpose(-1, -2)


naive_chunk_gated_delta_rule = torch_chunk_gated_delta_rule = chunks
"""
"""A peer that misbehaves at certain lengths."""
MODULES = {"fla": "fla/ops/gated_delta_rule/naive.py", "transformers": TRANSFORMERS.replace(".", "/") + ".py"}

Pretend = Callable[..., None]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Makes packages that workers find instead of the real peers; one thread for each worker."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(**deeds: dict[int, str]) -> None:
        for name, own in deeds.items():
            file = tmp_path / MODULES[name]
            file.parent.mkdir(parents=True)
            for folder in [*file.relative_to(tmp_path).parents][:-1]:  # a package, or an installed one would be found
                (tmp_path / folder / "__init__.py").touch()
            file.write_text(f"DEEDS = {own}\n{PEER}")

    return make


def test_a_peer_costs_its_rows_and_no_others(pretend: Pretend) -> None:
    """All at once: an exception, wrong and infinite results, the end of the process, silence."""
    pretend(fla={1: "raises", 2: "lies", 3: "not finite", 4: "sleeps later"}, transformers={2: "exits"})
    told: list[str] = []
    contenders = [peers.OURS, "fla", "transformers"]
    *all_but_last, rows = Bench("cpu", contenders, CASES, {"date": "today"}, limit=1.5, tell=told.append).run()
    found = records.cases_of(row for row in rows if row.group != records.CEILINGS)
    assert len(all_but_last) + 1 == len(found) == len(CASES)
    assert all(row.date == "today" for row in rows)
    *prefills, norm = found.values()
    for own in prefills:
        right = own[peers.OURS]
        assert right.status == "ok" and right.us and right.p10 and right.p90 and right.floor_us
        assert right.p10 <= right.us <= right.p90
        assert right.bytes and right.rows == 1
    bad = [own["fla"] for own in prefills[:4]]
    assert [row.status for row in bad] == ["failed", "wrong", "wrong", "hung"]
    assert all(row.us is None for row in bad)
    assert bad[0].note == "RuntimeError: on purpose (naive.py)"
    assert re.fullmatch(r"output: relative error 1.0e-01, over 1e-02", bad[1].note)
    assert bad[2].note == "output is not finite"
    left_out = "left out of prefill from here on"
    assert bad[3].note == f"did not answer while: timing; {left_out}"
    other = [own.get("transformers") for own in prefills]
    assert other[0] and other[1]
    assert (other[0].status, other[1].status) == ("ok", "crashed")
    first = prefills[0][peers.OURS]
    assert first.best_peer == "transformers" and first.us and other[0].us
    assert first.speedup == pytest.approx(other[0].us / first.us)
    assert other[1].note == f"exit status 7 while: check; {left_out}"
    assert "fla" not in prefills[4] and other[2:] == [None] * 3
    assert list(norm) == [peers.OURS]
    assert norm[peers.OURS].status == "ok"
    assert len(told) == 2
    assert sum(row.group == records.CEILINGS for row in rows) == 5


class Silent:
    """A worker that ends in the step that is next."""

    steps: ClassVar[list[Step]] = []

    def __init__(self, device: str) -> None:
        self.last, self.hung = self.steps.pop(0), False

    def ask(self, case: Case | None, names: Sequence[str], limit: float) -> list[Row] | None:
        return [] if case is None and self.last != STARTING else None

    def end(self, seconds: float = 5.0) -> str:
        return "exit status -9"


def test_who_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contender, left out from then on; ours, where it is nobody's; the run, before there is a case."""
    told: list[str] = []
    bench = Bench("cpu", [peers.OURS, "fla"], CASES, {}, tell=told.append)
    monkeypatch.setattr(run, "Process", Silent)
    Silent.steps = [STARTING, Step("fla", "check"), Step("", "making inputs"), STARTING]
    with pytest.raises(BenchError, match=r"the measuring process cannot begin \(exit status -9 while: starting\)"):
        bench._measure(None)
    failed, crashed = bench._measure(CASES[1])
    note = "exit status -9 while: making inputs"
    assert (failed.case, failed.contender, failed.status, failed.note) == (CASES[1].name, peers.OURS, "failed", note)
    note = "exit status -9 while: check; left out of prefill from here on"
    assert (crashed.case, crashed.contender, crashed.status, crashed.note) == (CASES[1].name, "fla", "crashed", note)
    assert bench._left_out == {("prefill", "fla")}
    assert told[1] == f"{CASES[1].name}: the worker crashed (exit status -9 while: making inputs)"
    with pytest.raises(BenchError):
        bench._measure(CASES[2])


class Pipe:
    """What a worker says."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, event: object) -> None:
        self.said.append(event)


def worker_of(case: Case) -> tuple[Worker, Pipe]:
    pipe: Any = Pipe()
    return Worker(torch.device("cpu"), case, [peers.OURS], pipe), pipe


def test_a_failure_that_takes_the_device_along_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("illegal memory access")

    def left(status: int) -> None:
        raise SystemExit(status)

    own, pipe = worker_of(CASES[0])
    monkeypatch.setattr(run, "synchronize", broken)
    monkeypatch.setattr(peers, "bind", broken)
    monkeypatch.setattr(run.os, "_exit", left)
    with pytest.raises(SystemExit):
        own.measure()
    assert pipe.said[-1] == Step(peers.OURS, "RuntimeError: illegal memory access (test_bench_run.py)")


def test_a_case_without_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(run, "make_sets", no_memory)
    for case in CASES[:2]:
        (row,) = worker_of(case)[0].measure()
        assert (row.case, row.status) == (case.name, "failed")
        assert row.note == "OutOfMemoryError: no memory at all (test_bench_run.py)"


def test_compiling_ahead_runs_every_contender_once(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two processes at a time, whatever becomes of them; nothing that they do is measured."""
    pretend(fla={1: "writes", 2: "writes", 3: "exits"})
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    told: list[str] = []
    chosen = [CASES[2], *CASES[:2], replace(CASES[0], heads=Heads(1, 2, 32, 32)), CASES[-1]]
    bench = Bench("cpu", ["fla"], chosen, {}, jobs=2, tell=told.append)
    bench._compile()
    assert told[0] == "compiling ahead in 2 processes"
    assert re.fullmatch(r"compiled in \d+ s", told[1])
    assert (tmp_path / "notes").read_text() == "1 0\n"
    assert bench._process is None


def test_compiling_ahead_ends_in_time(pretend: Pretend) -> None:
    pretend(fla={1: "sleeps"})
    started = time.monotonic()
    Bench("cpu", ["fla"], CASES[:1], {}, jobs=1, limit=1.0)._compile()
    assert 2.0 <= time.monotonic() - started < 8.0


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*argv: str) -> Result:
        monkeypatch.setattr(cli, "wide", Console(width=170))
        monkeypatch.setattr(sys, "argv", ["gated-delta", "bench", *argv])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, printed.err)

    return call


def test_a_run_leaves_a_table_and_a_csv(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    chosen = (
        "--heads",
        "1/2@32/64",
        "--seqs",
        "1x40,1x80",
        "--batch",
        "2,5",
        "--state",
        "fp32",
        "--gates",
        "weak,none",
    )
    result = command("prefill", "decode", "--device", "cpu", "--peers", "none", "--out", str(out), *chosen)
    assert (result.status, result.err) == (0, "")
    for words in ("On the CPU: smaller cases", "prefill: us a call", "decode: us a call", "1/2@32/64 1x80 weak"):
        assert words in result.words
    assert "geometric mean of 8" in result.words
    rows = records.read(out / "bench.csv")
    timed = [row for row in rows if row.contender == peers.OURS]
    assert len(timed) == 2 * 2 + 2 * 2 * 2  # lengths x gates, layouts x batches x gates
    assert {row.gates for row in timed} == {"weak", "none"}
    assert all(row.us and row.error is not None and row.error < 1e-2 for row in timed)
    assert all(row.torch == str(torch.__version__) and row.date for row in rows)
    assert [path.name for path in out.iterdir()] == ["bench.csv"]
    same = command("compare", str(out / "bench.csv"), str(out / "bench.csv"))
    assert "1.00 times as fast as the best peer (geometric mean of 4); worst 1.00" in same.words


def test_absent_peers_are_named(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Bench, "run", lambda self: iter([[Row("norm", "x", peers.OURS, us=2.0)]]))
    result = command("norm", "--device", "cpu", "--out", str(tmp_path))
    assert "flashqla (it " in result.words
    absent = [row for row in records.read(tmp_path / "bench.csv") if row.status == "absent"]
    assert "flashqla" in {row.contender for row in absent}


def test_a_run_that_is_cut_off_leaves_what_it_has(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_off(bench: Bench) -> Iterator[list[Row]]:
        yield [Row("norm", "x", peers.OURS, us=2.0)]
        raise BenchError("bench: cut off")

    monkeypatch.setattr(Bench, "run", cut_off)
    result = command("norm", "--device", "cpu", "--out", str(tmp_path))
    assert (result.status, result.err) == (2, "gated-delta: bench: cut off\n")
    assert [row.us for row in records.read(tmp_path / "bench.csv") if row.contender == peers.OURS] == [2.0]


def test_options_reach_the_run(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Bench] = []
    monkeypatch.setattr(Bench, "run", lambda self: seen.append(self) or iter([]))
    command("verify", "--device", "cpu", "--tokens", "3", "--limit", "7", "--peers", "none")
    command("--quick", "--device", "cpu", "--peers", "none")
    command("run", "--device", "cpu", "--heads", "all", "--seqs", "all", "--peers", "none", "prefill")
    first, quick, everything = seen
    assert (first.limit, first.jobs, {case.tokens for case in first.cases}) == (7.0, 0, {3})
    assert {case.group for case in quick.cases} == set(cases.DEFAULT_GROUPS)
    assert len(everything.cases) == len(cases.MODELS) * len(cases.SEQUENCES)


def test_compare_shows_what_got_slower(command: Any, tmp_path: Path) -> None:
    for name, us in (("a", 100.0), ("b", 110.0)):
        records.write(tmp_path / f"{name}.csv", [Row("norm", "16/32 B=64", peers.OURS, us=us)])
    result = command("compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert (result.status, result.err) == (0, "")
    assert "16/32 B=64 110.0 100.0 0.91" in result.words
    assert "slower than a peer in 1 of 1 cases" in result.words


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["compare", "--help"]])
def test_help(command: Any, argv: list[str]) -> None:
    result = command(*argv)
    assert (result.status, result.err) == (0, "")
    assert re.search(r"Usage: .*gated-delta bench", result.words)


_GROUPS = "of prefill, decode, verify, step, conv, norm, host, layer"
_SEQUENCES = "like 1x8192 (one of 8192), 2048x4 (four of 2048), 28672+4096, or one of ragged-chat, ragged-mixed"
_SIZES = "32, 64, 96, 128, 192, 256"
_HEADS = f"like 16/32 (q and k heads / v heads, a multiple), or 16/32@64/128 with sizes among {_SIZES}"
BAD: list[tuple[list[str], str]] = [
    (["nonsense"], f"bench: GROUP is 'nonsense'; it must be {_GROUPS}"),
    (["prefill", "attention"], f"bench: GROUP is 'attention'; it must be {_GROUPS}"),
    *((["--heads", word], f"bench: --heads is {word!r}; it must be {_HEADS}")
      for word in ("16", "0/4", "16/24", "2/4@100/128", "a/b", "2/4@64")),
    *((["--seqs", word], f"bench: --seqs is {word!r}; it must be {_SEQUENCES}")
      for word in ("x", "0x4", "4x0", "1x", "-3")),
    *((["--batch", word], f"bench: --batch is {word!r}; it must be a whole number in [1, 65535]")
      for word in ("0", "1.5", "-2", "many")),
    (["--tokens", "65"], "bench: --tokens is '65'; it must be a whole number in [1, 64]"),
    (["--state", "fp8"], "bench: --state is 'fp8'; it must be of fp32, bf16, fp16"),
    (["--gates", "open"], "bench: --gates is 'open'; it must be of none, weak, mix, model"),
    (["--peers", "nobody"],
     "bench: --peers is 'nobody'; it must be auto, none, or of flashinfer, flashqla, fla, transformers: there is no "
     "such adapter"),
    (["--limit", "0"], "Invalid value for '--limit':"),
    (["--bogus"], "No such option:"),
    (["--device", "tpu"], "command line: --device is 'tpu'; it must be \"auto\", \"cpu\" or \"cuda\""),
    (["--device", "cuda"], 'command line: --device is "cuda"; it must be "cpu": torch sees no GPU here'),
    (["compare", __file__], "Missing argument 'B.csv'."),
    (["compare", "a.csv", "b.csv"], "Invalid value for 'A.csv':"),
    (["norm", "--out", __file__],
     f"[Errno 17] File exists: '{__file__}'"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), [pytest.param(*each, id=" ".join(each[0])[:40]) for each in BAD])
def test_bad_arguments(command: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = [] if argv[0] == "compare" or "--device" in argv else ["--device", "cpu"]
    result = command(*argv, *device)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    if message.endswith(":"):  # what stands behind it is typer's
        assert result.err.startswith(f"gated-delta: {message} ")
    else:
        assert result.err == f"gated-delta: {message}\n"
