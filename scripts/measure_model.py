"""A whole model of 4.2 billion parameters through Transformers: stock torch, FLA where it is, and our operators.

    python scripts/measure_model.py --csv OUT.csv          on a GPU
    python scripts/measure_model.py --tiny --device cpu    shows that it works

The text model of Qwen3.5-4B with random weights: config.json of Qwen/Qwen3.5-4B, tied embeddings, no vision tower.
Prefill and greedy decode in bf16, the median of some runs after one that is not counted. Nothing is fetched; the
`kernels` package must not be installed, for it hides Transformers' own functions.
"""

from __future__ import annotations

import csv
import importlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import gated_delta
from gated_delta.bench.machine import facts
from gated_delta.interop.transformers import patch

QWEN35_4B: dict[str, Any] = {
    "vocab_size": 248_320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
}  # fmt: skip
TINY = QWEN35_4B | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "initializer_range": 0.1,
}  # fmt: skip
FUNCTIONS = (
    "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update",
)  # fmt: skip
"""What Transformers takes from FLA and causal-conv1d if they are installed."""


@dataclass(frozen=True)
class Case:
    kind: str
    """prefill: ``tokens`` of the prompt at once. decode: ``tokens`` steps of one token after a prompt."""
    batch: int
    tokens: int
    prompt: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch} x {self.tokens:,}"


CASES = (Case("prefill", 1, 8192), Case("prefill", 4, 4096), Case("decode", 1, 128, 512), Case("decode", 16, 128, 512))
TINY_CASES = (Case("prefill", 1, 80), Case("prefill", 2, 40), Case("decode", 1, 6, 8), Case("decode", 3, 6, 8))


@contextmanager
def stock() -> Iterator[None]:
    """Transformers' functions in plain torch, also where it took those of other packages when it was imported."""
    modelling = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    taken = {name: getattr(modelling, name) for name in FUNCTIONS}
    try:
        for name, function in taken.items():
            setattr(modelling, name, function.__wrapped__)
        yield
    finally:
        for name, function in taken.items():
            setattr(modelling, name, function)


def paths() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Name: what the layers run while it is entered."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")  # where Transformers looks for it
    except ImportError:
        return {"torch": stock, "gated-delta": patch}
    return {"torch": stock, "fla": nullcontext, "gated-delta": patch}


def build(config: dict[str, Any], device: str) -> Any:
    """The model with random weights, made where it runs."""
    import transformers  # noqa: PLC0415 (its parts are replaced by name)

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        text = transformers.AutoConfig.for_model("qwen3_5_text", **config)
        return transformers.AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16).eval()


def run(model: Any, case: Case, device: str, steps: int) -> tuple[float, Tensor, Tensor]:
    """Seconds, the last logits ``[batch, vocabulary]``, and the decoded ids ``[batch, steps]``, all of one run."""
    generator = torch.Generator().manual_seed(case.tokens)
    prompt = (case.batch, case.prompt or case.tokens)
    fed = torch.randint(model.config.vocab_size, prompt, generator=generator).to(device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    cache, ids, logits = None, [], torch.empty(0)
    synchronize()
    started = time.perf_counter()
    for step in range(steps + 1):
        done = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = done.past_key_values, done.logits[:, -1]
        fed = logits.argmax(-1, keepdim=True)
        ids.append(fed)
        if case.kind == "decode" and step == 0:
            synchronize()
            started = time.perf_counter()
    synchronize()
    seconds = time.perf_counter() - started
    chosen = torch.cat(ids[1:] or ids, 1).cpu()
    if chosen.shape != (case.batch, steps or 1) or not logits.isfinite().all():
        raise RuntimeError(f"{case.name}: {list(chosen.shape)} ids, finite logits: {bool(logits.isfinite().all())}")
    return seconds, logits.float().cpu(), chosen


@torch.inference_mode()
def measure(model: Any, case: Case, device: str, repeats: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """A row for each path; what they computed is compared with the first one's."""
    rows: list[dict[str, Any]] = []
    first: tuple[Tensor, Tensor] | None = None
    for name, entered in paths().items():
        with entered():
            steps = case.tokens if case.kind == "decode" else 0
            run(model, case, device, min(steps, 4))  # compiles what there is to compile
            runs = [run(model, case, device, steps) for _ in range(repeats)]
        seconds, (_, logits, ids) = statistics.median(r[0] for r in runs), runs[-1]
        first = first or (logits, ids)
        same, off = (ids == first[1]).float().mean().item(), (logits - first[0]).abs().max() / first[0].abs().max()
        rows.append({
            "case": case.name, "path": name, "batch": case.batch, "tokens": case.tokens, "prompt": case.prompt,
            "seconds": f"{seconds:.6g}", "tokens_per_s": f"{case.batch * case.tokens / seconds:.6g}",
            "speedup": f"{float(rows[0]['seconds']) / seconds:.4g}" if rows else "1",
            "agreement": f"logits to {off.item():.1e}" if case.kind == "prefill" else f"{same:.1%} of the ids",
        })  # fmt: skip
        advance()
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table("case", "path", "tokens/s", "times stock", "agrees with stock", title=title)
    for row in rows:
        rate = f"{float(row['tokens_per_s']):,.0f}"
        shown.add_row(row["case"], row["path"], rate, row["speedup"], row["agreement"])
    return shown


def write(out: Path, rows: list[dict[str, Any]], shared: dict[str, Any]) -> None:
    """All rows so far: a run that is cut off leaves what it has."""
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows(row | shared for row in rows)


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A few thousand parameters instead of 4.2 billion.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 5,
    out: Annotated[Path | None, typer.Option("--csv", help="Where to write the rows.")] = None,
) -> None:
    """Tokens a second of prefill and decode, the Gated Delta Net layers run in turn by each path."""
    console = Console()
    model = build(TINY if tiny else QWEN35_4B, device)
    parameters, cases = sum(p.numel() for p in model.parameters()), TINY_CASES if tiny else CASES
    shared = {"parameters": parameters, "dtype": "bfloat16", "repeats": repeats, **facts(device)}
    shared |= {"gated_delta": gated_delta.__version__, "transformers": version("transformers")}
    shared |= {"fla": getattr(importlib.import_module("fla"), "__version__", "?") if "fla" in paths() else ""}
    shared |= {"command": shlex.join(["python", *sys.argv])}
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(cases) * len(paths()))
        for case in cases:
            bar.update(task, description=case.name)
            found = measure(model, case, device, repeats, lambda: bar.advance(task))
            rows += found
            for row in found:
                console.print(f"{row['case']}, {row['path']}: {row['tokens_per_s']} tokens/s")
            if out:
                write(out, rows, shared)
    console.print(table(rows, f"{parameters:,} parameters in bf16 on {shared['device']}"))


if __name__ == "__main__":
    typer.run(main)
