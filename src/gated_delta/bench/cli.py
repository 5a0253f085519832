"""``gated-delta bench``: run, plot, compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from typer.core import TyperGroup

from gated_delta.bench import cases, machine, peers, plots, records, report
from gated_delta.bench.compare import compare
from gated_delta.bench.run import Bench
from gated_delta.bench.soak import soak
from gated_delta.errors import OptionError

T = TypeVar("T")
MOST_JOBS = 16
"""Processes that compile ahead."""


class RunByDefault(TyperGroup):
    """``bench prefill`` means ``bench run prefill``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault, help="Measure every operator against the hardware's floor and every installed peer.",
    no_args_is_help=False,
)  # fmt: skip
console = Console() if sys.stdout.isatty() else Console(width=150)


def parsed(text: str, option: str, parse: Callable[[str], T], every: Sequence[T] = ()) -> list[T]:
    """The parts between commas of an option, each parsed; ``every`` for "all". Nothing for an option not given."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if text and not words:
        raise OptionError("bench", option, repr(text), "at least one, with commas between several")
    return list(every) if every and words == ["all"] else [parse(word) for word in words]


def among(text: str, option: str, allowed: Sequence[str]) -> list[str]:
    words = parsed(text, option, str)
    for word in words:
        if word not in allowed:
            raise OptionError("bench", option, repr(word), f"of {', '.join(allowed)}")
    return words


def counts(text: str, option: str, most: int) -> list[int]:
    words = parsed(text, option, str)
    for word in words:
        if not word.isdecimal() or not 1 <= int(word) <= most:
            raise OptionError("bench", option, repr(word), f"a whole number in [1, {most}]")
    return [int(word) for word in words]


def sequences_of(text: str) -> list[str]:
    words = parsed(text, "--seqs", str, cases.SEQUENCES)
    for word in words:
        cases.parse_sequences(word)
    return words


@app.command("run")
def run_command(
    groups: Annotated[
        list[str] | None,
        typer.Argument(help="Of prefill, decode, verify, conv, norm, host, layer; all but layer if none is named."),
    ] = None,
    heads: Annotated[str, typer.Option(help='Head layouts such as "16/32,2/8", or "all".')] = "",
    seqs: Annotated[str, typer.Option(help='Sequences such as "1x8192,2048x4", or "all".')] = "",
    batch: Annotated[str, typer.Option(help='Batches of steps, such as "1,64".')] = "",
    tokens: Annotated[str, typer.Option(help='Tokens a row of a verification, such as "2,4".')] = "",
    state: Annotated[str, typer.Option(help="States of steps: of fp32, bf16, fp16.")] = "fp32,bf16",
    gates: Annotated[str, typer.Option(help="Decay: of none, weak, mix, model.")] = "model",
    peers_: Annotated[
        str, typer.Option("--peers", help="auto, none, or of flashinfer, flashqla, fla, transformers.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of each group.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.csv and the pictures.")] = None,
    soak_: Annotated[int, typer.Option("--soak", min=0, help="Instead: so many random calls, checked.")] = 0,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that a contender may take for one step.")] = 120.0,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
) -> None:
    """Measure, and show a table; with --out, leave a CSV and pictures."""
    from gated_delta.cli import pick_device  # noqa: PLC0415 - it mounts this module

    place = pick_device(device)
    if soak_:
        with _bar(soak_) as (advance, tell):
            fine = soak(soak_, torch.device(place), advance, tell)
        raise typer.Exit(0 if fine else 1)
    chosen = cases.select(
        among(",".join(groups or cases.DEFAULT_GROUPS), "GROUP", cases.GROUPS),
        heads=parsed(heads, "--heads", cases.parse_heads, list(cases.MODELS)), sequences=sequences_of(seqs),
        batches=counts(batch, "--batch", 1 << 20), tokens=counts(tokens, "--tokens", 64),
        states=among(state, "--state", tuple(cases.STATES)), gates=among(gates, "--gates", cases.GATES),
        quick=quick, small=place == "cpu",
    )  # fmt: skip
    contenders, absent = peers.choose(parsed(peers_, "--peers", str), place)
    if out is not None:
        _make_folder(out)
    if place == "cpu":
        console.print("On the CPU: smaller cases than on a GPU unless named, and times that show the order only.")
    absentees = [records.Row(records.ABSENT, name, name, "absent", note=why) for name, why in absent.items()]
    with _bar(len(chosen)) as (advance, tell):

        def done() -> None:
            advance()
            if out is not None:  # a run that is cut off leaves what it has
                records.write(out / "bench.csv", [*bench.rows(), *absentees])

        jobs = 0 if place == "cpu" else min(MOST_JOBS, os.cpu_count() or 1)
        bench = Bench(place, contenders, chosen, machine.facts(place), limit, jobs, done, tell)
        rows = [*bench.run(), *absentees]
    console.print(report.tables(rows))
    if out is not None:
        records.write(out / "bench.csv", rows)
        _say(f"written: {out / 'bench.csv'}")
        _draw(rows, out)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("bench", "--out", f"{out} ({error.strerror})", "a folder, or a name for a new one") from error


@contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Progress over cases: a function that moves it on, and one that prints a line above it."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task), _say


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


def _draw(rows: Sequence[records.Row], out: Path) -> None:
    """The pictures, if they can be drawn."""
    if plots.missing():
        _say(f"no pictures: {plots.MISSING}; gated-delta bench plot draws them later")
        return
    for file in plots.draw(rows, out):
        _say(f"written: {file}")


@app.command("plot")
def plot_command(
    files: Annotated[list[Path], typer.Argument(metavar="CSV...", help="What runs have left.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures, if not that of the first file.")] = None,
) -> None:
    """Draw the pictures of one or several CSV files again."""
    rows = [row for file in files for row in records.read(file)]
    if plots.missing():
        raise OptionError("bench plot", "matplotlib", "not installed", plots.MISSING)
    folder = out or files[0].parent
    _make_folder(folder)
    _draw(rows, folder)


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.csv")],
    after: Annotated[Path, typer.Argument(metavar="B.csv")],
    threshold: Annotated[float, typer.Option(min=0, help="Per cent of change that is shown.")] = 3.0,
) -> None:
    """What got slower, or faster, from one run to another."""
    console.print(compare(records.read(before), records.read(after), threshold / 100))
