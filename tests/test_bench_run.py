"""Benchmarks: the parent outlives peers that raise, lie, end the process or never come back, and the command line."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gated_delta import cli
from gated_delta.bench import cases, machine, peers, plots, records, soak, worker
from gated_delta.bench import cli as bench_cli
from gated_delta.bench.cases import Case, Heads
from gated_delta.bench.records import Row
from gated_delta.bench.run import Bench, BenchError
from test_cli import Result

HEADS = Heads(1, 1, 32, 32)
CASES = [Case("decode", "decode", HEADS, "V-major", batch=batch) for batch in (1, 2, 3)]
CASES.append(Case("norm", "norm", HEADS, batch=2))

PEER = """
import os, time
import torch
from gated_delta.bench.peers import Bound, Contender, ours

PACKAGE, DISTRIBUTION, DEVICES = None, None, ("cpu",)


def contenders(case, device):
    if case.operation != "decode":
        return []
    return [Contender(name, lambda x, name=name: bind(case, x, name)) for name in NAMES]


def bind(case, x, name):
    right = ours.contenders(case, "cpu")[0].bind(x)
    calls = [0]

    def call():
        calls[0] += 1
        if name == "raises":
            raise RuntimeError("on purpose")
        if name == "exits":
            os._exit(7)
        if name == "sleeps" or (name == "sleeps later" and calls[0] > 2):
            time.sleep(60)
        right.call()

    def results():
        factor = {"lies": 1.1, "not finite": float("inf")}.get(name, 1.0)
        return {key: value * factor for key, value in right.results().items()}

    return Bound(call, results)
"""
"""An adapter whose contenders misbehave as they are called."""


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of adapters that workers find, and one thread for each of them."""
    (tmp_path / "fakes").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path / "fakes"
    for name in [name for name in sys.modules if name.startswith("fakes")]:
        del sys.modules[name]


def test_a_peer_costs_its_rows_and_no_others(adapters: Path) -> None:
    """All at once: an exception, wrong and infinite results, the end of the process, silence at once and later."""
    names = ("raises", "lies", "not finite", "exits", "sleeps later", "right")
    (adapters / "peer.py").write_text(f"NAMES = {names}\n{PEER}")
    done, told = [], []
    bench = Bench(
        "cpu", ["ours", "fakes.peer", "reference"], CASES, {"date": "today"}, limit=1.5,
        advance=lambda: done.append(1), tell=told.append,
    )  # fmt: skip
    rows = bench.run()
    found = records.cases_of(row for row in rows if row.group != records.CEILINGS)
    assert len(done) == len(found) == len(CASES)
    assert all(row.date == "today" for row in rows)
    *decodes, norm = found.values()
    for case, own in zip(CASES, decodes, strict=False):
        right = [own[name] for name in (peers.OURS, "right", "token loop")]
        assert all(row.status == "ok" and row.us and row.p10 and row.p90 and row.floor_us for row in right)
        assert all(row.p10 <= row.us <= row.p90 for row in right if row.us and row.p10 and row.p90)
        assert (
            right[0].check
            == f"float64 on {case.batch} of {case.batch} rows, the rest against a contender that is right"
        )
        assert right[0].best_peer in ("right", "token loop")
        assert right[0].speedup and right[0].bytes and right[0].rows == case.batch
        assert (own["raises"].status, own["raises"].note) == ("failed", "RuntimeError: on purpose (peer.py)")
        assert own["lies"].status == own["not finite"].status == "wrong"
        assert re.fullmatch(r"(output|state) against .*: error 1.0e-01, over 1e-02", own["lies"].note)
        assert own["not finite"].note == "output is not finite"
        assert all(own[name].us is None for name in names[:-1])
    for own in decodes[:2]:
        assert (own["exits"].status, own["exits"].note) == ("crashed", "exit status 7 while: check")
        assert (own["sleeps later"].status, own["sleeps later"].note) == ("hung", "did not answer while: timing")
    for name in ("exits", "sleeps later"):
        assert (decodes[2][name].status, decodes[2][name].note) == ("skipped", f"as in {CASES[1].name}")
    assert list(norm) == [peers.OURS]
    assert norm[peers.OURS].status == "ok"
    assert len(told) == 4
    assert sum(row.group == records.CEILINGS for row in rows) > 4


