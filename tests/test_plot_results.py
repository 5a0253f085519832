"""The script that draws what the bench measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import plot_results
from gated_delta.bench import records
from gated_delta.bench.peers import OURS
from gated_delta.bench.records import Row

GROUPS = {"prefill": (("1x40", 1, 40), ("1x80", 1, 80)), "decode": (("B=2", 2, 2), ("B=5", 5, 5))}
ROWS = [
    Row(group, size, contender, us=us * tokens, over_floor=us, tb_s=1 / us, heads="2/4", size=size, rows=rows,
        tokens=tokens, bytes=1000 * tokens, state="fp32", gates="weak")
    for group, sizes in GROUPS.items() for size, rows, tokens in sizes for contender, us in ((OURS, 2.0), ("fla", 5.0))
]  # fmt: skip
ALWAYS = {"prefill-over-floor", "decode-over-floor"}


def drawn(rows: list[Row], folder: Path) -> set[str]:
    files = plot_results.draw(rows, folder)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    return {path.stem for path in files}


def test_pictures_of_what_there_is(tmp_path: Path) -> None:
    assert drawn(ROWS, tmp_path) == {*ALWAYS, "prefill-speedup", "decode-speedup"}
    assert drawn([row for row in ROWS if row.contender == OURS], tmp_path) == ALWAYS
    decode = [row for row in ROWS if row.group == "decode"]
    assert drawn(decode, tmp_path) == {"decode-over-floor", "decode-speedup"}
    untimed = Row("norm", "x", OURS, status="failed")
    assert drawn([untimed], tmp_path) == set()


@pytest.mark.parametrize("out", [(), ("--out", "new/folder")])
def test_files_are_drawn_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, contender in (("a", OURS), ("b", "fla")):
        records.write(Path(f"{name}.csv"), [row for row in ROWS if row.contender == contender])
    monkeypatch.setattr(sys, "argv", ["plot_results.py", "a.csv", "b.csv", *out])
    with pytest.raises(SystemExit) as stop:
        plot_results.main()
    assert not stop.value.code
    folder = tmp_path / "new/folder" if out else tmp_path
    assert {path.stem for path in folder.glob("*.png")} == {*ALWAYS, "prefill-speedup", "decode-speedup"}


def test_another_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(sys, "argv", ["plot_results.py", str(tmp_path / "x.csv")])
    with pytest.raises(SystemExit, match=r"plot_results.py: bench: CSV is .* it must be a CSV that gated-delta bench"):
        plot_results.main()
