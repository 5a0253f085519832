"""``gated-delta bench``: run, compare."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from typer.core import TyperGroup

from gated_delta.bench import cases, machine, peers, records
from gated_delta.bench.run import Bench
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
    cls=RunByDefault, help="Measure every operator against the hardware's floor and every installed peer."
)
console = Console() if sys.stdout.isatty() else Console(width=150)


def parsed(text: str, option: str, parse: Callable[[str], T]) -> list[T]:
    """The parts between commas, each parsed; ``parse`` raises ValueError with what a part must be."""
    found = []
    for word in filter(None, text.replace(" ", "").split(",")):
        try:
            found.append(parse(word))
        except ValueError as error:
            raise OptionError("bench", option, repr(word), str(error)) from error
    return found


def among(allowed: Iterable[T], must: str = "") -> Callable[[str], T]:
    """A parser of words that are written as one of ``allowed`` is."""
    meaning = {str(value): value for value in allowed}

    def parse(word: str) -> T:
        if word not in meaning:
            raise ValueError(must or f"of {', '.join(meaning)}")
        return meaning[word]

    return parse


def sequences(word: str) -> str:
    """The word itself, if it can be read."""
    cases.parse_sequences(word)
    return word


def existing_file(name: str, words: str = "") -> Any:
    """An argument: a file that is there and can be read."""
    return typer.Argument(metavar=name, help=words, exists=True, dir_okay=False, readable=True)


@app.command("run")
def run_command(
    groups: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(cases.GROUPS)}; else all but layer.")
    ] = None,
    heads: Annotated[str, typer.Option(help='Head layouts such as "16/32,2/8", or "all".')] = "",
    seqs: Annotated[str, typer.Option(help='Sequences such as "1x8192,2048x4", or "all".')] = "",
    batch: Annotated[str, typer.Option(help='Batches of steps, such as "1,64".')] = "",
    tokens: Annotated[str, typer.Option(help='Tokens a row of a verification, such as "2,4".')] = "",
    state: Annotated[str, typer.Option(help="States of steps: of fp32, bf16, fp16.")] = "fp32,bf16",
    gates: Annotated[str, typer.Option(help="Decay: of none, weak, mix, model.")] = "model",
    peers_: Annotated[str, typer.Option("--peers", help=f"auto, none, or of {', '.join(peers.OTHERS)}.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of each group.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.csv.")] = None,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that a contender may take for one step.")] = 120.0,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
) -> None:
    """Measure, and show a table; with --out, leave a CSV."""
    place = machine.pick_device(device)
    layouts, every = ",".join(map(str, cases.MODELS)), ",".join(cases.SEQUENCES)
    chosen = cases.select(
        parsed(",".join(groups or cases.DEFAULT_GROUPS), "GROUP", among(cases.GROUPS)),
        heads=parsed(layouts if heads == "all" else heads, "--heads", cases.parse_heads),
        sequences=parsed(every if seqs == "all" else seqs, "--seqs", sequences),
        batches=parsed(batch, "--batch", among(range(1, 65536), "a whole number in [1, 65535]")),
        tokens=parsed(tokens, "--tokens", among(range(1, 65), "a whole number in [1, 64]")),
        states=parsed(state, "--state", among(cases.STATES)), gates=parsed(gates, "--gates", among(cases.GATES)),
        quick=quick, small=place == "cpu",
    )  # fmt: skip
    contenders, absent = peers.choose(parsed(peers_, "--peers", str), place)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if place == "cpu":
        console.print("On the CPU: smaller cases than on a GPU unless named, and times that show the order only.")
    absentees = [records.Row(records.ABSENT, name, name, "absent", note=why) for name, why in absent.items()]
    rows = absentees
    jobs = 0 if place == "cpu" else min(MOST_JOBS, os.cpu_count() or 1)
    bench = Bench(place, contenders, chosen, machine.facts(place), limit, jobs, _say)
    for found in track(bench.run(), "measuring", len(chosen), console=console):
        rows = [*found, *absentees]
        if out is not None:  # a run that is cut off leaves what it has
            records.write(out / "bench.csv", rows)
    console.print(records.tables(rows))
    if out is not None:
        _say(f"written: {out / 'bench.csv'}")


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


@app.command("compare")
def compare_command(
    before: Annotated[Path, existing_file("A.csv")],
    after: Annotated[Path, existing_file("B.csv")],
) -> None:
    """Our times in B, with those in A beside them: below 1 in the last column it got slower."""
    console.print(records.tables(records.compared(records.read(before), records.read(after))))
