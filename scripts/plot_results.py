"""Pictures of what ``gated-delta bench`` measured, with matplotlib: for each group times over the floor, and speed-ups
(docs/bench.md).

    python scripts/plot_results.py results/bench.csv other/bench.csv --out pictures
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gated_delta.bench import records
from gated_delta.bench.cases import STEPS
from gated_delta.bench.peers import OURS
from gated_delta.bench.records import Row, cases_of, with_best_peer
from gated_delta.cli import existing_file
from gated_delta.errors import GatedDeltaError

COLOURS = {
    OURS: "#0072b2", "flashinfer": "#d55e00", "flashqla": "#009e73", "fla": "#cc79a7", "separate": "#999999",
    "transformers": "#56b4e9",
}  # fmt: skip
"""Colour-blind people can tell them apart, too."""
DPI = 130


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what the rows have data for into the folder ``out``, and return the files. Of a contender that was timed
    twice in a case the last row counts.
    """
    groups, written = dict[str, list[Row]](), []
    for case in cases_of(row for row in rows if row.us and row.over_floor).values():
        for row in with_best_peer([*case.values()]):
            groups.setdefault(row.group, []).append(row)
    for group, own in groups.items():
        figures = {"over-floor": over_floor(group, own)}
        if ours := [row for row in own if row.speedup]:
            figures["speedup"] = speedups(group, ours)
        for name, figure in figures.items():
            written.append(out / f"{group}-{name}.png")
            figure.savefig(written[-1], dpi=DPI, bbox_inches="tight")
    return written


def _empty(title: str, row: Row, inches: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure named after the run that ``row`` is of."""
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(f"{title}\n{row.device}  {row.date}".strip(), fontsize=11)
    return figure, figure.subplots()


def over_floor(group: str, rows: Sequence[Row]) -> Figure:
    """A line a case: the times of all contenders over its floor."""
    cases = cases_of(rows)
    figure, axes = _empty(f"{group}: time over the floor", rows[0], (6.7, max(2.2, 0.2 * len(cases) + 1.6)))
    entries = {}
    for y, found in enumerate(cases.values()):
        for name, row in found.items():
            style: dict[str, Any] = {"s": 34, "zorder": 3} if name == OURS else {"s": 20, "marker": "D"}
            entries[name] = axes.scatter(row.over_floor or 0.0, y, color=COLOURS.get(name, "#e69f00"), **style)
    axes.axvline(1, color="#888888", ls="--")
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.set(xscale="log", xlabel="times the floor", ylim=(len(cases) - 0.4, -0.6), axisbelow=True)
    axes.set_yticks(range(len(cases)), [case for _, case, _ in cases], fontsize=8)
    # 1, 2, 5, 10, ... instead of powers of ten
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.tick_params(axis="x", which="minor", labelsize=8)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False)
    return figure


def speedups(group: str, ours: Sequence[Row]) -> Figure:
    """A cell a case: how many times faster than the best peer; blue is faster, red slower."""
    several = len({row.gates for row in ours}) > 1
    cells: dict[str, dict[str, float]] = {}
    for row in ours:
        tokens = row.size.split()[0] if group == "verify" else ""
        layout = " ".join(filter(None, (row.form, row.state if group in STEPS else "", tokens)))
        line = " ".join(filter(None, (row.heads, layout or row.model, row.gates if several else "")))
        cells.setdefault(line, {})[row.size.split()[-1]] = row.speedup or math.nan
    sizes = list(dict.fromkeys(size for line in cells.values() for size in line))
    inches = 2.6 + 0.78 * len(sizes), max(2.4, 0.34 * len(cells) + 1.5)
    figure, axes = _empty(f"{group}: times as fast as the best peer", ours[0], inches)
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


def plot(
    files: Annotated[list[Path], existing_file(metavar="CSV...", help="What runs have left.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures, if not that of the first file.")] = None,
) -> None:
    """Draw the pictures of one or several CSV files; where two have the same case, the last counts."""
    folder = out or files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for picture in draw([row for file in files for row in records.read(file)], folder):
        print(f"written: {picture}")


def main() -> None:
    """Bad input is one sentence and exit status 1."""
    try:
        typer.run(plot)
    except (GatedDeltaError, OSError) as error:
        sys.exit(f"plot_results.py: {error}")


if __name__ == "__main__":
    main()
