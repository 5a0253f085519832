"""Rows: what was measured of one contender in one case, and CSV files of them."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from gated_delta.bench.cases import MODELS, NO_MODEL, Case
from gated_delta.bench.peers import OURS, version_of
from gated_delta.errors import OptionError

CEILINGS, ABSENT = "ceilings", "absent"
"""Groups of the rows that describe the machine, and that name the peers which were not there."""


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times are microseconds a call; empty fields do not apply."""

    group: str
    case: str
    contender: str
    status: str = "ok"
    """"ok": right, and timed. "wrong": results over the tolerance or not finite. "failed": an exception. "crashed": it
    ended the process. "hung": no answer within the time limit. "absent": not installed, or not for this device."""
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
    """the largest relative one"""
    note: str = ""
    """what went wrong"""
    model: str = ""
    """where the heads come from"""
    heads: str = ""
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


def row_of(case: Case, contender: str, **measured: Any) -> Row:
    """A row with the columns that the case and the contender give."""
    return Row(
        case.group, case.name, contender, model=MODELS.get(case.heads, NO_MODEL)[0], heads=str(case.heads),
        form=case.form, size=case.size, rows=len(case.lengths), tokens=sum(case.lengths), state=case.state,
        gates=case.gates, version=version_of(contender), **measured,
    )  # fmt: skip


_CASTS: dict[str, Any] = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(Row)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """A CSV with all columns, numbers to 6 digits."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(_CASTS))
        out.writeheader()
        for row in rows:
            out.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """Raises:
    OptionError: not a file that :func:`write` wrote.
    """
    try:
        with path.open(newline="") as file:
            lines = csv.DictReader(file)
            names = set(lines.fieldnames or ())
            if not {"group", "case", "contender"} <= names <= set(_CASTS):
                raise ValueError("other columns")
            return [Row(**{name: _CASTS[name](text) for name, text in line.items() if text}) for line in lines]
    except (TypeError, ValueError) as error:
        raise OptionError("bench", "CSV", f"{path} ({error})", "a CSV that gated-delta bench wrote") from error


def cases_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by (group, case, gates) and contender; of several the last."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.key[:3]][row.contender] = row
    return found


def with_best_peer(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case, ours related to the fastest of the others that were timed."""
    times = {row.contender: row.us for row in rows if row.us is not None}
    own = times.pop(OURS, None)
    if own is None or not times:
        return list(rows)
    best = min(times, key=times.__getitem__)
    related = {"best_peer": best, "speedup": times[best] / own}
    return [replace(row, **related) if row.contender == OURS else row for row in rows]


def compared(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """Our rows of one run, with those of an earlier one as a contender named "before"."""
    new, old = ([replace(row, speedup=None) for row in rows if row.contender == OURS] for rows in (after, before))
    cases = cases_of([*new, *(replace(row, contender="before") for row in old)])
    return [row for case in cases.values() for row in with_best_peer([*case.values()])]
