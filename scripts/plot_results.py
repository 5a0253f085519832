"""Pictures of what ``gated-delta bench`` measured, with matplotlib: the roofline of decode, times over the floor,
speed-ups, time against size (docs/bench.md).

    python scripts/plot_results.py results/bench.csv other/bench.csv --out pictures
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gated_delta.bench import records
from gated_delta.bench.cases import STEPS
from gated_delta.bench.cli import existing_file, make_folder
from gated_delta.bench.peers import OURS
from gated_delta.bench.records import Row, cases_of, with_best_peer
from gated_delta.errors import GatedDeltaError

COLOURS = {
    OURS: "#0072b2", "flashinfer": "#d55e00", "flashqla": "#009e73", "fla": "#cc79a7", "separate": "#999999",
    "transformers": "#56b4e9",
}  # fmt: skip
"""Colour-blind people can tell them apart, too."""
COLUMN = 42
"""Most cases below each other."""
DPI = 130
LABELS = {"bytes": "bytes a call", "tb_s": "TB/s", "us": "us a call", "tokens": "tokens", "rows": "batch"}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what the rows have data for into the folder ``out``, and return the files. Of a contender that was timed
    twice in a case the last row counts; lines are drawn for the first set of gates.
    """
    cases = cases_of(row for row in rows if row.us and row.over_floor)
    timed = [row for case in cases.values() for row in with_best_peer([*case.values()])]
    gates = next((row.gates for row in timed if row.gates), "")
    first = [row for row in timed if row.gates == gates]
    single = _main_layout(row for row in first if row.group == "prefill" and row.rows == 1)
    decode = [*grouped(_main_layout(row for row in first if row.group == "decode"), _panel_of).values()]
    figures = {
        "decode-roofline": _lines("Decode: bandwidth under its roof", decode, "tb_s"),
        "scaling": _lines("Time against size", [own for own in (single, *decode[:1]) if own], "us"),
    }
    for group, own in grouped(timed, lambda row: row.group).items():
        figures[f"{group}-over-floor"] = over_floor(group, own)
        figures[f"{group}-speedup"] = speedups(group, [row for row in own if row.speedup])
    written = {out / f"{name}.png": figure for name, figure in figures.items() if figure is not None}
    for path, figure in written.items():
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    return list(written)