def test_a_worker_that_cannot_start_is_an_error(adapters: Path) -> None:
    (adapters / "peer.py").write_text("import no_such_module_at_all")
    with pytest.raises(BenchError, match=r"cannot start: .*No module named 'no_such_module_at_all'"):
        Bench("cpu", ["ours", "fakes.peer"], CASES[:1], {}).run()


def bench_of(*, strikes: int = 0) -> Bench:
    bench = Bench("cpu", ["ours", "broken"], CASES, {})
    bench._strikes["decode", "broken"] = strikes
    return bench


def test_who_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {0, 1, 2, 3}
    bench = bench_of()
    assert bench._blame(False, "exit status 1", {}, every) == set()  # before it began
    assert bench._blame(False, "exit status 1", {"case": -1, "contender": "", "stage": "ceilings"}, every) == set()
    assert bench._rows == {}
    inputs = {"case": 1, "contender": "", "stage": "inputs and reference"}
    assert bench._blame(False, "exit status -9", inputs, every) == {1}
    (row,) = bench._rows[1].values()
    assert (row.contender, row.status, row.note) == (peers.OURS, "failed", "exit status -9 while: inputs and reference")
    asked = {"case": 0, "contender": "broken", "adapter": "broken", "asked": True, "stage": "being asked"}
    assert bench._blame(False, "exit status 1", asked, every) == set()
    assert bench.adapters == ["ours"]
    assert bench._rows[0]["broken"].status == "crashed"
    bench = bench_of(strikes=1)
    assert bench._blame(True, "did not answer", {"case": 0, "contender": "broken", "stage": "check"}, every) == set()
    assert {number: rows["broken"].status for number, rows in bench._rows.items()} == {
        0: "hung", 1: "skipped", 2: "skipped",
    }  # fmt: skip
    assert bench._leave_out == {(0, "broken"), (1, "broken"), (2, "broken")}  # the norm is another operation


