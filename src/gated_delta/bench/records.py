"""Rows: what was measured of one contender in one case, and CSV files of them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gated_delta.errors import OptionError

OK = "ok"
STATUSES = {
    OK: "right, and timed",
    "wrong": "its results are over the tolerance or not finite",
    "failed": "it raised an exception",
    "crashed": "it ended the process",
    "hung": "it did not answer within the time limit",
    "skipped": "it crashed or hung twice in this operation before",
    "absent": "not installed, or not for this device",
}
CEILINGS, ABSENT = "ceilings", "absent"
"""Groups of the rows that describe the machine, and that name the peers which were not there."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times are microseconds a call; empty fields do not apply."""

    group: str
    case: str
    contender: str
    status: str = OK
    us: float | None = None
    """median of the replays"""
    p10: float | None = None
    p90: float | None = None
    floor_us: float | None = None
    over_floor: float | None = None
    tb_s: float | None = None
    """bytes of the case over its time"""
    tflop_s: float | None = None
    best_peer: str = ""
    speedup: float | None = None
    """of the best peer's time over this one (of ours alone)"""
    error: float | None = None
    check: str = ""
    note: str = ""
    model: str = ""
    """where the heads come from"""
    heads: str = ""
    head_k: int | None = None
    head_v: int | None = None
    form: str = ""
    size: str = ""
    rows: int | None = None
    """sequences, or rows of the step"""
    tokens: int | None = None
    """in all"""
    state: str = ""
    gates: str = ""
    bytes: int | None = None
    operations: int | None = None
    replays: int | None = None
    calls: int | None = None
    """calls a replay"""
    sets: int | None = None
    """sets of inputs that are rotated"""
    sm_mhz: float | None = None
    watts: float | None = None
    version: str = ""
    """of the contender"""
    date: str = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    cuda: str = ""
    triton: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What is the same in two runs."""
        return self.group, self.case, self.gates, self.contender


_CASTS = {field.name: str(field.type).split(" ")[0] for field in fields(Row)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """A CSV with all columns, numbers to 6 digits."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(_CASTS))
        out.writeheader()
        for row in rows:
            out.writerow({name: _text(value) for name, value in asdict(row).items()})


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """Raises:
    OptionError: no such file, or not a file that :func:`write` wrote.
    """
    if not path.is_file():
        raise OptionError("bench", "CSV", str(path), "an existing file")
    try:
        with path.open(newline="") as file:
            lines = csv.DictReader(file)
            names = set(lines.fieldnames or ())
            if not {"group", "case", "contender"} <= names <= set(_CASTS):
                raise ValueError("other columns")
            return [Row(**{name: _value(name, text) for name, text in line.items()}) for line in lines]
    except (TypeError, ValueError) as error:
        raise OptionError("bench", "CSV", f"{path} ({error})", "a CSV that gated-delta bench wrote") from error


def _value(name: str, text: str) -> Any:
    kind = _CASTS[name]
    if kind == "str":
        return text
    return None if text == "" else {"int": int, "float": float}[kind](text)


def cases_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by (group, case, gates) and contender, in their order."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.key[:3]][row.contender] = row
    return found


def with_best_peer(rows: Sequence[Row], ours: str) -> list[Row]:
    """The rows of one case, ours related to the fastest of the others that were timed."""
    others = [row for row in rows if row.contender != ours and row.us is not None and not _is_part(row)]
    best = min(others, key=lambda row: row.us or 0.0, default=None)
    if best is None or best.us is None:
        return list(rows)
    return [
        replace(row, best_peer=best.contender, speedup=best.us / row.us) if row.contender == ours and row.us else row
        for row in rows
    ]


def _is_part(row: Row) -> bool:
    return row.contender.startswith("of it: ")
