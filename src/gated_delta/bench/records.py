"""Rows: what was measured of one contender in one case; CSV files of them, and tables for the terminal."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gated_delta.bench.cases import MODELS, NO_MODEL, Case
from gated_delta.bench.peers import OURS, version_of
from gated_delta.errors import OptionError

CEILINGS, ABSENT = "ceilings", "absent"
"""Groups of the rows that describe the machine, and that name the peers which were not there."""
COMPUTE_BOUND = 150
"""Operations a byte from which a rate of operations says more than a bandwidth."""


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


def tables(rows: Sequence[Row]) -> Group:
    """The machine, one table a group with what it comes to, what went wrong, and who was absent."""
    parts: list[RenderableType] = [machine(rows)]
    for group in dict.fromkeys(row.group for row in rows if row.group not in (CEILINGS, ABSENT)):
        own = [row for row in rows if row.group == group]
        parts += [_table(group, own), Text(summary(own), style="italic")]
    models = {row.heads: row.model for row in rows if row.model}
    if models:
        parts.append(Text("heads: " + "; ".join(f"{heads} of {model}" for heads, model in models.items())))
    troubles = Table("case", "contender", "", "what happened", title="not timed", title_justify="left")
    for row in rows:
        if row.status not in ("ok", "absent"):
            troubles.add_row(f"{row.group} {row.case}", row.contender, row.status, escape(row.note))
    parts += [troubles] if troubles.row_count else []
    absent = [f"{row.contender} ({row.note})" for row in rows if row.group == ABSENT]
    return Group(*parts, *([Text("absent: " + "; ".join(absent))] if absent else []))


def machine(rows: Sequence[Row]) -> Text:
    """Device, versions and the ceilings that were measured."""
    found = [row for row in rows if row.group == CEILINGS]
    if not found:
        return Text("")
    words = [found[0].device, f"torch {found[0].torch}", *([f"driver {found[0].driver}"] if found[0].driver else [])]
    words += dict.fromkeys(f"{row.contender} {row.version}" for row in rows if row.version)
    words += [f"{row.case} {rate(row.tb_s, row.tflop_s) or f'{row.us:.2f} us'}" for row in found]
    return Text("; ".join(words))


def rate(tb_s: float | None, tflop_s: float | None) -> str:
    """A bandwidth or a rate of operations in a unit that shows it; "" for neither."""
    value, unit = (tflop_s, "FLOP/s") if tflop_s is not None else (tb_s, "B/s")
    if value is None:
        return ""
    return f"{value:.3g} T{unit}" if value >= 0.1 else f"{value * 1e3:.3g} G{unit}"


def _table(group: str, rows: Sequence[Row]) -> Table:
    """A line a case: ours with its spread (half the distance of p10 and p90), the rate of what bounds the case and the
    time over the floor; then the others.
    """
    others = list(dict.fromkeys(row.contender for row in rows if row.contender != OURS))
    title = f"{group}: us a call" + (" on the host" if group == "host" else "")
    table = Table("case", title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (OURS, "+-", "reached", "x floor", *others, "x best"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    several = len({row.gates for row in rows if row.gates}) > 1
    for (_, case, gates), found in cases_of(rows).items():
        ours = found.get(OURS) or Row(group, case, OURS, status="")
        times = [_time(found[name]) if name in found else "" for name in (OURS, *others)]
        spread = f"{50 * (ours.p90 - ours.p10) / ours.us:.1f} %" if ours.us and ours.p10 and ours.p90 else ""
        arithmetic = (ours.operations or 0) > COMPUTE_BOUND * (ours.bytes or 1)
        reached = rate(ours.tb_s, ours.tflop_s if arithmetic else None)
        over = f"{ours.over_floor:.2f}" if ours.over_floor else ""
        best = f"[{'green' if ours.speedup >= 1 else 'bold red'}]{ours.speedup:.2f}[/]" if ours.speedup else ""
        table.add_row(f"{case} {gates}" if several else case, times[0], spread, reached, over, *times[1:], best)
    return table


def _time(row: Row) -> str:
    """Three digits that matter, or all before the point."""
    if row.us is None:
        return f"[red]{row.status}[/]"
    return f"{row.us:,.0f}" if row.us >= 1000 else f"{row.us:.1f}" if row.us >= 100 else f"{row.us:.2f}"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means and the worst case against the floor and the best peer."""
    ours, parts = [row for row in rows if row.contender == OURS], []
    floors = {row.key: row.over_floor for row in ours if row.over_floor is not None}
    peers = {row.key: row.speedup for row in ours if row.speedup is not None}
    for words, found, worst_of in (("times the floor", floors, max), ("times as fast as the best peer", peers, min)):
        if found:
            worst, mean = worst_of(found, key=found.__getitem__), geometric_mean(found.values())
            parts.append(f"{mean:.2f} {words} (geometric mean of {len(found)}); worst {found[worst]:.2f} in {worst[1]}")
    lost = sum(speedup < 1 for speedup in peers.values())
    parts += shares(ours)
    return "; ".join([*parts, *([f"slower than a peer in {lost} of {len(peers)} cases"] if lost else [])])


def shares(rows: Sequence[Row]) -> list[str]:
    """What a layer does around the rule, as a share of the rule, with its projections and without."""
    times, found = {(row.form, row.heads, row.size): row.us for row in rows if row.us}, []
    for (form, *where), us in times.items():
        for words, rule in (("prefill", ""), ("decode", "V-major")):
            if form.startswith(words) and (alone := times.get((rule, where[0], where[1]))):
                found.append(f"{' '.join((where[0], form, where[1]))}: {us / alone - 1:.0%} of the rule around it")
    return found
