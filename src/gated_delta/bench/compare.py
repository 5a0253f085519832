"""Two runs: what got slower, what got faster, and how far runs of one build agree."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gated_delta.bench.peers import OURS
from gated_delta.bench.records import CEILINGS, Row
from gated_delta.bench.report import number

NOISE_US = 20.0
"""Cases shorter than this vary too much to judge a few per cent."""


def compare(before: Sequence[Row], after: Sequence[Row], threshold: float) -> Group:
    """The times that changed by more than ``threshold`` (0.03 is 3 %), the most slowed down first, and what it all
    comes to. Rows are matched by group, case, gates and contender.
    """
    old, new = ({row.key: row for row in rows if row.us} for rows in (before, after))
    ratios = {key: (new[key].us or 0.0) / (old[key].us or 1.0) for key in old if key in new}
    shown = Table("group", "case", "contender", "before", "after", "", title="us a call", title_justify="left")
    for key, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]):
        if abs(ratio - 1) > threshold:
            group, case, gates, contender = key
            times = (number(old[key].us or 0), number(new[key].us or 0))
            change = f"[{'red' if ratio > 1 else 'green'}]{100 * (ratio - 1):+.1f} %[/]"
            shown.add_row(group, f"{case} {gates}".strip(), contender, *times, change)
    lines = _machines(before, after)
    for title, keys in (("only before", old.keys() - new.keys()), ("only after", new.keys() - old.keys())):
        if keys:
            lines.append(f"{title}: {len(keys)} times, such as {_named(min(keys))}")
    long = {key for key in ratios if min(old[key].us or 0, new[key].us or 0) >= NOISE_US}
    lines += _ours({key: x for key, x in ratios.items() if key[3] == OURS and key[0] != CEILINGS}, long, threshold)
    return Group(*([shown] if shown.row_count else []), *map(Text, lines))


def _named(key: tuple[str, ...]) -> str:
    return " ".join(filter(None, key))


def _machines(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """The facts about the two runs that differ."""
    lines = []
    for name in ("device", "driver", "torch", "cuda", "triton", "commit"):
        old, new = (getattr(rows[0], name) if rows else "" for rows in (before, after))
        if old != new:
            lines.append(f"{name}: {old or 'unknown'} before, {new or 'unknown'} after")
    return lines


def _ours(ratios: dict[tuple[str, ...], float], long: set[tuple[str, ...]], threshold: float) -> list[str]:
    """What became of our own times, and the largest change of one that is ``long`` enough to trust."""
    if not ratios:
        return [f"no case of {OURS} was timed in both"]
    slower, faster = (sum(sign * (x - 1) > threshold for x in ratios.values()) for sign in (1, -1))
    mean = 100 * (geometric_mean(ratios.values()) - 1)
    lines = [
        f"{OURS}: {slower} of {len(ratios)} cases slower by more than {threshold:.0%}, {faster} faster; "
        f"geometric mean {mean:+.1f} %"
    ]
    largest = max(long & ratios.keys(), key=lambda key: abs(ratios[key] - 1), default=None)
    if largest is not None:
        change = f"{100 * (ratios[largest] - 1):+.1f} % ({_named(largest)})"
        lines.append(f"largest change of a case over {NOISE_US:.0f} us: {change}")
    return lines
