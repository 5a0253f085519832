"""What calls cost the host (docs/performance.md), on a GPU: microseconds a call, and the first call of a process.

PYTHONPATH=src python scripts/measure_host.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import typer
from rich import print
from rich.table import Table

import gated_delta as gd
from gated_delta import plans
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.prefill import gates
from gated_delta.state import StatePool
from gated_delta.testing.inputs import Inputs, prefill_inputs, recurrent_inputs, to_device

FIRST = """
import sys, time; began, device = time.perf_counter(), sys.argv[1]
import torch
q = torch.zeros(2048, 16, 128, dtype=torch.bfloat16, device=device); v = q.repeat(1, 2, 1)
starts = torch.tensor([0, 2048], dtype=torch.int32, device=device); starts.tolist()
ready = time.perf_counter()
import gated_delta as gd
imported = time.perf_counter()
gd.chunk_gated_delta_rule(q, q.clone(), v, cu_seqlens=starts)[0].tolist()
print(ready - began, imported - ready, time.perf_counter() - imported)
"""


def median_us(call: Callable[[], object], calls: int, wait: Callable[[], None], *forgotten: plans.Plans) -> float:
    """Of a call, before each of which plans are ``forgotten``. The device's queue never fills: nobody waits for it."""
    times = []
    for i in range(calls + 20):
        for kept in forgotten:
            kept.clear()
        if i % 10 == 0:
            wait()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[20:]) * 1e6


def prefill(sequences: int, pooled: bool, device: str) -> Inputs:
    """2048 tokens in all; over a pool as a layer has it."""
    lengths = [2048 // sequences] * sequences
    x = to_device(prefill_inputs(lengths, hq=16, hk=16, hv=32, head_k=128, head_v=128), device)
    x["initial_state"] = torch.zeros(sequences, 32, 128, 128, device=device)
    if not pooled:
        return {**x, "output_final_state": True}
    slots = torch.arange(sequences, dtype=torch.int32, device=device)
    x |= {"output_state": x["initial_state"], "state_indices": slots, "has_initial_state": slots > 0}
    return {**x, "use_qk_l2norm_in_kernel": True}


def layer_step(rows: list[Row], device: str) -> Callable[[], object]:
    """A layer's step over these rows."""
    config = GatedDeltaNetConfig(hidden_size=2048, num_k_heads=16, num_v_heads=32)
    layer = GatedDeltaNetAttention(config).to(device=device, dtype=torch.bfloat16)
    pool = StatePool(config, layers=1, slots=16, conv_dtype=torch.bfloat16, device=device)
    batch = GatedDeltaNetBatch.build(rows, device=device)
    hidden = torch.randn(batch.num_actual_tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
    return lambda: layer(hidden, batch, pool.layer(0))


def cases(device: str) -> dict[str, Callable[[], object]]:
    """Calls by name; each is made again and again on the same tensors."""
    found: dict[str, Callable[[], object]] = {}
    for sequences, pooled in ((1, False), (8, False), (1, True), (8, True)):
        name = f"prefill, {sequences} x {2048 // sequences}{', pool and slots' if pooled else ''}"
        found[name] = partial(gd.chunk_gated_delta_rule, **prefill(sequences, pooled, device))
    one, four = (to_device(recurrent_inputs(1, n, h=16, hv=32, head_k=128, head_v=128), device) for n in (1, 4))
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    pool = {"initial_state": four.pop("state"), "initial_state_indices": slots}
    found["decode, one row"] = partial(gd.gated_delta_rule_decode_pretranspose, **one)
    found["verify, four tokens"] = partial(gd.gated_delta_rule_mtp, **four, **pool, disable_state_update=True)
    x, weight = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((1, 8192), (8192, 4)))
    window = torch.zeros(2, 3, 8192, device=device, dtype=torch.bfloat16).transpose(1, 2)
    found["convolution update"] = partial(gd.causal_conv1d_update, x, window, weight, state_indices=slots)
    many, z = (torch.randn(2048, 16, size, device=device, dtype=torch.bfloat16) for size in (512, 256))
    starts, per_head = torch.tensor([0, 2048], dtype=torch.int32, device=device), torch.ones(32, device=device)
    rows = {"conv_states": window, "cu_seqlens": starts, "state_indices": slots, "has_initial_state": None}
    found["convolution of 2048"] = partial(gd.causal_conv1d, many, weight, head_k=128, **rows)
    found["gates of 2048"] = partial(gates, per_head, z[..., :2], per_head.clone(), z[..., 2:4])
    found["gated norm of 2048"] = partial(gd.rms_norm_gated, many[..., :256], z, z.new_ones(256), 1e-6)
    found["layer, a decode step"] = layer_step([Row(1, 1)], device)
    found["layer, a prefill of 2048"] = layer_step([Row(2048, 1, fresh=True)], device)
    return found


def first_call(device: str) -> list[float]:
    """Seconds of a fresh process: torch and the GPU, importing this package, its first prefill."""
    done = subprocess.run([sys.executable, "-c", FIRST, device], capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


@torch.no_grad()
def main(calls: int = 1000, device: str = "cuda") -> None:
    """Print the tables."""
    wait: Callable[[], None] = torch.get_device_module(device).synchronize
    table = Table("a call", "again, us", "like none before, us", title=f"torch {torch.__version__}, {device}")
    for name, call in cases(device).items():
        anew = median_us(call, calls // 10 + 1, wait, plans._PLANS)
        table.add_row(name, f"{median_us(call, calls, wait):.1f}", f"{anew:.1f}")
    print(table)
    for run in ("first", "second, with a warm disk cache"):
        torch_s, import_s, call_s = first_call(device)
        print(f"process, {run}: torch {torch_s:.2f} s, import {import_s:.2f} s, first prefill {call_s:.2f} s")


if __name__ == "__main__":
    typer.run(main)
