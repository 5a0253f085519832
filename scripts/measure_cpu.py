"""The CPU figures of docs/performance.md: token loop against chunks, and what a call costs before any arithmetic.

python scripts/measure_cpu.py
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import torch

import gated_delta as gd
from gated_delta import library, reference
from gated_delta.testing.inputs import prefill_inputs, recurrent_inputs


def best_of(run: Callable[[], object], repeats: int) -> float:
    """Shortest of ``repeats`` runs after a first one, in seconds."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def chunks_against_loop(tokens: int = 4096) -> None:
    x = prefill_inputs([tokens], hq=16, hk=16, hv=32, head_k=128, head_v=128)
    q, k, v, alpha, beta = x["q"], x["k"], x["v"], x["g"].exp(), x["beta"]
    state, spans = torch.zeros(1, 32, 128, 128), [(0, tokens)]
    rows = [t[None] for t in (q, k, v, alpha, beta)]
    print(f"{tokens} tokens, heads 16/32, 128 x 128, bf16 inputs:")
    loops = {}
    for name, dtype in (("fp32", torch.float32), ("float64", torch.float64)):
        loops[name] = best_of(lambda d=dtype: reference.recurrent(*rows, 0.1, state, dtype=d), 2)  # type: ignore[arg-type]
        print(f"  token loop in {name}: {loops[name] * 1e3:.0f} ms")
    out = torch.empty_like(v)  # as the CPU backend runs them: into an output, prepared in float64
    for chunk in (16, 32, 64):
        run = partial(
            reference.chunked, q, k, v, alpha, beta, 0.1, state, spans, chunk=chunk, out=out, prepare=torch.float64
        )
        seconds = best_of(run, 8)
        ratios = ", ".join(f"{loop / seconds:.1f}x the {name} loop" for name, loop in loops.items())
        print(f"  chunks of {chunk}: {seconds * 1e3:.0f} ms, {ratios}")
    a = torch.randn(2048, 2048)
    print(f"  matrix product in fp32: {2 * 2048**3 / best_of(lambda: a @ a, 5) / 1e9:.0f} GFLOP/s")


def boundary() -> None:
    """Validation, dispatch and the torch boundary, with an implementation that does nothing."""
    x, z, weight = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64), torch.ones(64)
    output, inputs = torch.empty_like(x), recurrent_inputs(2)
    library._implementation = lambda operator, backend: None if operator.startswith("bound") else lambda call: None
    calls = 2000

    @torch.library.custom_op("gated_delta_measure::empty", mutates_args=("output",))
    def empty(x: torch.Tensor, output: torch.Tensor) -> None:
        return None

    def each(run: Callable[[], object]) -> float:
        return best_of(lambda: [run() for _ in range(calls)], 5) / calls * 1e6

    timed = {
        "registered operator alone": lambda: library.rms_norm_gated(x, z, weight, 1e-6, "silu", output, "cpu"),
        "the same by torch.library.custom_op (2 arguments)": lambda: empty(x, output),
        "rms_norm_gated": lambda: gd.rms_norm_gated(x, z, weight, 1e-6),
        "gated_delta_rule_decode_pretranspose": lambda: gd.gated_delta_rule_decode_pretranspose(**inputs),
    }
    print("a call with an empty implementation:")
    for name, run in timed.items():
        print(f"  {name}: {each(run):.1f} us")
    library._implementation = lambda operator, backend: lambda call: lambda *places: None
    for name in ("rms_norm_gated", "gated_delta_rule_decode_pretranspose"):
        print(f"  {name}, by a plan: {each(timed[name]):.1f} us")


if __name__ == "__main__":
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.no_grad():
        chunks_against_loop()
        boundary()
