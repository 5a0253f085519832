"""Pictures of rows, with matplotlib where it is installed: the roofline of decode, times over the floor, speed-ups over
the best peer, and how times grow with length and batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gated_delta.bench.peers import OURS
from gated_delta.bench.records import CEILINGS, Row, cases_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = 'matplotlib is not installed (pip install "gated-delta[bench]")'
COLOURS = {OURS: "#0072b2", "flashinfer": "#d55e00", "flashqla": "#009e73", "fla": "#cc79a7"}
MORE_COLOURS = ("#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""For other contenders; colour-blind people can tell them apart, too."""
COLUMN = 42
"""Most cases below each other."""
FLOORED = ("prefill", "decode", "verify", "conv", "norm")
DPI = 130


def missing() -> bool:
    return find_spec("matplotlib") is None


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what the rows have data for into the folder ``out``, and return the files. Of a contender that was timed
    twice in a case the last row counts; lines are drawn for the first set of gates.
    """
    timed = list({row.key: row for row in rows if row.us is not None}.values())
    gates = next((row.gates for row in timed if row.gates), "")
    lines = [row for row in timed if row.gates in ("", gates)]
    figures: dict[str, Figure | None] = {"decode-roofline": roofline(lines), "scaling": scaling(lines)}
    for group in FLOORED:
        own = [row for row in timed if row.group == group]
        figures[f"{group}-over-floor"] = over_floor(group, own)
        figures[f"{group}-speedup"] = speedups(group, own)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(out / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI, bbox_inches="tight")
    return written


def _figure(title: str, rows: Sequence[Row], width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    first = next((row for row in rows if row.device), rows[0])
    figure.suptitle(f"{title}\n{first.device}  {first.date}".strip(), fontsize=11)
    return figure


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    names = dict.fromkeys(row.contender for row in rows)
    others = [name for name in names if name not in COLOURS]
    more = {name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(others)}
    return {name: colour for name, colour in (COLOURS | more).items() if name in names}


def _panel(row: Row) -> str:
    """What is shown together: form, state and, of a verification, the tokens."""
    tokens = row.size.split()[0] if row.size.startswith("T=") else ""
    return " ".join(word for word in (row.form, row.state if row.group in ("decode", "verify") else "", tokens) if word)


def _main_layout(rows: Sequence[Row]) -> list[Row]:
    """The rows of the heads that were measured most, the last of equals."""
    counts = Counter(row.heads for row in rows)
    most = max(reversed(counts), key=counts.__getitem__)
    return [row for row in rows if row.heads == most]


def _line(axes: Axes, rows: Sequence[Row], x: str, y: str, colours: dict[str, str]) -> None:
    """A line a contender, ours the widest and on top."""
    for name, colour in colours.items():
        points = sorted((getattr(row, x), getattr(row, y)) for row in rows if row.contender == name)
        if points:
            style: dict[str, Any] = {"lw": 2.4, "zorder": 3} if name == OURS else {"lw": 1.3}
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=name, **style)


def _finish(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for each in axes:
        each.grid(True, which="major", color="#dddddd", lw=0.6)
        each.set_axisbelow(True)
        handles, labels = each.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... instead of powers of ten."""
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axis.set_tick_params(which="minor", labelsize=8)


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Bandwidth against the bytes of a call, under the smallest kernel's time and the in-place bandwidth."""
    decode = [row for row in rows if row.group == "decode" and row.bytes and row.tb_s]
    if not decode:
        return None
    chosen = _main_layout(decode)
    panels, colours = list(dict.fromkeys(map(_panel, chosen))), _colours(chosen)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _figure(f"Decode, heads {chosen[0].heads}: bandwidth under its roof", chosen, 5.2 * across, 3.4 * down + 1)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for each, panel in zip(axes, panels, strict=False):
        own = [row for row in chosen if _panel(row) == panel]
        _roof(each, rows, own)
        _line(each, own, "bytes", "tb_s", colours)
        each.set(title=panel, xscale="log", yscale="log", xlabel="bytes a call", ylabel="TB/s")
        each.tick_params(labelbottom=True)
        _plain_ticks(each.yaxis)
    for each in axes[len(panels) :]:
        each.set_visible(False)
    _finish(figure, axes[: len(panels)])
    return figure


