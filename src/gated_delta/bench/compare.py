"""Two runs: what got slower, what got faster, and how far runs of one build agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from gated_delta.bench.peers import OURS
from gated_delta.bench.records import CEILINGS, Row
from gated_delta.bench.report import NOISE_US, geometric_mean, number


class Change(NamedTuple):
    """One contender in one case of both runs."""

    before: Row
    after: Row
    ratio: float
    """time after over time before"""


class Comparison(NamedTuple):
    """What two runs have in common and what not."""

    changes: list[Change]
    """of contenders timed in both, the most slowed down first"""
    lost: list[Row]
    """timed before, and afterwards absent or with another status"""
    gained: list[Row]
    """the other way round"""
    differing: dict[str, tuple[str, str]]
    """facts of the machines that differ, before and after"""


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Match the rows of two runs by group, case, gates and contender."""
    old, new = ({row.key: row for row in rows if row.us is not None} for rows in (before, after))
    shared = [Change(old[key], new[key], new[key].us / old[key].us) for key in old if key in new]  # type: ignore[operator]
    differing = {}
    for name in ("device", "driver", "torch", "cuda", "triton", "commit"):
        values = tuple(str(getattr(rows[0], name)) if rows else "" for rows in (before, after))
        if values[0] != values[1]:
            differing[name] = (values[0], values[1])
    changes = sorted(shared, key=lambda change: -change.ratio)
    lost = [old[key] for key in old if key not in new]
    return Comparison(changes, lost, [new[key] for key in new if key not in old], differing)


def table(found: Comparison, threshold: float) -> Table:
    """Changes of more than ``threshold`` (0.03 is 3 %), the worst first."""
    shown = Table("group", "case", "contender", "before", "after", "", title="us a call", title_justify="left")
    for change in found.changes:
        if abs(change.ratio - 1) > threshold:
            row, style = change.after, "red" if change.ratio > 1 else "green"
            times = (number(change.before.us or 0), number(change.after.us or 0))
            shown.add_row(row.group, row.case, row.contender, *times, f"[{style}]{100 * (change.ratio - 1):+.1f} %[/]")
    return shown


def words(found: Comparison, threshold: float) -> list[str]:
    """What the comparison comes to, a sentence a line."""
    lines = [
        f"{name}: {old or 'unknown'} before, {new or 'unknown'} after" for name, (old, new) in found.differing.items()
    ]
    for title, rows in (("only before", found.lost), ("only after", found.gained)):
        if rows:
            names = ", ".join(f"{row.group} {row.case} ({row.contender})" for row in rows[:5])
            lines.append(f"{title}: {len(rows)} times, such as {names}")
    ours = [c for c in found.changes if c.after.contender == OURS and c.after.group != CEILINGS]
    if not ours:
        return [*lines, f"no case of {OURS} was timed in both"]
    slower = sum(change.ratio > 1 + threshold for change in ours)
    faster = sum(change.ratio < 1 - threshold for change in ours)
    mean = geometric_mean(change.ratio for change in ours)
    lines.append(
        f"{OURS}: {slower} of {len(ours)} cases slower by more than {threshold:.0%}, {faster} faster; "
        f"geometric mean {100 * (mean - 1):+.1f} %"
    )
    long = [change for change in ours if min(change.before.us or 0, change.after.us or 0) >= NOISE_US]
    if long:
        largest = max(long, key=lambda change: abs(change.ratio - 1))
        lines.append(
            f"largest change of a case over {NOISE_US:.0f} us: {100 * (largest.ratio - 1):+.1f} % "
            f"({largest.after.group} {largest.after.case})"
        )
    return lines
