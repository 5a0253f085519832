"""Rows as tables for the terminal: of one run, and of what two have in common."""

from collections.abc import Sequence
from statistics import geometric_mean

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gated_delta.bench.peers import OURS
from gated_delta.bench.records import ABSENT, CEILINGS, Row, cases_of

COMPUTE_BOUND = 150
"""Operations a byte from which a rate of operations says more than a bandwidth."""
NOISE_US = 20.0
"""Cases shorter than this vary too much to judge a few per cent."""


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
    return f"[red]{row.status}[/]" if row.us is None else number(row.us)


def number(x: float) -> str:
    """Three digits that matter, or all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" if x >= 100 else f"{x:.2f}"


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


def compared(before: Sequence[Row], after: Sequence[Row], threshold: float) -> Group:
    """The times that changed by more than ``threshold`` (0.03 is 3 %), the most slowed down first, and what it all
    comes to. Rows are matched by group, case, gates and contender.
    """
    old, new = ({row.key: row.us for row in rows if row.us} for rows in (before, after))
    ratios = {key: new[key] / old[key] for key in old if key in new}
    table = Table("group", "case", "gates", "contender", "before", "after", "", title="us a call", title_justify="left")
    for key, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]):
        if abs(ratio - 1) > threshold:
            change = f"[{'red' if ratio > 1 else 'green'}]{100 * (ratio - 1):+.1f} %[/]"
            table.add_row(*key, number(old[key]), number(new[key]), change)
    lines = [f"{len(old.keys() - new.keys())} times only before, {len(new.keys() - old.keys())} only after"]
    ours = {key: ratio for key, ratio in ratios.items() if key[-1] == OURS}
    if ours:
        slower, faster = (sum(sign * (ratio - 1) > threshold for ratio in ours.values()) for sign in (1, -1))
        mean = 100 * (geometric_mean(ours.values()) - 1)
        lines.append(
            f"{OURS}: {slower} of {len(ours)} cases slower by more than {threshold:.0%}, {faster} faster; "
            f"geometric mean {mean:+.1f} %"
        )
    long = {key: 100 * (ratio - 1) for key, ratio in ours.items() if min(old[key], new[key]) >= NOISE_US}
    if long:
        largest = max(long, key=lambda key: abs(long[key]))
        where = " ".join(filter(None, largest))
        lines.append(f"largest change of a case over {NOISE_US:.0f} us: {long[largest]:+.1f} % ({where})")
    return Group(*([table] if table.row_count else []), *lines)