def _panels(title: str, row: Row, inches: tuple[float, float], **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure named after the run that ``row`` is of; ``grid``: how matplotlib divides it."""
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(f"{title}\n{row.device}  {row.date}".strip(), fontsize=11)
    return figure, figure.subplots(squeeze=False, **grid).flatten().tolist()


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows that have a key in common, in their order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def _panel_of(row: Row) -> str:
    """What is shown together: form, state and, of a verification, the tokens."""
    tokens = row.size.split()[0] if row.group == "verify" else ""
    return " ".join(filter(None, (row.form, row.state if row.group in STEPS else "", tokens)))


def _main_layout(rows: Iterable[Row]) -> list[Row]:
    """The rows of the heads that were measured most, the first of equals."""
    return max(grouped(rows, lambda row: row.heads).values(), key=len, default=[])


def _lines(title: str, panels: Sequence[Sequence[Row]], y: str) -> Figure | None:
    """Time or bandwidth (``y``) of all contenders against size, ours widest and on top; dashed: at the floor."""
    if not panels:
        return None
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = _panels(title, panels[0][0], (5.3 * across, 3.4 * down + 1), nrows=down, ncols=across)
    for each, rows in zip(axes, panels, strict=False):
        x = "bytes" if y == "tb_s" else "tokens" if rows[0].group == "prefill" else "rows"
        for name, colour in COLOURS.items():
            own = sorted((getattr(row, x), getattr(row, y)) for row in rows if row.contender == name)
            style: dict[str, Any] = {"lw": 2.4, "zorder": 3} if name == OURS else {"lw": 1.3}
            if own:
                each.plot(*zip(*own, strict=True), marker="o", ms=4, color=colour, label=name, **style)
        factor = -1 if y == "us" else 1
        floor = sorted({(getattr(row, x), getattr(row, y) * (row.over_floor or 1.0) ** factor) for row in rows})
        each.plot(*zip(*floor, strict=True), "--", color="#888888", label="at the floor")
        label = f"{rows[0].group}, heads {rows[0].heads} {_panel_of(rows[0])}"
        each.set(title=label, xscale="log", yscale="log", xlabel=LABELS[x], ylabel=LABELS[y])
        _plain_ticks(each.xaxis)
        _plain_ticks(each.yaxis)
    for each in axes[len(panels) :]:
        each.set_visible(False)
    _finish(figure, axes[: len(panels)])
    return figure


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... instead of powers of ten."""
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axis.set_tick_params(which="minor", labelsize=8)


def _finish(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    entries = {}
    for each in axes:
        each.grid(True, which="major", color="#dddddd", lw=0.6)
        each.set_axisbelow(True)
        entries |= {line.get_label(): line for line in each.get_legend_handles_labels()[0]}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False)


def over_floor(group: str, rows: Sequence[Row]) -> Figure:
    """A line a case: the times of all contenders over its floor."""
    cases = list(cases_of(rows).items())
    length = math.ceil(len(cases) / math.ceil(len(cases) / COLUMN))
    columns = [cases[i : i + length] for i in range(0, len(cases), length)]
    inches = 1.5 + 5.2 * len(columns), max(2.2, 0.2 * length + 1.6)
    figure, axes = _panels(f"{group}: time over the floor", rows[0], inches, ncols=len(columns), sharex=True)
    for each, column in zip(axes, columns, strict=True):
        for y, (_, found) in enumerate(column):
            for name, row in found.items():
                style: dict[str, Any] = {"s": 34, "zorder": 3} if name == OURS else {"s": 20, "marker": "D"}
                each.scatter(row.over_floor or 0.0, y, color=COLOURS.get(name), label=name, **style)
        each.axvline(1, color="#888888", ls="--")
        each.set(xscale="log", xlabel="times the floor", ylim=(length - 0.4, -0.6))
        each.set_yticks(range(len(column)), [case for (_, case, _), _ in column], fontsize=8)
        _plain_ticks(each.xaxis)
    _finish(figure, axes)
    return figure


def speedups(group: str, ours: Sequence[Row]) -> Figure | None:
    """A cell a case: how many times faster than the best peer; blue is faster, red slower."""
    if not ours:
        return None
    several = len({row.gates for row in ours}) > 1
    cells: dict[str, dict[str, float]] = {}
    for row in ours:
        line = " ".join(filter(None, (row.heads, _panel_of(row) or row.model, row.gates if several else "")))
        cells.setdefault(line, {})[row.size.split()[-1]] = row.speedup or math.nan
    sizes = list(dict.fromkeys(size for line in cells.values() for size in line))
    inches = 2.6 + 0.78 * len(sizes), max(2.4, 0.34 * len(cells) + 1.5)
    figure, (axes,) = _panels(f"{group}: times as fast as the best peer", ours[0], inches)
    values = [[line.get(size, math.nan) for size in sizes] for line in cells.values()]
    axes.imshow(values, cmap="RdBu", norm=LogNorm(1 / 3, 3), aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text, colour = f"{value:.2f}", "black" if 0.5 < value < 2 else "white"
            axes.text(x, y, "" if math.isnan(value) else text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_facecolor("#eeeeee")
    axes.set_xticks(range(len(sizes)), sizes, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(cells)), list(cells))
    return figure


def plot_command(
    files: Annotated[list[Path], existing_file("CSV...", "What runs have left.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures, if not that of the first file.")] = None,
) -> None:
    """Draw the pictures of one or several CSV files; where two have the same case, the last counts."""
    rows, folder = [row for file in files for row in records.read(file)], out or files[0].parent
    make_folder(folder)
    for picture in draw(rows, folder):
        print(f"written: {picture}")


def main() -> None:
    """Bad input is one sentence and exit status 1."""
    try:
        typer.run(plot_command)
    except GatedDeltaError as error:
        sys.exit(f"plot_results.py: {error}")


if __name__ == "__main__":
    main()