class Said:
    """A worker that has said its lines already."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self._events = events

    def events(self, limit: float) -> Iterator[dict[str, Any]]:
        yield from self._events


def test_a_failure_that_takes_the_device_along_is_told_once() -> None:
    bench = bench_of()
    begun = {"kind": "begin", "case": 0, "contender": "broken", "stage": "check"}
    failed = {"contender": "broken", "adapter": "broken", "status": "failed", "note": "AcceleratorError"}
    said = Said(begun, {"kind": "row", "case": 0, "row": failed}, {"kind": "sick", "case": 0})
    done, last = bench._listen(said, machine.Monitor("cpu"))  # type: ignore[arg-type]
    assert (done, last["contender"]) == (set(), "broken")
    assert bench._blame(False, "exit status 3", last, {0, 1, 2, 3}) == set()
    assert (bench._rows[0]["broken"].status, bench._rows[0]["broken"].note) == ("failed", "AcceleratorError")
    assert bench._plan([0], bench.adapters)["leave_out"] == [(0, "broken")]


def test_compiling_ahead_runs_every_contender_once(adapters: Path) -> None:
    """Two processes at a time, whatever becomes of them; nothing that they do is measured."""
    (adapters / "peer.py").write_text(
        "from pathlib import Path\nimport os\nfrom gated_delta.bench.peers import Bound, Contender\n"
        "PACKAGE, DISTRIBUTION, DEVICES = None, None, ('cpu',)\n"
        "def contenders(case, device):\n"
        "    def call():\n"
        "        with (Path(__file__).parent / case.operation).open('a') as file:\n"
        "            file.write(f\"{case.batch} {os.environ['FLA_CACHE_RESULTS']}\\n\")\n"
        "        os._exit(case.batch == 3)\n"
        "    return [Contender('x', lambda inputs: Bound(call, dict))]\n"
    )
    told: list[str] = []
    bench = Bench("cpu", ["fakes.peer"], CASES[2:], {}, jobs=2, tell=told.append)
    bench._compile()
    assert told[0] == "compiling ahead in 2 processes"
    assert re.fullmatch(r"compiled in \d+ s", told[1])
    assert (adapters / "decode").read_text() == "3 0\n"
    assert (adapters / "norm").read_text() == "2 0\n"
    assert bench._rows == {}


def test_compiling_ahead_ends_in_time(adapters: Path) -> None:
    (adapters / "peer.py").write_text(f"NAMES = ('sleeps',)\n{PEER}")
    started = time.monotonic()
    Bench("cpu", ["fakes.peer"], CASES[:1], {}, jobs=1, limit=1.0)._compile()
    assert 2.0 <= time.monotonic() - started < 8.0


def test_a_case_without_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory\nat all")

    said: list[dict[str, Any]] = []
    plan = Bench("cpu", ["ours"], CASES, {})._plan([0, 1], ["ours"])
    own = worker.Worker({**plan, "ceilings": [1e9, 1e9, 1e9, 1e12, 1.0]}, None)  # type: ignore[arg-type]
    monkeypatch.setattr(own, "say", lambda kind, **facts: said.append({"kind": kind, **facts}))
    monkeypatch.setattr(worker, "make_sets", no_memory)
    own.measure()
    rows = [event["row"] for event in said if event["kind"] == "row"]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert rows[0]["note"].startswith("OutOfMemoryError: no memory at all (test_bench_run.py)")
    assert [event["case"] for event in said if event["kind"] == "done"] == [0, 1]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*argv: str) -> Result:
        monkeypatch.setattr(bench_cli, "console", Console(width=170))
        monkeypatch.setattr(sys, "argv", ["gated-delta", "bench", *argv])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Result(int(stop.value.code or 0), printed.out, printed.err)

    return call


def test_a_run_leaves_table_csv_and_pictures(command: Any, tmp_path: Path) -> None:
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
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {
        "decode-roofline", "scaling", "prefill-over-floor", "decode-over-floor", "prefill-speedup", "decode-speedup",
    }  # fmt: skip
    again = command("plot", str(out / "bench.csv"), "--out", str(tmp_path / "again"))
    assert (again.status, again.err) == (0, "")
    assert {path.stem for path in (tmp_path / "again").glob("*.png")} == pictures
    same = command("compare", str(out / "bench.csv"), str(out / "bench.csv"))
    assert "gated-delta: 0 of 12 cases slower by more than 3%, 0 faster; geometric mean +0.0 %" in same.words


def test_absent_peers_are_named(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Bench, "run", lambda self: [Row("norm", "x", peers.OURS, us=2.0)])
    result = command("norm", "--device", "cpu", "--out", str(tmp_path))
    assert "flashqla (it " in result.words
    absent = [row for row in records.read(tmp_path / "bench.csv") if row.status == "absent"]
    assert "flashqla" in {row.contender for row in absent}


def test_a_run_that_is_cut_off_leaves_what_it_has(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_off(bench: Bench) -> list[Row]:
        bench._keep(0, contender=peers.OURS, us=2.0)
        bench.advance()
        raise BenchError("bench: cut off")

    monkeypatch.setattr(Bench, "run", cut_off)
    result = command("norm", "--device", "cpu", "--out", str(tmp_path))
    assert (result.status, result.err) == (2, "gated-delta: bench: cut off\n")
    assert [row.us for row in records.read(tmp_path / "bench.csv") if row.contender == peers.OURS] == [2.0]


def test_without_matplotlib_there_is_a_csv_and_a_sentence(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    monkeypatch.setattr(Bench, "run", lambda self: [Row("norm", "x", peers.OURS, us=2.0)])
    result = command("norm", "--device", "cpu", "--out", str(tmp_path))
    assert result.status == 0
    assert 'no pictures: matplotlib is not installed (pip install "gated-delta[bench]")' in result.words
    assert [path.name for path in tmp_path.iterdir()] == ["bench.csv"]
    refused = command("plot", str(tmp_path / "bench.csv"))
    assert refused.status == 2
    assert refused.err.startswith("gated-delta: bench plot: matplotlib is not installed; it must be ")


def test_options_reach_the_run(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Bench] = []
    monkeypatch.setattr(Bench, "run", lambda self: seen.append(self) or [])
    command("verify", "--device", "cpu", "--tokens", "3", "--limit", "7", "--jobs", "2", "--peers", "none")
    command("--quick", "--device", "cpu", "--peers", "none")
    command("run", "--device", "cpu", "--heads", "all", "--seqs", "all", "--peers", "none", "prefill")
    first, quick, everything = seen
    assert (first.limit, first.jobs, {case.tokens for case in first.cases}) == (7.0, 0, {3})
    assert {case.group for case in quick.cases} == set(cases.DEFAULT_GROUPS)
    assert len(everything.cases) == len(cases.MODELS) * (len(cases.SEQUENCES) + len(cases.MORE_SEQUENCES))


def test_soak_fails_when_something_is_wrong(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = command("--soak", "6", "--device", "cpu")
    assert fine.status == 0
    assert "6 calls on cpu: 0 wrong" in fine.words
    monkeypatch.setattr(soak, "_one", lambda case, device: "wrong on purpose")
    broken = command("--soak", "2", "--device", "cpu")
    assert broken.status == 1
    assert broken.words.count(": wrong on purpose") == 4  # told at once, and in the end


def test_compare_shows_what_got_slower(command: Any, tmp_path: Path) -> None:
    for name, us in (("a", 100.0), ("b", 110.0)):
        records.write(tmp_path / f"{name}.csv", [Row("norm", "16/32 B=64", peers.OURS, us=us)])
    result = command("compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    assert (result.status, result.err) == (0, "")
    assert "norm 16/32 B=64 gated-delta 100.0 110.0 +10.0 %" in result.words
    quiet = command("compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--threshold", "15")
    assert "+10.0 % (norm" in quiet.words
    assert "100.0 110.0" not in quiet.words


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["plot", "--help"], ["compare", "--help"]])
def test_help(command: Any, argv: list[str]) -> None:
    result = command(*argv)
    assert (result.status, result.err) == (0, "")
    assert re.search(r"Usage: .*gated-delta bench", result.words)


_GROUPS = "of prefill, decode, verify, conv, norm, host, layer"
_SEQUENCES = "like 1x8192 (one of 8192), 2048x4 (four of 2048), 28672+4096, or one of ragged-chat, ragged-mixed"
_SIZES = "32, 64, 96, 128, 192, 256"
_HEADS = f"like 16/32 (q and k heads / v heads, a multiple), or 16/32@64/128 with head sizes among {_SIZES}"
BAD: list[tuple[list[str], str]] = [
    (["nonsense"], f"bench: GROUP is 'nonsense'; it must be {_GROUPS}"),
    (["prefill", "attention"], f"bench: GROUP is 'attention'; it must be {_GROUPS}"),
    *((["--heads", word], f"bench: --heads is {word!r}; it must be {_HEADS}")
      for word in ("16", "0/4", "16/24", "2/4@100/128", "a/b", "2/4@64")),
    *((["--seqs", word], f"bench: --seqs is {word!r}; it must be {_SEQUENCES}")
      for word in ("x", "0x4", "4x0", "1x", "-3")),
    (["--heads", ","], "bench: --heads is ','; it must be at least one, with commas between several"),
    *((["--batch", word], f"bench: --batch is {word!r}; it must be a whole number in [1, 1048576]")
      for word in ("0", "1.5", "-2", "many")),
    (["--tokens", "65"], "bench: --tokens is '65'; it must be a whole number in [1, 64]"),
    (["--state", "fp8"], "bench: --state is 'fp8'; it must be of fp32, bf16, fp16"),
    (["--gates", "open"], "bench: --gates is 'open'; it must be of none, weak, mix, model"),
    (["--peers", "nobody"],
     "bench: --peers is 'nobody'; it must be auto, none, or of flashinfer, flashqla, fla, transformers: there is no "
     "such adapter"),
    (["--soak", "-1"], "Invalid value for '--soak':"),
    (["--limit", "0"], "Invalid value for '--limit':"),
    (["--jobs", "-2"], "Invalid value for '--jobs':"),
    (["--bogus"], "No such option:"),
    (["--device", "tpu"], "command line: --device is 'tpu'; it must be \"auto\", \"cpu\" or \"cuda\""),
    (["--device", "cuda"], 'command line: --device is "cuda"; it must be "cpu": torch sees no GPU here'),
    (["plot"], "Missing argument 'CSV...'."),
    (["plot", "no-such.csv"], "bench: CSV is no-such.csv; it must be an existing file"),
    (["compare", "a.csv"], "Missing argument 'B.csv'."),
    (["compare", "a.csv", "b.csv"], "bench: CSV is a.csv; it must be an existing file"),
    (["norm", "--out", __file__],
     f"bench: --out is {__file__} (File exists); it must be a folder, or a name for a new one"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), [pytest.param(*each, id=" ".join(each[0])[:40]) for each in BAD])
def test_bad_arguments(command: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = [] if argv[0] in ("plot", "compare") or "--device" in argv else ["--device", "cpu"]
    result = command(*argv, *device)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    if message.endswith(":"):  # what stands behind it is typer's
        assert result.err.startswith(f"gated-delta: {message} ")
    else:
        assert result.err == f"gated-delta: {message}\n"
