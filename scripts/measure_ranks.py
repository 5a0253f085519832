"""Several GPUs: tensor parallelism and context parallelism, checked and timed.

    PYTHONPATH=src python scripts/measure_ranks.py                        2 or more GPUs, under two minutes
    PYTHONPATH=src python scripts/measure_ranks.py --device cpu --tiny    two processes on a CPU: that it works

Every rank loads its part of a layer of Qwen3-Next's shape; it is judged by the error budget against float64, and timed
with and without its all-reduce. One sequence is cut between the ranks in several ways, judged likewise, compared with
one GPU's result at its full length, and timed by the slowest rank. Results are printed as they come; a collective that
hangs ends the run after 30 s. Should CUDA graphs not take collectives, a phase runs again without graphs.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

import gated_delta as gd
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.bench.machine import facts
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.context_parallel import context_parallel_gated_delta_rule, partition
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.parallel import Parallel, load_weights
from gated_delta.state import StatePool
from gated_delta.testing import oracle
from gated_delta.testing.budget import judge, relative_error
from gated_delta.testing.inputs import Inputs, prefill_inputs

HANG, COMPILING = timedelta(seconds=30), timedelta(minutes=5)
"""What a collective may take, and one before which kernels are compiled."""
COLUMNS = ("part", "case", "split", "ranks", "us", "tokens_s", "speedup", "share", "error", "budget", "graph")
TENSOR, CONTEXT = "tensor", "context"
"""parallelism"""
QWEN3_NEXT = GatedDeltaNetConfig(hidden_size=2048, num_k_heads=16, num_v_heads=32)


@dataclass(frozen=True)
class Setup:
    """What is measured, and where files lie."""

    folder: str
    device: str = "cuda"
    graph: bool = True
    config: GatedDeltaNetConfig = QWEN3_NEXT
    layers: int = 4
    """with weights of their own: more than the L2 holds"""
    steps: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 8192
    checked: tuple[int, int] = (100, 2048)
    """Tokens that are judged by float64, of the layer and of the operator."""
    lengths: tuple[int, ...] = (32768, 131072)
    ratios: tuple[float, ...] = (1.0, 1.4, 1.7)
    """Rank 0's part as a multiple of the others', besides what ``partition`` says."""
    tails: tuple[float, ...] = (0.0, 0.06, 0.1)
    """Shares of the sequence that rank 0 goes on with while the others add what the state before them gives."""
    repeats: int = 9


TINY: dict[str, Any] = {
    "config": GatedDeltaNetConfig(hidden_size=64, num_k_heads=4, num_v_heads=8, head_k_dim=32, head_v_dim=32),
    "layers": 2, "steps": 2, "batches": (1, 3), "prompt": 70, "checked": (20, 150), "lengths": (700,),
    "ratios": (1.0,), "tails": (0.0, 0.1), "repeats": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """One process of a phase."""

    s: Setup
    rank: int
    size: int
    slow: Any
    """The group for calls before which something is compiled."""

    def report(self, **row: Any) -> None:
        """Print a result, and keep it for the table."""
        if self.rank == 0:
            row = {"ranks": self.size, **row}
            with (Path(self.s.folder) / "rows.jsonl").open("a") as file:
                print(json.dumps(row), file=file)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def slowest(self, *values: float) -> Tensor:
        """The most that each is on any rank."""
        found = torch.tensor(values, device=self.s.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.cpu()

    def us(self, run: Callable[[], object]) -> float:
        """Microseconds of the slowest rank, in the median, from a moment when all are ready."""
        run()
        if self.s.graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
            run = graph.replay
            run()
        times = []
        for _ in range(self.s.repeats):
            dist.barrier()
            if self.s.device == "cpu":
                times.append(timeit.timeit(run, number=1) * 1e6)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) * 1e3)
        return self.slowest(*times).median().item()


@torch.no_grad()
def write_layer(s: Setup) -> None:
    """A checkpoint, and what the layer makes of some tokens: plainly, and in float64."""
    torch.manual_seed(0)
    layer = GatedDeltaNetAttention(s.config)
    for name, weight in layer.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.5 if name == "conv1d.weight" else weight.shape[1] ** -0.5)
    save_file(layer.bfloat16().state_dict(), Path(s.folder) / "layer.safetensors")
    hidden = torch.randn(s.checked[0], s.config.hidden_size).bfloat16()
    plain = layer.evaluate(hidden[None], token_by_token=True)[0]
    exact = layer.double().evaluate(hidden[None].double(), token_by_token=True, dtype=torch.float64)[0]
    torch.save((hidden, plain, exact), Path(s.folder) / "layer.pt")


def served(layer: GatedDeltaNetAttention, hidden: Tensor) -> Tensor:
    """A prompt, then four tokens one by one."""
    state = StatePool(layer.config, layers=1, slots=1, conv_dtype=hidden.dtype, device=hidden.device).layer(0)
    outputs, prompt = [], len(hidden) - 4
    for first, last in [(0, prompt), *((t, t + 1) for t in range(prompt, len(hidden)))]:
        batch = GatedDeltaNetBatch.build([Row(last - first, 0, fresh=first == 0)], device=hidden.device)
        outputs.append(layer(hidden[first:last], batch, state))
    return torch.cat(outputs)


def tensor_parallel(r: Rank) -> None:
    s, folder = r.s, Path(r.s.folder)
    places = Parallel.of(r.slow), Parallel.of(), Parallel(r.rank, r.size)  # the last one leaves the sum out
    layers = [GatedDeltaNetAttention(s.config, places[0]).to(s.device, torch.bfloat16) for _ in range(s.layers)]
    for layer in layers:
        load_weights(layer.requires_grad_(False), folder / "layer.safetensors")
    hidden, plain, exact = torch.load(folder / "layer.pt", map_location=s.device)
    verdict = judge("output", served(layers[0], hidden), plain, exact)
    r.report(part=TENSOR, case="output", error=r.slowest(verdict.error).item(), budget=verdict.budget)
    forms = [(f"decode, batch {n}", [Row(1, i) for i in range(n)], s.steps) for n in s.batches]
    for case, rows, steps in [*forms, (f"prefill 1x{s.prompt}", [Row(s.prompt, 0, fresh=True)], 1)]:
        config, slots = layers[0].config, len(rows)
        pool = StatePool(config, layers=s.layers, slots=slots, conv_dtype=torch.bfloat16, device=s.device)
        states, batch = [pool.layer(i) for i in range(s.layers)], GatedDeltaNetBatch.build(rows, device=s.device)
        hidden = torch.randn(batch.num_actual_tokens, s.config.hidden_size).to(s.device, torch.bfloat16)

        def run(steps: int = steps, states: Any = states, batch: Any = batch, hidden: Tensor = hidden) -> None:
            for _ in range(steps):
                x = hidden
                for layer, state in zip(layers, states, strict=True):
                    x = layer(x, batch, state)

        times = []
        for place in places:
            for layer in layers:
                layer.parallel = place
            times.append(r.us(run) / (steps * s.layers) if times else run() or 1.0)
        us, rate = times[1], batch.num_actual_tokens / times[1] * 1e6
        r.report(part=TENSOR, case=case, us=us, tokens_s=rate, share=1 - times[2] / us, graph=s.graph)


def make_inputs(s: Setup, tokens: int) -> Inputs:
    """The same on every rank."""
    torch.manual_seed(0)
    h, hv, head_k, head_v = s.config.num_k_heads, s.config.num_v_heads, s.config.head_k_dim, s.config.head_v_dim
    with torch.device(s.device):
        return prefill_inputs([tokens], hq=h, hk=h, hv=hv, head_k=head_k, head_v=head_v, seed=None)


def cut(inputs: Inputs, first: int, last: int) -> Inputs:
    return {**{x: inputs[x][first:last] for x in ("q", "k", "v", "g", "beta")}, "g_space": inputs["g_space"]}


def whole(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], gd.chunk_gated_delta_rule(**inputs, output_final_state=True))


def budgets(r: Rank) -> list[float]:
    """What outputs and states may be off by, after a judgement by float64."""
    tokens, allowed = r.s.checked[1], []
    inputs, cuts = make_inputs(r.s, tokens), partition(tokens, r.size, r.s.config.num_v_heads)
    first, last = cuts[r.rank : r.rank + 2]
    result = context_parallel_gated_delta_rule(**cut(inputs, first, last), output_final_state=True, group=r.slow)
    with torch.device(r.s.device):
        operands = None if r.s.device == "cpu" else torch.bfloat16
        plain, exact = oracle.prefill(**inputs, dtype=torch.float32, operands=operands), oracle.prefill(**inputs)
    for name, own in (("output", slice(first, last)), ("state", slice(None))):
        verdict = judge(name, result[name == "state"], getattr(plain, name)[own], getattr(exact, name)[own])
        error, budget = r.slowest(verdict.error / verdict.budget, verdict.budget).tolist()
        r.report(part=CONTEXT, case=f"1x{tokens}, {name}", error=error * budget, budget=budget)
        allowed.append(budget)
    return allowed


def splits(s: Setup, ranks: int, tokens: int) -> Iterator[tuple[str, list[int], int]]:
    """Name, first tokens of the ranks and one past the last, and tokens that rank 0 goes on with."""
    for ratio in s.ratios:
        cuts = [int(tokens * (ratio + i) / (ratio + ranks - 1)) // 64 * 64 for i in range(ranks - 1)]
        yield f"{ratio:g}:1", [0, *cuts, tokens], 0
    for share in s.tails:
        tail = int(tokens * share) // 64 * 64
        yield (
            f"proposed, {share:.0%} more" if tail else "proposed",
            partition(tokens - tail, ranks, s.config.num_v_heads),
            tail,
        )


def context_parallel(r: Rank) -> None:
    s, allowed = r.s, budgets(r)
    for tokens in s.lengths:
        inputs, case = make_inputs(s, tokens), f"1x{tokens}"
        one, us = whole(inputs), r.us(lambda x=inputs: whole(x))
        r.report(part=CONTEXT, case=case, ranks=1, us=us, tokens_s=tokens / us * 1e6, graph=s.graph)
        for split, cuts, tail in splits(s, r.size, tokens):
            own, rest = cut(inputs, *cuts[r.rank : r.rank + 2]), cut(inputs, tokens - tail, tokens)
            rest["cu_seqlens"] = torch.tensor([0, tail], dtype=torch.int32, device=s.device)

            def run(group: Any = None, own: Inputs = own, rest: Inputs = rest, on: bool = tail > 0 and r.rank == 0):
                output, state = context_parallel_gated_delta_rule(**own, output_final_state=True, group=group)
                return (output, *whole({**rest, "initial_state": state})) if on else (output, output[:0], state)

            output, after, state = run(r.slow)
            dist.barrier(group=r.slow)
            expected = torch.cat((one[0][cuts[r.rank] : cuts[r.rank + 1]], one[0][tokens - len(after) :]))
            off = relative_error(torch.cat((output, after)).float(), expected.float()) / allowed[0]
            if r.rank == 0 or not tail:
                off = max(off, relative_error(state, one[1]) / allowed[1])
            us = r.us(run)
            r.report(  # two results within their budgets are at most two budgets apart
                part=CONTEXT, case=case, split=split, us=us, tokens_s=tokens / us * 1e6, graph=s.graph,
                error=r.slowest(off).item() * allowed[0], budget=2 * allowed[0],
            )  # fmt: skip


@torch.no_grad()
def work(rank: int, size: int, s: Setup) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if s.device == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device else "gloo", init_method=f"file://{s.folder}/meeting-{size}-{s.graph}", rank=rank,
        world_size=size, timeout=HANG, device_id=device,
    )  # fmt: skip
    r = Rank(s, rank, size, dist.new_group(timeout=COMPILING))
    tensor_parallel(r)
    if size > 1:
        context_parallel(r)
    dist.destroy_process_group()


def compile_kernels(index: int, s: Setup, sizes: list[int]) -> None:
    gd.warmup(s.config.shard(sizes[index]), max_batch=max(s.batches), progress=False)


def phase(size: int, s: Setup) -> None:
    """All that so many ranks do, with graphs if they take collectives."""
    try:
        spawn(work, (size, s), nprocs=size)
    except ProcessException as error:
        if not s.graph:
            raise
        print(f"{size} ranks failed with graphs, and go on without: {str(error)[-1500:]}", flush=True)
        phase(size, replace(s, graph=False))


def show(rows: list[dict[str, Any]], out: Path, common: dict[str, str]) -> None:
    """A table and a CSV of the rows, each related to one GPU's in the same case."""
    one = {(row["part"], row["case"]): row["us"] for row in rows if row["ranks"] == 1 and "us" in row}
    table = Table(*COLUMNS)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *common], restval="")
        writer.writeheader()
        for row in rows:
            if "us" in row:
                row["speedup"] = one[row["part"], row["case"]] / row["us"]
            text = {name: f"{x:.4g}" if isinstance(x, float) else str(x) for name, x in row.items()}
            table.add_row(*(text.get(name, "") for name in COLUMNS))
            writer.writerow({**text, **common})
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main(
    device: str = "cuda", tiny: bool = False, ranks: str = "2", graph: bool = True, out: Path = Path("ranks.csv")
) -> None:
    """Measure; --ranks 2,4 says how many share (one is measured, too)."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    started, sizes = time.perf_counter(), [1, *map(int, ranks.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        s = Setup(folder, device, graph and device == "cuda", **(TINY if tiny else {}))
        write_layer(s)
        if device == "cuda":
            spawn(compile_kernels, (s, sizes), nprocs=len(sizes))
            print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
        for size in sizes:
            phase(size, s)
        rows = [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]
    show(rows, out, {**facts(device), "command": " ".join(["python", *sys.argv])})
    wrong = sum(not row["error"] <= row["budget"] for row in rows if "error" in row)
    print(f"{time.perf_counter() - started:.0f} s, {wrong} results over their budget", flush=True)
    raise typer.Exit(wrong > 0)


if __name__ == "__main__":
    typer.run(main)
