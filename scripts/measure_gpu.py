"""The GPU figures of docs/performance.md: CUDA-graph replays over rotating buffers, median of nine, in microseconds.

python scripts/measure_gpu.py [ceilings] [decode] [heads] [verify] [host] [prefill] [around]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import gated_delta as gd

DEVICE = torch.device("cuda")
ROTATE = 200 << 20
"""Bytes that the rotating buffers hold at least, four times the L2 of an H200."""
BATCHES = (1, 8, 64, 256, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ((2, 8), (4, 16), (16, 32), (16, 48), (16, 64))
SEQUENCES: dict[str, tuple[int, ...]] = {
    "1x2048": (2048,), "1x8192": (8192,), "1x32768": (32768,), "1x131072": (131072,), "28672+4096": (28672, 4096),
    "2048x4": (2048,) * 4, "1024x8": (1024,) * 8, "4096x8": (4096,) * 8, "8192x16": (8192,) * 16,
    "256x64": (256,) * 64, "64x256": (64,) * 256,
}  # fmt: skip


def replay(run: Callable[[int], object], sets: int) -> float:
    """Microseconds of ``run(i)``, i going round the sets of buffers inside one graph."""
    for i in range(sets):
        run(i)
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), max(sets, 12)
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % sets)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(9):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / calls * 1e3)
    return statistics.median(times)


def sets_of(size: int) -> int:
    """How many sets of ``size`` bytes are rotated."""
    return min(64, max(2, ROTATE // size + 1))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def recurrent_set(batch: int, steps: int, heads: tuple[int, int], state: torch.dtype) -> dict[str, Any]:
    """Arguments of one decode call with model-like gates, the output included."""
    h, hv = heads
    return {
        "q": normal(batch, steps, h, 128), "k": normal(batch, steps, h, 128), "v": normal(batch, steps, hv, 128),
        "state": (normal(batch, hv, 128, 128, dtype=torch.float32) * 0.1).to(state),
        "A_log": torch.logspace(-1.3, 1.2, hv, device=DEVICE).log(), "a": normal(batch, steps, hv),
        "dt_bias": torch.full((hv,), -4.0, device=DEVICE), "b": normal(batch, steps, hv),
        "output": normal(batch, steps, hv, 128),
    }  # fmt: skip


def rotating(batch: int, steps: int, heads: tuple[int, int], state: torch.dtype) -> list[dict[str, Any]]:
    size = batch * heads[1] * 128 * 128 * state.itemsize
    return [recurrent_set(batch, steps, heads, state) for _ in range(sets_of(size))]


def several(x: dict[str, Any], **options: Any) -> object:
    """``gated_delta_rule_mtp`` on the states of a set as a pool, read at its ``slots``."""
    given = {name: value for name, value in x.items() if name not in ("state", "slots")}
    return gd.gated_delta_rule_mtp(**given, initial_state=x["state"], initial_state_indices=x["slots"], **options)


def ceilings() -> None:
    for mib in (2, 8, 32, 128, 512, 1024):
        buffers = [torch.randn(mib << 18, device=DEVICE) for _ in range(sets_of(mib << 20))]
        us = replay(lambda i, b=buffers: b[i].mul_(1.0001), len(buffers))
        print(f"in-place {mib} MiB: {us:.2f} us, {2 * (mib << 20) / us / 1e6:.2f} TB/s", flush=True)


def decode() -> None:
    for name, dtype in DTYPES.items():
        for batch in BATCHES:
            sets = rotating(batch, 1, (16, 32), dtype)
            value = replay(lambda i, s=sets: gd.gated_delta_rule_decode_pretranspose(**s[i]), len(sets))
            key = replay(lambda i, s=sets: gd.gated_delta_rule_decode(**s[i]), len(sets))
            rate = 2 * sets[0]["state"].nbytes / value / 1e6
            print(
                f"decode {name}, batch {batch}: {value:.2f} ({rate:.2f} TB/s of state), K-major {key:.2f}", flush=True
            )


def heads() -> None:
    for pair in HEADS:
        for name, dtype in DTYPES.items():
            for batch in (8, 64):
                sets = rotating(batch, 1, pair, dtype)
                value = replay(lambda i, s=sets: gd.gated_delta_rule_decode_pretranspose(**s[i]), len(sets))
                key = replay(lambda i, s=sets: gd.gated_delta_rule_decode(**s[i]), len(sets))
                layout = f"heads {pair[0]}/{pair[1]}, {name}, batch {batch}"
                print(f"{layout}: {value:.2f}, K-major {key:.2f}", flush=True)


def verify() -> None:
    for name, dtype in DTYPES.items():
        for steps in (2, 4, 8):
            for batch in (1, 8, 64, 256):
                sets = rotating(batch, steps, (16, 32), dtype)
                slots = torch.arange(batch, device=DEVICE, dtype=torch.int32)
                sets = [x | {"slots": slots} for x in sets]
                only = replay(lambda i, s=sets: several(s[i], disable_state_update=True), len(sets))
                final = replay(lambda i, s=sets: several(s[i], disable_state_update=False), len(sets))
                buffer = torch.empty(batch, steps, 32, 128, 128, device=DEVICE, dtype=dtype)
                options = {"disable_state_update": True, "intermediate_states_buffer": buffer}
                kept = replay(lambda i, s=sets, o=options: several(s[i], **o), len(sets))
                pool = buffer.flatten(0, 1)
                own = torch.arange(batch * steps, device=DEVICE, dtype=torch.int32).view(batch, steps)
                options = {"disable_state_update": False, "ssm_state_indices": own}
                first = own[:, 0].contiguous()
                pooled = [x | {"state": pool, "slots": first} for x in sets]
                slot = replay(lambda i, s=pooled, o=options: several(s[i], **o), len(sets))
                print(
                    f"T={steps} {name}, batch {batch}: verify {only:.2f}, final state {final:.2f}, "
                    f"snapshots {kept:.2f}, a slot a token {slot:.2f}", flush=True,
                )  # fmt: skip


def eager(run: Callable[[], object], calls: int = 2000) -> float:
    """Host microseconds of a call that the GPU keeps up with."""
    for _ in range(200):
        run()
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        rounds.append((time.perf_counter() - started) / calls * 1e6)
    torch.cuda.synchronize()
    return min(rounds)


def host() -> None:
    x = recurrent_set(1, 1, (2, 8), torch.bfloat16)
    print(f"decode, output given: {eager(lambda: gd.gated_delta_rule_decode_pretranspose(**x)):.1f} us")
    bare: dict[str, Any] = {name: value for name, value in x.items() if name != "output"}
    print(f"decode, output allocated: {eager(lambda: gd.gated_delta_rule_decode_pretranspose(**bare)):.1f} us")
    slots = torch.zeros(1, device=DEVICE, dtype=torch.int32)
    pooled = {**bare, "initial_state": x["state"], "state": None, "initial_state_indices": slots}
    print(f"decode from a pool: {eager(lambda: gd.gated_delta_rule_decode_pretranspose(**pooled)):.1f} us")
    given = prefill_set((64,), (2, 8))
    print(f"prefill: {eager(lambda: gd.chunk_gated_delta_rule(**given, output_final_state=True), 300):.1f} us")
    rows, weight = normal(8, 256), normal(256)
    print(f"rms_norm_gated: {eager(lambda: gd.rms_norm_gated(rows, rows, weight, 1e-6), 500):.1f} us")
    states, taps = normal(8, 256, 3), normal(256, 4)
    print(
        "causal_conv1d_update: "
        f"{eager(lambda: gd.causal_conv1d_update(rows, states, taps, state_indices=None), 500):.1f} us"
    )


def prefill_set(lengths: Iterable[int], heads: tuple[int, int]) -> dict[str, Any]:
    lengths = tuple(lengths)
    total, (h, hv) = sum(lengths), heads
    q, k = (torch.nn.functional.normalize(normal(total, h, 128).float(), dim=-1).bfloat16() for _ in range(2))
    log = -torch.logspace(-1.3, 1.2, hv, device=DEVICE) * torch.nn.functional.softplus(
        normal(total, hv, dtype=torch.float32) - 4.0
    )
    return {
        "q": q, "k": k, "v": normal(total, hv, 128), "g": log.exp(), "beta": normal(total, hv).float().sigmoid(),
        "initial_state": torch.zeros(len(lengths), hv, 128, 128, device=DEVICE),
        "cu_seqlens": torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=DEVICE),
        "output": torch.empty(total, hv, 128, device=DEVICE, dtype=torch.bfloat16),
        "output_state": torch.empty(len(lengths), hv, 128, 128, device=DEVICE),
    }  # fmt: skip


def prefill() -> None:
    for pair in HEADS:
        for name, lengths in SEQUENCES.items():
            if pair[1] > 32 and sum(lengths) > 32768:
                continue
            x = prefill_set(lengths, pair)
            us = replay(lambda _, x=x: gd.chunk_gated_delta_rule(**x, output_final_state=True), 1)
            print(f"prefill {pair[0]}/{pair[1]} {name}: {us:.1f}", flush=True)


def around() -> None:
    """Convolution and norm at the width of 16/32 heads."""
    weight, gain = normal(8192, 4), normal(128)
    for batch in (1, 64, 512):
        x = normal(batch, 8192)
        for layout, states in (
            ("W contiguous", normal(batch, 8192, 3)),
            ("D contiguous", normal(batch, 3, 8192).transpose(1, 2)),
        ):
            update = partial(gd.causal_conv1d_update, x, states, weight, state_indices=None)
            print(f"conv update, batch {batch}, {layout}: {replay(lambda _, f=update: f(), 1):.2f}", flush=True)
    for lengths in ((8192,), (64,) * 256):
        total = sum(lengths)
        x, states = normal(total, 8192), normal(len(lengths), 8192, 3)
        starts = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=DEVICE)
        conv = partial(
            gd.causal_conv1d, x, weight, conv_states=states, cu_seqlens=starts, state_indices=None,
            has_initial_state=None,
        )  # fmt: skip
        us = replay(lambda _, f=conv: f(), 1)
        print(f"conv prefill, {len(lengths)} x {lengths[0]}: {us:.2f}, {2 * x.nbytes / us / 1e6:.2f} TB/s", flush=True)
        y, z = normal(total, 32, 128), normal(total, 32, 128)
        us = replay(lambda _, y=y, z=z: gd.rms_norm_gated(y, z, gain, 1e-6), 1)
        print(f"norm, {total} x 32 x 128: {us:.2f}, {3 * y.nbytes / us / 1e6:.2f} TB/s", flush=True)


SECTIONS = {
    "ceilings": ceilings, "decode": decode, "heads": heads, "verify": verify, "host": host, "prefill": prefill,
    "around": around,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in sys.argv[1:] or SECTIONS:
        SECTIONS[name]()


if __name__ == "__main__":
    main()
