"""Benchmarks: which cases there are, what the hardware allows them, and what becomes of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gated_delta.bench import cases, floors, machine, peers, reading, records, timing
from gated_delta.bench.cases import Case, Heads
from gated_delta.bench.records import Row
from gated_delta.errors import OptionError

SMALL = Heads(2, 4, 32, 64)
PREFILL = Case("prefill", "prefill", SMALL, sequences="70+3+130")
DECODE = Case("decode", "decode", SMALL, "pool", batch=3, state="bf16")
H200 = {"read": 4.39, "write": 4.7, "in-place": 4.13, "product": 780, "smallest": 1.14}


def test_the_default_prefill_cases_are_the_51_of_the_published_table() -> None:
    found = cases.select(["prefill"])
    assert len(found) == len(set(found)) == 51
    assert {str(case.heads) for case in found} == {"2/8", "4/16", "16/32", "16/48", "16/64"}
    largest = [case for case in found if case.heads.hv > 32]
    assert max(sum(case.lengths) for case in largest) == 32768
    assert len({case.sequences for case in found if case.heads.hv <= 32}) == 11


def test_every_group_has_cases_and_quick_has_fewer() -> None:
    for group in cases.GROUPS:
        full, quick = (cases.select([group], quick=quick) for quick in (False, True))
        assert full
        assert {case.group for case in full} == {group}
        assert len(quick) < len(full) or group in ("step", "conv", "norm", "host", "layer")
    assert "layer" not in cases.DEFAULT_GROUPS


def test_small_cases_stay_small() -> None:
    for case in cases.select(cases.GROUPS, small=True):
        assert case.heads == Heads(2, 4)
        assert sum(case.lengths) <= 512


def test_a_selection_is_obeyed() -> None:
    found = cases.select(
        ["decode", "verify"], heads=[SMALL], batches=[5], tokens=[3], states=["fp16"], gates=["none", "weak"]
    )
    assert {(case.heads, case.batch, case.state) for case in found} == {(SMALL, 5, "fp16")}
    assert {case.tokens for case in found if case.group == "verify"} == {3}
    assert {case.gates for case in found} == {"none", "weak"}
    assert {case.form for case in found if case.group == "decode"} == {"pool", "K-major"}
    prefills = cases.select(["prefill"], heads=[Heads(16, 64)], sequences=["1x131072"])
    assert [case.name for case in prefills] == ["16/64 1x131072"]  # left out unless it is asked for
    slots = cases.select(["verify"], tokens=[1])
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
    us = 2 * needed.written / 4.13e6 + (needed.read - needed.written) / 4.39e6
    assert floors.floor(needed, H200) == pytest.approx(us)
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
    step = floors.work(Case("step", "step", Heads(16, 32), batch=8, state="bf16"))
    kept = 8 * (32 * 128 * 128 * 2 + channels * 6)
    assert step == (8 * (channels + 32 * 128 + 2 * 32) * 2 + kept, 8 * 32 * 128 * 2 + kept, 0)
    core = floors.work(Case("layer", "layer", Heads(16, 32), "decode core", batch=8))
    assert (core.read - step.read, core.written - step.written) == (8 * 32 * 128 * 128 * 2,) * 2
    layer = floors.work(Case("layer", "layer", Heads(16, 32), "decode", batch=8))
    weights = 2048 * (channels + 2 * 32 * 128 + 2 * 32)
    assert layer.operations == 2 * 8 * weights
    assert layer.read == 2 * weights + 8 * (2048 * 2 + 32 * 128 * 128 * 4 + channels * 6)


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", {"cpu": 0.02})
    found = list(floors.measure(torch.device("cpu")))
    ceilings = floors.ceilings(found)
    assert all(ceilings[name] > 0 for name in H200)
    assert {row.case for row in found} == {*H200}


def test_the_kernel_that_reads_reads_everything() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there by Triton's interpreter
    x, sums = torch.randn(3 * reading.BLOCK, device=device), torch.empty(3, device=device)
    reading.read_all(x, sums)
    torch.testing.assert_close(sums, x.view(3, -1).sum(1), rtol=1e-4, atol=1e-3)


def test_rates_of_a_row() -> None:
    case = Case("decode", "decode", Heads(16, 32), "V-major", batch=64)
    found = floors.rates(case, 70.0, H200)
    needed = floors.work(case)
    assert found["over_floor"] == pytest.approx(70.0 / floors.floor(needed, H200))
    assert found["tb_s"] == pytest.approx((needed.read + needed.written) / 70e-6 / 1e12)
    assert "tflop_s" not in found
    assert floors.rates(PREFILL, 70.0, H200)["tflop_s"] > 0


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
    [("", "other columns"), ("a,b\n1,2\n", "other columns"), ("group,case,contender,odd\n", "other columns"),
     ("group,case,contender,us\ng,c,x,fast\n", "could not convert")],
)  # fmt: skip
def test_another_csv_is_refused(tmp_path: Path, text: str, was: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(OptionError, match=was) as caught:
        records.read(tmp_path / "x.csv")
    assert "it must be a CSV that gated-delta bench wrote" in str(caught.value)


def test_the_best_peer() -> None:
    rows = [row("a"), row("a", "fla", 40.0), row("a", "flashinfer", 15.0)]
    ours, *others = records.with_best_peer([*rows, row("a", "flashqla", None, status="wrong")])
    assert (ours.best_peer, ours.speedup) == ("flashinfer", 1.5)
    assert all(other.speedup is None for other in others)
    assert records.with_best_peer(rows[:1]) == rows[:1]


def test_the_summary_says_where_we_lose() -> None:
    rows = [
        row("good", us=10, over_floor=2.0, speedup=4.0), row("bad", us=10, over_floor=8.0, speedup=0.5),
        row("alone", us=10, over_floor=4.0),
    ]  # fmt: skip
    assert records.summary(rows) == (
        "4.00 times the floor (geometric mean of 3); worst 8.00 in bad; "
        "1.41 times as fast as the best peer (geometric mean of 2); worst 0.50 in bad; "
        "slower than a peer in 1 of 2 cases"
    )


def test_what_a_layer_does_around_the_rule() -> None:
    times = {"prefill": 300.0, "prefill core": 150.0, "": 100.0, "decode": 20.0, "V-major": 10.0, "pool": 1.0}
    rows = [row(form, us=us, form=form, heads="2/8", size="1x64") for form, us in times.items()]
    assert records.shares(rows) == [
        "2/8 prefill 1x64: 200% of the rule around it",
        "2/8 prefill core 1x64: 50% of the rule around it",
        "2/8 decode 1x64: 100% of the rule around it",
    ]
    assert records.shares(rows[:2]) == []
    assert records.summary(rows).endswith("; ".join(records.shares(rows)))


def test_the_table_shows_what_went_wrong() -> None:
    rows = [
        Row("ceilings", "read", "machine", us=100.0, tb_s=4.39, device="GPU", torch="2"),
        row("a", us=10, p10=9.0, p90=11.0, over_floor=2.0, tb_s=2.0, speedup=0.8, heads="2/8", model="a model"),
        row("a", "fla", us=8.0, version="0.6.0"), row("a", "flashinfer", us=None, status="crashed", note="said [red]"),
        row("b", us=10, p10=9.0, p90=11.0, tb_s=2.0, tflop_s=455.0, operations=1000, bytes=1, speedup=1.25),
        row("b", "flashinfer", us=None, status="hung", note="as in a"),
        Row("absent", "flashqla", "flashqla", "absent", note="it is not installed"),
    ]  # fmt: skip
    console = Console(width=150)
    with console.capture() as shown:
        console.print(records.tables(rows))
    lines = [" ".join(line.split()) for line in shown.get().splitlines()]
    assert "GPU; torch 2; fla 0.6.0; read 4.39 TB/s" in lines
    assert "a 10.00 10.0 % 2 TB/s 2.00 8.00 crashed 0.80" in lines
    assert "b 10.00 10.0 % 455 TFLOP/s hung 1.25" in lines
    assert sum("crashed" in line for line in lines) == 2  # in the table, and with what happened below it
    assert "said [red]" in shown.get()
    assert "heads: 2/8 of a model" in lines
    assert "absent: flashqla (it is not installed)" in lines


def test_units() -> None:
    assert records.rate(4.125, None) == "4.12 TB/s"
    assert records.rate(0.012, None) == "12 GB/s"
    assert records.rate(0.5, 455.0) == "455 TFLOP/s"
    assert records.rate(None, None) == ""


def test_a_comparison_finds_what_got_slower() -> None:
    before = [row("slow", us=100), row("fast", us=100), row("gone", us=5), row("slow", "fla", 1.0)]
    after = [row("slow", us=130, speedup=9.0), row("fast", us=50), row("new", us=5, speedup=9.0)]
    found = {(row.case, row.contender): row.speedup for row in records.compared(before, after)}
    assert found == {
        ("slow", peers.OURS): 100 / 130, ("slow", "before"): None, ("fast", peers.OURS): 2.0, ("fast", "before"): None,
        ("new", peers.OURS): None, ("gone", "before"): None,
    }  # fmt: skip


def test_facts_of_this_machine() -> None:
    found = machine.facts("cpu")
    assert found["torch"] == torch.__version__
    assert "CPU" in found["device"]
    assert set(found) <= set(Row.__dataclass_fields__)
    assert machine.clocks("cpu") == {}


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, found in (
        ("1980, 312.45", {"sm_mhz": 1980.0, "watts": 312.45}),
        ("[N/A], 75", {"watts": 75.0}),
        ("", {}),
    ):
        monkeypatch.setattr(machine, "_asked", lambda what, said=said: said)
        assert machine.clocks("cuda") == found
