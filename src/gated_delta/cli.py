"""The ``gated-delta`` command."""

import codecs
import importlib.util
import platform
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    sys.exit('gated-delta: the command line needs more packages: pip install "gated-delta[cli]"')

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from gated_delta import __version__
from gated_delta.bench import machine
from gated_delta.bench.cli import app as bench_app
from gated_delta.bench.cli import existing_file
from gated_delta.bench.machine import pick_device
from gated_delta.dispatch import OPERATORS, explain
from gated_delta.errors import GatedDeltaError, OptionError
from gated_delta.model.checkpoint import generate_checkpoint
from gated_delta.model.generation import Options, Summary, generate, score
from gated_delta.model.network import load_model, weights_facts
from gated_delta.testing.selftest import CASES

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Gated Delta Net: generate text, score text, check this machine.",
)  # fmt: skip
app.add_typer(bench_app, name="bench")
console = Console()

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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
    if state_dtype not in STATE_DTYPES:
        raise OptionError("generate", "--state-dtype", repr(state_dtype), " or ".join(STATE_DTYPES))
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
    file: Annotated[Path, existing_file("FILE", "Any text file.")], device: DeviceOption = "auto"
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