def _roof(axes: Axes, rows: Sequence[Row], own: Sequence[Row]) -> None:
    """The least time of a kernel, then the largest in-place bandwidth."""
    machine = {row.case: row for row in rows if row.group == CEILINGS}
    smallest = machine.get("smallest")
    top = max((row.tb_s for name, row in machine.items() if name.startswith("in-place") and row.tb_s), default=None)
    if smallest is None or smallest.us is None or top is None:
        return
    sizes, least = [row.bytes or 1 for row in own], smallest.us
    low, high, corner = min(sizes) / 2, max(sizes) * 2, top * least * 1e6
    points = [low, corner, high] if low < corner < high else [low, high]
    axes.plot(points, [min(top, x / least / 1e6) for x in points], "--", color="#888888", label="roof")


def over_floor(group: str, rows: Sequence[Row]) -> Figure | None:
    """A line a case: the times of all contenders over its floor."""
    rows = [row for row in rows if row.over_floor is not None]
    if not rows:
        return None
    cases, colours = list(cases_of(rows).items()), _colours(rows)
    length = math.ceil(len(cases) / math.ceil(len(cases) / COLUMN))
    columns = [cases[i : i + length] for i in range(0, len(cases), length)]
    height = max(2.2, 0.2 * length + 1.6)
    figure = _figure(f"{group}: time over the floor", rows, 1.5 + 5.2 * len(columns), height)
    axes = figure.subplots(1, len(columns), squeeze=False, sharex=True).flatten().tolist()
    for each, column in zip(axes, columns, strict=True):
        for y, (_, found) in enumerate(column):
            for name, row in found.items():
                style: dict[str, Any] = {"s": 34, "zorder": 3} if name == OURS else {"s": 20, "marker": "D"}
                each.scatter(row.over_floor, y, color=colours[name], label=name, **style)
        each.axvline(1, color="#888888", ls="--")
        names = [case for (_, case, _), _ in column]
        each.set(xscale="log", xlabel="times the floor", ylim=(length - 0.4, -0.6))
        each.set_yticks(range(len(names)), names, fontsize=8)
        _plain_ticks(each.xaxis)
    _finish(figure, axes)
    return figure


def speedups(group: str, rows: Sequence[Row]) -> Figure | None:
    """A cell a case: how many times faster than the best peer; blue is faster, red slower."""
    from matplotlib.colors import LogNorm  # noqa: PLC0415

    ours = [row for row in rows if row.contender == OURS and row.speedup is not None]
    if not ours:
        return None
    several = len({row.gates for row in ours}) > 1

    def line(row: Row) -> str:
        words = (row.heads, _panel(row) or row.model, row.gates if several else "")
        return " ".join(word for word in words if word)

    lines = list(dict.fromkeys(map(line, ours)))
    sizes = list(dict.fromkeys(row.size.split()[-1] for row in ours))
    figure = _figure(
        f"{group}: times as fast as the best peer", ours, 2.6 + 0.78 * len(sizes), max(2.4, 0.34 * len(lines) + 1.5)
    )
    axes = figure.subplots()
    cells = [[math.nan] * len(sizes) for _ in lines]
    for row in ours:
        y, x = lines.index(line(row)), sizes.index(row.size.split()[-1])
        cells[y][x] = row.speedup or math.nan
        dark = not 0.5 < cells[y][x] < 2
        axes.text(x, y, f"{cells[y][x]:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.imshow(cells, cmap="RdBu", norm=LogNorm(1 / 3, 3), aspect="auto")
    axes.set_facecolor("#eeeeee")
    axes.set_xticks(range(len(sizes)), sizes, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(lines)), lines)
    return figure


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Time against the length of a single sequence, and against the batch of a step."""
    single = [row for row in rows if row.group == "prefill" and row.rows == 1]
    steps = [row for row in rows if row.group == "decode"]
    steps = [row for row in _main_layout(steps) if _panel(row) == _panel(steps[0])] if steps else []
    shown = [
        (_main_layout(part), x, title)
        for part, x, title in ((single, "tokens", "prefill of one sequence"), (steps, "rows", "decode"))
        if part and len({getattr(row, x) for row in part}) > 1
    ]
    if not shown:
        return None
    colours = _colours(row for part, _, _ in shown for row in part)
    figure = _figure("Time against size", shown[0][0], 5.4 * len(shown), 4.6)
    axes = figure.subplots(1, len(shown), squeeze=False).flatten().tolist()
    for each, (part, x, title) in zip(axes, shown, strict=True):
        _line(each, part, x, "us", colours)
        floors = sorted({(getattr(row, x), row.floor_us) for row in part if row.floor_us})
        if floors:
            each.plot(*zip(*floors, strict=True), "--", color="#888888", label="floor")
        label = {"tokens": "tokens", "rows": "batch"}[x]
        each.set(title=f"{title}, heads {part[0].heads} {_panel(part[0])}", xlabel=label, ylabel="us a call")
        each.set(xscale="log", yscale="log")
    _finish(figure, axes)
    return figure
