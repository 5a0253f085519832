"""Rows as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gated_delta.bench.peers import OURS
from gated_delta.bench.records import ABSENT, CEILINGS, OK, Row, cases_of

COMPUTE_BOUND = 150
"""Operations a byte from which a rate of operations says more than a bandwidth."""
NOISE_US = 20.0
"""Cases shorter than this vary too much to judge a few per cent."""


def tables(rows: Sequence[Row], absent: Mapping[str, str]) -> Group:
    """The machine, one table a group with what it comes to, what went wrong, and who was absent."""
    groups = list(dict.fromkeys(row.group for row in rows if row.group not in (CEILINGS, ABSENT)))
    parts: list[object] = [machine(rows)]
    for group in groups:
        own = [row for row in rows if row.group == group]
        parts += [_table(group, own), Text(summary(own), style="italic")]
    models = {row.heads: row.model for row in rows if row.model}
    parts += [Text("heads: " + "; ".join(f"{heads} of {model}" for heads, model in models.items()))] if models else []
    troubles = [row for row in rows if row.status not in (OK, "skipped", "absent")]
    parts += [_troubles(troubles)] if troubles else []
    parts += [Text("absent: " + "; ".join(f"{name} ({why})" for name, why in absent.items()))] if absent else []
    return Group(*parts)  # type: ignore[arg-type]


def machine(rows: Sequence[Row]) -> Text:
    """Device, versions and the ceilings that were measured."""
    found = {row.case: row for row in rows if row.group == CEILINGS}
    first = next(iter(found.values()), None)
    if first is None:
        return Text("")
    words = [f"{first.device}, torch {first.torch}", *([f"driver {first.driver}"] if first.driver else [])]
    versions = {row.contender: row.version for row in rows if row.version and row.contender != OURS}
    words += [f"{name} {version}" for name, version in versions.items()]
    words += [f"{name} {rate(row.tb_s, row.tflop_s) or f'{row.us:.2f} us'}" for name, row in found.items()]
    return Text("; ".join(words))


def rate(tb_s: float | None, tflop_s: float | None) -> str:
    """A bandwidth or a rate of operations in a unit that shows it; "" for neither."""
    value, unit = (tflop_s, "FLOP/s") if tflop_s is not None else (tb_s, "B/s")
    if value is None:
        return ""
    return f"{value:.3g} T{unit}" if value >= 0.1 else f"{value * 1e3:.3g} G{unit}"


def _table(group: str, rows: Sequence[Row]) -> Table:
    """A line a case: ours with its spread and what it reaches, then the others."""
    others = list(dict.fromkeys(row.contender for row in rows if row.contender != OURS))
    title = f"{group}: us a call" + (" on the host" if group == "host" else "")
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    reached = ("+-", "reached", "x floor") if group != "host" else ("+-",)
    for heading in (OURS, *reached, *others, "x best"):
        table.add_column(heading, justify="right", no_wrap=True)
    several = len({row.gates for row in rows if row.gates}) > 1
    for (_, case, gates), found in cases_of(rows).items():
        ours = found.get(OURS)
        cells = [_time(ours), *(_reached(ours)[: len(reached)])]
        cells += [_time(found.get(name)) for name in others]
        table.add_row(f"{case} {gates}" if several else case, *cells, _speedup(ours))
    return table


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return f"[red]{row.status}[/]" if row.us is None else number(row.us)


def number(x: float) -> str:
    """Three digits that matter, or all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}"


def _reached(row: Row | None) -> list[str]:
    """Half the distance of p10 and p90, the rate of what bounds the case, and the time over the floor."""
    if row is None or row.us is None or row.p10 is None or row.p90 is None:
        return ["", "", ""]
    arithmetic = row.tflop_s is not None and (row.operations or 0) > COMPUTE_BOUND * (row.bytes or 1)
    reached = rate(None, row.tflop_s) if arithmetic else rate(row.tb_s, None)
    floor = "" if row.over_floor is None else f"{row.over_floor:.2f}"
    return [f"{50 * (row.p90 - row.p10) / row.us:.1f} %", reached, floor]


def _speedup(row: Row | None) -> str:
    if row is None or row.speedup is None:
        return ""
    style = "green" if row.speedup >= 1 else "bold red"
    return f"[{style}]{row.speedup:.2f}[/]"


def summary(rows: Sequence[Row]) -> str:
    """Geometric means and the worst case against the floor and the best peer."""
    ours = [row for row in rows if row.contender == OURS]
    parts = []
    for words, values in (
        ("times the floor", [(row.over_floor, row) for row in ours]),
        ("times as fast as the best peer", [(row.speedup, row) for row in ours]),
    ):
        known = [(value, row) for value, row in values if value is not None]
        if known:
            worst = (min if "peer" in words else max)(known, key=lambda pair: pair[0])
            mean = geometric_mean(value for value, _ in known)
            parts.append(
                f"{mean:.2f} {words} (geometric mean of {len(known)}); worst {worst[0]:.2f} in {worst[1].case}"
            )
    lost = [row for row in ours if row.speedup is not None and row.speedup < 1]
    if lost:
        parts.append(f"slower than a peer in {len(lost)} of {sum(row.speedup is not None for row in ours)} cases")
    return "; ".join(parts)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(x) for x in values]
    return math.exp(sum(logs) / len(logs))


def _troubles(rows: Iterable[Row]) -> Table:
    table = Table("case", "contender", "", "what happened", title="not timed", title_justify="left")
    for row in rows:
        table.add_row(f"{row.group} {row.case}", row.contender, row.status, escape(row.note))
    return table
