"""The ``gated-delta`` command."""

import codecs
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    sys.exit('gated-delta: the command line needs more packages: pip install "gated-delta[cli]"')

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

from gated_delta import __version__
from gated_delta.bench import cases, machine, peers, records
from gated_delta.bench.machine import pick_device
from gated_delta.bench.run import Bench
from gated_delta.dispatch import OPERATORS, explain
from gated_delta.errors import GatedDeltaError, OptionError
from gated_delta.model.generation import Options, Summary, generate, generate_checkpoint, score
from gated_delta.model.network import load_model, weights_facts
from gated_delta.testing.selftest import CASES
from gated_delta.validation.arguments import Arguments

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Gated Delta Net: generate text, score text, check this machine.",
)  # fmt: skip
console, wide = Console(), Console() if sys.stdout.isatty() else Console(width=150)
"""The second is that of tables of many columns."""

T = TypeVar("T")
MOST_JOBS = 16
"""Processes that compile ahead for a benchmark."""
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

existing_file = partial(typer.Argument, exists=True, dir_okay=False, readable=True)
DeviceOption = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda"; auto takes a GPU that a backend serves.')]


def printable(text: str) -> str:
    """Without the bytes that are no text."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face checkpoint; else: bundled.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate; the bundled model's are bytes.")] = 200,
    speculative: Annotated[int, typer.Option(min=0, max=64, help="Most bytes drafted a step; 0: none.")] = 0,
    state_dtype: Annotated[str, typer.Option(help="Storage of the recurrent state: fp32 or bf16.")] = "fp32",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """Continue a text with the bundled Gated Delta Net language model, or with a checkpoint of yours."""
    Arguments("generate").word("--state-dtype", state_dtype, STATE_DTYPES, " or ".join(STATE_DTYPES))
    dtype = STATE_DTYPES[state_dtype]
    options = Options(tokens=tokens, drafts=speculative, temperature=temperature, seed=seed, state_dtype=dtype)
    place, summary = pick_device(device), Summary()
    if model is None:
        stream = generate(load_model(place), prompt.encode(errors="surrogateescape"), options, summary)
    else:
        stream = generate_checkpoint(model, printable(prompt), options, summary, place)
    first = next(stream)  # runs the prompt: bad input ends here, before anything is printed
    console.out(printable(prompt), style="bold", end="", highlight=False)
    for text in codecs.iterdecode(chain([first], stream), "utf-8", errors="replace"):
        console.out(text, end="", highlight=False)
    console.print("\n")
    console.print(_summary_table(summary, place))


def _summary_table(summary: Summary, device: str) -> Table:
    table, decoded = Table(box=None, show_header=False, padding=(0, 2, 0, 0)), summary.tokens - 1
    table.add_row("prefill", f"{summary.prompt_tokens} tokens, {summary.prefill_rate:,.0f} tokens/s on {device}")
    table.add_row("decode", f"{decoded} tokens, {summary.decode_rate:,.0f} tokens/s in {summary.steps} steps")
    if summary.drafted:
        note = f"{summary.tokens_per_step:.2f} tokens a step ({summary.drafted} drafted, {summary.accepted} accepted)"
        table.add_row("speculation", note)
    table.add_row(
        "state",
        f"{summary.state_bytes:,} bytes of GDN state at any length; the KV cache of these layers would take "
        f"{summary.replaced_kv_bytes:,} at {summary.prompt_tokens + summary.tokens - 1} tokens",
    )
    table.add_row("", f"{summary.kv_bytes:,} bytes of KV cache for the attention layers that the model keeps")
    return table


@app.command("score")
def score_command(
    file: Annotated[Path, existing_file(metavar="FILE", help="Any text file.")], device: DeviceOption = "auto"
) -> None:
    """Bits per byte of a text file, with the state kept in fp32 and in bf16."""
    text, place = file.read_bytes(), pick_device(device)
    model = load_model(place)
    title = escape(f"{printable(file.name)}: {len(text):,} bytes on {place}")
    table = Table("state", "bits per byte", "against fp32", title=title)
    exact: float | None = None
    for name, dtype in STATE_DTYPES.items():
        progress = partial(track, description=f"state in {name}", console=console)
        bits = score(model, text, state_dtype=dtype, track=progress)
        exact = bits if exact is None else exact
        table.add_row(name, f"{bits:.4f}", f"{bits - exact:+.6f}")
    console.print(table)


@app.command("check")
def check_command(device: DeviceOption = "auto") -> None:
    """Run every operator and the layer against float64 on this machine."""
    place = pick_device(device)
    table = Table("operator", "case", "result", "error", "budget", "", title=f"error against float64, on {place}")
    failures = 0
    for case in track(CASES, "checking", console=console):
        for verdict in case.run(place):
            failures += not verdict.within
            mark = "[green]ok[/]" if verdict.within else "[bold red]over[/]"
            numbers = (f"{verdict.error:.1e}", f"{verdict.budget:.1e}")
            table.add_row(case.operator, case.name, verdict.name, *numbers, mark)
    console.print(table)
    if failures:
        console.print(f"{failures} results are over their budget", style="bold red")
        raise typer.Exit(1)
    console.print(f"all {table.row_count} results are within their budgets")


@app.command("info")
def info_command() -> None:
    """Versions, devices, the bundled model, and which backend serves what."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    facts = {"gated-delta": __version__, "python": platform.python_version(), **machine.facts(devices[-1])}
    facts["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for name, fact in (facts | {f"model {name}": fact for name, fact in weights_facts().items()}).items():
        table.add_row(name, fact or "none")
    console.print(table)
    for device in devices:
        for operator in OPERATORS:
            console.print(str(explain(operator, device=device)), highlight=False, markup=False)


class RunByDefault(TyperGroup):
    """``bench prefill`` means ``bench run prefill``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=RunByDefault, help="Measure every operator against the hardware's floor and every installed peer."
)
app.add_typer(bench_app, name="bench")


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


@bench_app.command("run")
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
    place = pick_device(device)
    layouts, every = ",".join(map(str, cases.MODELS)), ",".join(cases.SEQUENCES)
    chosen = cases.select(
        parsed(",".join(groups or cases.DEFAULT_GROUPS), "GROUP", among(cases.GROUPS)),
        heads=parsed(layouts if heads == "all" else heads, "--heads", cases.parse_heads),
        sequences=parsed(
            every if seqs == "all" else seqs, "--seqs", lambda word: word if cases.parse_sequences(word) else "",
        ),
        batches=parsed(batch, "--batch", among(range(1, 65536), "a whole number in [1, 65535]")),
        tokens=parsed(tokens, "--tokens", among(range(1, 65), "a whole number in [1, 64]")),
        states=parsed(state, "--state", among(cases.STATES)), gates=parsed(gates, "--gates", among(cases.GATES)),
        quick=quick, small=place == "cpu",
    )  # fmt: skip
    contenders, absent = peers.choose(parsed(peers_, "--peers", str), place)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if place == "cpu":
        wide.print("On the CPU: smaller cases than on a GPU unless named, and times that show the order only.")
    absentees = [records.Row(records.ABSENT, name, name, "absent", note=why) for name, why in absent.items()]
    rows = absentees
    jobs = 0 if place == "cpu" else min(MOST_JOBS, os.cpu_count() or 1)
    say = partial(wide.print, markup=False, highlight=False)
    bench = Bench(place, contenders, chosen, machine.facts(place), limit, jobs, say)
    for found in track(bench.run(), "measuring", len(chosen), console=wide):
        rows = [*found, *absentees]
        if out is not None:  # a run that is cut off leaves what it has
            records.write(out / "bench.csv", rows)
    wide.print(records.tables(rows))
    if out is not None:
        say(f"written: {out / 'bench.csv'}")


@bench_app.command("compare")
def compare_command(
    before: Annotated[Path, existing_file(metavar="A.csv")],
    after: Annotated[Path, existing_file(metavar="B.csv")],
) -> None:
    """Our times in B, with those in A beside them: below 1 in the last column it got slower."""
    wide.print(records.tables(records.compared(records.read(before), records.read(after))))


def main() -> None:
    """Entry point: bad input is one sentence on standard error and exit status 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except (GatedDeltaError, OSError) as error:
        sentence = str(error)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        wrong_option = getattr(error, "format_message", None)  # of typer's usage errors, whatever they are built on
        if wrong_option is None:
            raise
        sentence = wrong_option()
    print(f"gated-delta: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
