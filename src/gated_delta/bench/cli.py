"""``gated-delta bench``: run, plot, compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from typer.core import TyperGroup

from gated_delta.bench import cases, compare, machine, peers, plots, records, report, soak
from gated_delta.bench.run import Bench
from gated_delta.errors import OptionError

T = TypeVar("T")


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


def words_of(text: str | None) -> list[str] | None:
    """The parts between commas; None for None."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def parsed(text: str | None, option: str, parse: Callable[[str], T]) -> list[T] | None:
    """Every part of an option, parsed."""
    words = words_of(text)
    if words is not None and not words:
        raise OptionError("bench", option, repr(text), "at least one, with commas between several")
    return None if words is None else [parse(word) for word in words]


def among(option: str, allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(word: str) -> str:
        if word not in allowed:
            raise OptionError("bench", option, repr(word), f"of {', '.join(allowed)}")
        return word

    return parse


def counting(option: str, least: int = 1, most: int = 1 << 20) -> Callable[[str], int]:
    def parse(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) <= most:
            raise OptionError("bench", option, repr(word), f"a whole number in [{least}, {most}]")
        return int(word)

    return parse


def heads_of(text: str | None) -> list[cases.Heads] | None:
    return list(cases.MODELS) if text == "all" else parsed(text, "--heads", cases.parse_heads)


def sequences_of(text: str | None) -> list[str] | None:
    words = [*cases.SEQUENCES, *cases.MORE_SEQUENCES] if text == "all" else parsed(text, "--seqs", str)
    for word in words or ():
        cases.parse_sequences(word)
    return words


@app.command("run")
def run_command(
    groups: Annotated[
        list[str] | None,
        typer.Argument(help="Of prefill, decode, verify, conv, norm, host, layer; all but layer if none is named."),
    ] = None,
    heads: Annotated[str | None, typer.Option(help='Head layouts such as "16/32,2/8", or "all".')] = None,
    seqs: Annotated[str | None, typer.Option(help='Sequences such as "1x8192,2048x4", or "all".')] = None,
    batch: Annotated[str | None, typer.Option(help='Batches of steps, such as "1,64".')] = None,
    tokens: Annotated[str | None, typer.Option(help='Tokens a row of a verification, such as "2,4".')] = None,
    state: Annotated[str, typer.Option(help="States of steps: of fp32, bf16, fp16.")] = "fp32,bf16",
    gates: Annotated[str, typer.Option(help="Decay: of none, weak, mix, model.")] = "model",
    peers_: Annotated[
        str, typer.Option("--peers", help="auto, none, or of flashinfer, flashqla, fla, transformers, your.module.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of each group.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.csv and the pictures.")] = None,
    soak: Annotated[int, typer.Option(min=0, help="Instead: so many random calls, checked, memory watched.")] = 0,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that a contender may take for one step.")] = 120.0,
    jobs: Annotated[int, typer.Option(min=-1, help="Processes that compile ahead on a GPU; -1: one a core.")] = -1,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
) -> None:
    """Measure, and show a table; with --out, leave a CSV and pictures."""
    from gated_delta.cli import pick_device  # noqa: PLC0415 - it mounts this module

    place = pick_device(device)
    if soak:
        _soak(soak, place)
        return
    selection = cases.Selection(
        groups=[among("GROUP", cases.GROUPS)(group) for group in groups or cases.DEFAULT_GROUPS],
        heads=heads_of(heads), sequences=sequences_of(seqs), batches=parsed(batch, "--batch", counting("--batch")),
        tokens=parsed(tokens, "--tokens", counting("--tokens", most=64)),
        states=parsed(state, "--state", among("--state", tuple(cases.STATES))) or (),
        gates=parsed(gates, "--gates", among("--gates", cases.GATES)) or (), quick=quick, small=place == "cpu",
    )  # fmt: skip
    chosen = cases.select(selection)
    adapters, absent = peers.choose(words_of(peers_) or ["auto"], place)
    if out is not None:
        _make_folder(out)
    if place == "cpu":
        console.print(
            "On the CPU: smaller cases than on a GPU unless they are named, and times that show the order only."
        )
    absentees = [records.Row(records.ABSENT, name, name, "absent", note=why) for name, why in absent.items()]
    with _bar(len(chosen)) as (advance, tell):

        def done() -> None:
            advance()
            if out is not None:  # a run that is cut off leaves what it has
                records.write(out / "bench.csv", [*bench.rows(), *absentees])

        bench = Bench(
            place, adapters, chosen, machine.facts(place), limit=limit, advance=done, tell=tell,
            jobs=0 if place == "cpu" else min(16, os.cpu_count() or 1) if jobs < 0 else jobs,
        )  # fmt: skip
        rows = [*bench.run(), *absentees]
    console.print(report.tables(rows, absent))
    if out is not None:
        _leave(rows, out)


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
        yield lambda: bar.advance(task), lambda words: bar.console.print(words, markup=False, highlight=False)


def _leave(rows: list[records.Row], out: Path) -> None:
    """The CSV, and the pictures if they can be drawn."""
    file = out / "bench.csv"
    records.write(file, rows)
    console.print(f"written: {file}", markup=False, highlight=False)
    if plots.missing():
        console.print(f"no pictures: {plots.MISSING}; gated-delta bench plot {file} draws them later", markup=False)
    else:
        _draw(rows, out)


def _draw(rows: list[records.Row], out: Path) -> None:
    for file in plots.draw(rows, out):
        console.print(f"written: {file}", markup=False, highlight=False)


@app.command("plot")
def plot_command(
    files: Annotated[list[Path], typer.Argument(metavar="CSV...", help="What runs have left.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; that of the first file if not given.")
    ] = None,
) -> None:
    """Draw the pictures of one or several CSV files again."""
    rows = [row for file in files for row in records.read(file)]
    if plots.missing():
        raise OptionError("bench plot", "matplotlib", "not installed", plots.MISSING)
    folder = files[0].parent if out is None else out
    _make_folder(folder)
    _draw(rows, folder)


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.csv")],
    after: Annotated[Path, typer.Argument(metavar="B.csv")],
    threshold: Annotated[float, typer.Option(min=0, help="Per cent of change that is shown.")] = 3.0,
) -> None:
    """What got slower, or faster, from one run to another."""
    found = compare.compare(records.read(before), records.read(after))
    shown = compare.table(found, threshold / 100)
    if shown.row_count:
        console.print(shown)
    for line in compare.words(found, threshold / 100):
        console.print(line, markup=False, highlight=False)


def _soak(calls: int, device: str) -> None:
    """Random calls of all operators, and what they did to memory."""
    with _bar(calls) as (advance, tell):
        found = soak.soak(calls, torch.device(device), advance=advance, tell=tell)
    console.print(found.words(), markup=False, highlight=False)
    if found.faults or found.leaks:
        raise typer.Exit(1)
