"""Triton's decode and several tokens on a GPU: real shapes through every tile, many steps, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.testing import oracle
from gated_delta.testing.budget import assert_within_budget
from gated_delta.testing.inputs import Inputs, recurrent_inputs, to_device
from helpers import DEVICE, PER_ROW, assert_recurrent, same_bits
from test_kernels_recurrent import BF16, FP16, FP32, PER_TOKEN, flipped, run, small

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
REAL: dict[str, Any] = {"h": 16, "hv": 32, "head_k": 128, "head_v": 128}

COUNTS = [1, 2, 3, 16, 17, 32, 33, 129, 257]
"""Rows on both sides of every bound of the tables of tiles, and of what is marked to leave the L2 first."""
every_kernel = pytest.mark.parametrize(
    ("route", "tokens"), [("K-major", 1), ("V-major", 1), ("V-major", 4), ("V-major", 17)]
)
every_dtype = pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(BF16, FP32), (BF16, BF16), (BF16, FP16), (FP16, FP16), (FP16, BF16), (FP32, FP32)]
)


def repeated(row: Inputs, count: int) -> Inputs:
    return {**row, **{name: row[name].repeat_interleave(count, 0) for name in PER_ROW}}


@every_kernel
@every_dtype
@pytest.mark.parametrize("count", COUNTS)
def test_real_shapes(route: str, tokens: int, dtype: torch.dtype, state_dtype: torch.dtype, count: int) -> None:
    row = recurrent_inputs(1, tokens, **REAL, dtype=dtype, state_dtype=state_dtype)
    output, state = run(route, repeated(row, count))
    assert_recurrent(row, output[-1:], state[-1:])
    assert same_bits(output, output[:1].expand_as(output))
    assert same_bits(state, state[:1].expand_as(state))


@every_kernel
@every_dtype
@pytest.mark.parametrize("head_k", [32, 128])
def test_bits_of_a_row_are_its_own_in_any_batch(
    route: str, tokens: int, dtype: torch.dtype, state_dtype: torch.dtype, head_k: int
) -> None:
    row = recurrent_inputs(1, tokens, **{**REAL, "head_k": head_k}, dtype=dtype, state_dtype=state_dtype)
    alone = run(route, row)
    for count in COUNTS[1:]:
        output, state = run(route, repeated(row, count))
        assert same_bits(output[:1], alone[0]), count
        assert same_bits(state[:1], alone[1]), count


@pytest.mark.parametrize("route", ["pool", "mtp"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_pool_of_more_than_2_to_the_31_elements(route: str, tokens: int) -> None:
    inputs = recurrent_inputs(2, tokens, h=1, hv=2, head_k=256, head_v=256, state_dtype=BF16)
    wrap = 2**31 // (2 * 256 * 256)
    pool = torch.empty(wrap + 4, 2, 256, 256, dtype=BF16, device=DEVICE)
    slots = torch.tensor([1, wrap + 2], device=DEVICE)
    pool[slots], pool[[2, 3]] = inputs["state"].to(DEVICE), 7.0
    given = to_device({name: x for name, x in inputs.items() if name != "state"}, DEVICE)
    given |= {"initial_state": pool, "initial_state_indices": slots, "output_state_indices": slots.flip(0) + 1}
    operator = gd.gated_delta_rule_decode_pretranspose if route == "pool" else gd.gated_delta_rule_mtp
    given |= {"state": None} if route == "pool" else {}
    output, _ = operator(**given, disable_state_update=False, backend="triton")
    assert_recurrent(inputs, output, pool[[wrap + 3, 2]])
    assert same_bits(pool[slots].cpu(), inputs["state"])
    assert bool((pool[3] == 7).all())
    del pool, given
    torch.cuda.empty_cache()


@pytest.mark.parametrize("route", ["K-major", "V-major"])
def test_ten_thousand_steps_of_a_bf16_state(route: str) -> None:
    """Against float64, where the plain evaluation rounds its state to bf16 after every step too."""
    inputs = small(1, 10_000, head_k=32, state_dtype=BF16)
    given = to_device(inputs, DEVICE)
    state, outputs, plain = given["state"].clone(), [], oracle.Evaluation(inputs["v"], inputs["state"], [])
    state, expected = (flipped(state) if route == "K-major" else state), []
    operator = gd.gated_delta_rule_decode if route == "K-major" else gd.gated_delta_rule_decode_pretranspose
    for t in range(10_000):
        token, host_token = ({name: x[name][:, t : t + 1] for name in PER_TOKEN} for x in (given, inputs))
        outputs.append(operator(**{**given, **token, "state": state}, backend="triton")[0])
        plain = oracle.recurrent(**{**inputs, **host_token, "state": plain.state.to(BF16)}, dtype=FP32)
        expected.append(plain.output)
    exact, actual, rounded = oracle.recurrent(**inputs), torch.cat(outputs, 1), torch.cat(expected, 1)
    assert_within_budget("output", actual, rounded, exact.output)
    assert_within_budget("last outputs", actual[:, -1000:], rounded[:, -1000:], exact.output[:, -1000:])
    assert_within_budget("state", state.mT if route == "K-major" else state, plain.state, exact.state)


def real_call(tokens: int, seed: int = 0) -> tuple[Callable[[Inputs], Tensor], Inputs]:
    """An operator over a pool of 20 states for 8 rows, and its arguments on the device."""
    inputs = to_device(recurrent_inputs(20, tokens, **REAL, state_dtype=BF16, seed=seed), DEVICE)
    given = {name: x[:8] if name in PER_TOKEN else x for name, x in inputs.items() if name != "state"}
    given |= {"initial_state": inputs["state"], "initial_state_indices": torch.arange(8, device=DEVICE) + seed}
    given |= {"output_state_indices": 19 - torch.arange(8, device=DEVICE)}
    return lambda x: gd.gated_delta_rule_mtp(**x, disable_state_update=False, backend="triton")[0], given


def copies(given: Inputs) -> Inputs:
    return {name: x.clone() for name, x in given.items()}


@pytest.mark.parametrize("tokens", [1, 4, 17])
def test_a_graph_replays_with_other_values_and_slots(tokens: int) -> None:
    call, given = real_call(tokens)
    call(copies(given))
    fixed = copies(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(fixed)
    for seed in (1, 2, 3):
        _, other = real_call(tokens, seed)
        other["initial_state_indices"][seed] = -1
        for name, x in fixed.items():
            x.copy_(other[name])
        graph.replay()
        assert same_bits(output, call(other))
        assert same_bits(fixed["initial_state"], other["initial_state"])


@pytest.mark.parametrize("tokens", [1, 4, 17])
def test_two_streams_at_once(tokens: int) -> None:
    calls = [real_call(tokens, seed) for seed in (0, 1)]
    expected = [(copies(given), call) for call, given in calls]
    outputs = [call(given) for given, call in expected]
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        own = [copies(given) for _, given in calls]
        torch.cuda.synchronize()
        found = []
        for stream, given, (call, _) in zip(streams, own, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(call(given))
        torch.cuda.synchronize()
        assert all(map(same_bits, found, outputs))
        assert all(same_bits(x["initial_state"], y["initial_state"]) for x, (y, _) in zip(own, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_whole(tokens: int) -> None:
    call, given = real_call(tokens)
    traced, eager = copies(given), copies(given)
    torch.compiler.reset()
    output = torch.compile(call, fullgraph=True)(traced)
    assert same_bits(output, call(eager))
    assert same_bits(traced["initial_state"], eager["initial_state"])
