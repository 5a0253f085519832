"""GatedDeltaNetAttention: projections by their checkpoint layouts, A_log's dtype, and ``evaluate``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.testing.budget import assert_within_budget, relative_error
from layer_helpers import OLMO, SMALL, exact_output, make_layer, normal, trace

LAYOUTS = ("interleaved", "flat")


# --- projections ------------------------------------------------------------------------------------------------------


def interleaved_rows(c: GatedDeltaNetConfig) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Which rows of ``in_proj_qkvz`` and ``in_proj_ba`` belong to what, counted off one row at a time."""
    ratio = c.num_v_heads // c.num_k_heads
    qkvz: dict[str, list[int]] = {name: [] for name in "qkvz"}
    ba: dict[str, list[int]] = {name: [] for name in "ba"}
    row = gate = 0
    for _ in range(c.num_k_heads):
        for name, count in (
            ("q", c.head_k_dim),
            ("k", c.head_k_dim),
            ("v", ratio * c.head_v_dim),
            ("z", ratio * c.head_v_dim),
        ):
            for _ in range(count):
                qkvz[name].append(row)
                row += 1
        for name in "ba":
            for _ in range(ratio):
                ba[name].append(gate)
                gate += 1
    return qkvz, ba


def slow_project(layer: GatedDeltaNetAttention, hidden: Tensor) -> dict[str, Tensor]:
    """q, k, v, z, b and a, each channel by its own row of the checkpoint."""
    weights, c = layer.state_dict(), layer.config
    if c.projection == "interleaved":
        qkvz, ba = interleaved_rows(c)
        rows = {name: weights["in_proj_qkvz.weight"][list(index)] for name, index in qkvz.items()}
        rows |= {name: weights["in_proj_ba.weight"][list(index)] for name, index in ba.items()}
    else:
        fused = weights["in_proj_qkv.weight"]
        rows = {"q": fused[: c.key_dim], "k": fused[c.key_dim : 2 * c.key_dim], "v": fused[2 * c.key_dim :]}
        rows |= {name: weights[f"in_proj_{name}.weight"] for name in "zba"}
    return {name: torch.stack([(hidden * row).sum(-1) for row in block], -1) for name, block in rows.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 4), (3, 6)])
def test_project_reads_the_checkpoint_layout(layout: str, heads: tuple[int, int]) -> None:
    config = replace(SMALL, projection=layout, num_k_heads=heads[0], num_v_heads=heads[1])
    layer, hidden = make_layer(config), normal(9, 48, seed=0)
    p = layer.project(hidden)
    z = p.heads.z.flatten(1, 2)
    assert z.shape == (9, heads[1], config.head_v_dim)
    q, k, v = layer.config.split_heads(p.qkv)
    assert q.shape == k.shape == (9, heads[0], config.head_k_dim)
    assert v.shape == z.shape
    actual = {"q": q, "k": k, "v": v, "z": z, "b": p.heads.b, "a": p.heads.a}
    plain, exact = slow_project(layer, hidden), slow_project(layer.double(), hidden.double())
    for name, x in actual.items():
        assert_within_budget(name, x.flatten(1), plain[name], exact[name])


@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
def test_one_set_of_weights_gives_one_output_in_both_layouts(heads: tuple[int, int]) -> None:
    config = replace(SMALL, projection="flat", num_k_heads=heads[0], num_v_heads=heads[1])
    flat = make_layer(config)
    weights = flat.state_dict()
    q, k, v = weights.pop("in_proj_qkv.weight").split((config.key_dim, config.key_dim, config.value_dim))
    blocks = {"q": q, "k": k, "v": v, **{name: weights.pop(f"in_proj_{name}.weight") for name in "zba"}}
    for fused, rows in zip(("in_proj_qkvz", "in_proj_ba"), interleaved_rows(config), strict=True):
        weight = torch.empty(sum(map(len, rows.values())), config.hidden_size)
        for name, index in rows.items():
            weight[index] = blocks[name]
        weights[f"{fused}.weight"] = weight
    interleaved = make_layer(replace(config, projection="interleaved"))
    interleaved.load_state_dict(weights)
    hidden = normal(20, 48, seed=0)
    exact = exact_output(flat, hidden)
    assert_within_budget("flat", flat.evaluate(hidden[None])[0], trace(flat, hidden).output, exact)
    assert_within_budget("interleaved", interleaved.evaluate(hidden[None])[0], trace(flat, hidden).output, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_checkpoints(layout: str) -> None:
    layer = GatedDeltaNetAttention(replace(SMALL, projection=layout))
    key, value, heads = 2 * 32, 4 * 64, 4
    common = {
        "conv1d.weight": (2 * key + value, 1, 4), "A_log": (heads,), "dt_bias": (heads,), "norm.weight": (64,),
        "out_proj.weight": (48, value),
    }  # fmt: skip
    own = {
        "interleaved": {"in_proj_qkvz.weight": (2 * key + 2 * value, 48), "in_proj_ba.weight": (2 * heads, 48)},
        "flat": {
            "in_proj_qkv.weight": (2 * key + value, 48), "in_proj_z.weight": (value, 48),
            "in_proj_b.weight": (heads, 48), "in_proj_a.weight": (heads, 48),
        },
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == common | own[layout]
    assert {name for name, _ in layer.named_parameters()} == set(common | own[layout])


# --- A_log ------------------------------------------------------------------------------------------------------------


def _through_state_dict(layer: GatedDeltaNetAttention) -> GatedDeltaNetAttention:
    fresh = GatedDeltaNetAttention(layer.config).bfloat16()
    fresh.load_state_dict(layer.bfloat16().state_dict())
    return fresh


def _as_a_child(layer: GatedDeltaNetAttention) -> GatedDeltaNetAttention:
    torch.nn.ModuleList([layer]).bfloat16()
    return layer


CASTS: dict[str, tuple[Callable[[GatedDeltaNetAttention], GatedDeltaNetAttention], torch.dtype]] = {
    "to(bfloat16)": (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda layer: layer.half(), torch.float16),
    "bfloat16": (lambda layer: layer.bfloat16(), torch.bfloat16),
    "double": (lambda layer: layer.double(), torch.float64),
    "to(device)": (lambda layer: layer.to("cpu"), torch.float32),
    "to(device, dtype)": (lambda layer: layer.to("cpu", torch.float16), torch.float16),
    "there and back": (lambda layer: layer.bfloat16().float(), torch.float32),
    "state_dict": (_through_state_dict, torch.bfloat16),
    "as a child": (_as_a_child, torch.bfloat16),
    "deepcopy": (lambda layer: copy.deepcopy(layer.half()), torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_log_stays_fp32(name: str) -> None:
    cast, dtype = CASTS[name]
    layer = GatedDeltaNetAttention(SMALL)
    before = layer.A_log.detach().clone()
    after = cast(layer)
    assert after.A_log.dtype == torch.float32
    assert torch.equal(after.A_log, before)
    assert isinstance(after.A_log, torch.nn.Parameter)
    assert after.A_log.requires_grad
    assert {x.dtype for n, x in after.named_parameters() if n != "A_log"} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_built_on_meta_materialises(dtype: torch.dtype) -> None:
    """How engines load a checkpoint: no memory for random weights first."""
    weights = make_layer(dtype=dtype).state_dict()
    with torch.device("meta"):
        layer = GatedDeltaNetAttention(SMALL).to(dtype)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(weights)
    assert layer.A_log.dtype == torch.float32
    assert all(torch.equal(x, weights[name]) for name, x in layer.state_dict().items())


def test_a_log_in_bf16_would_matter() -> None:
    """A slowly forgetting head after 300 tokens: the decay of a rounded A_log is another layer's."""
    layer = make_layer(replace(SMALL, num_v_heads=2))
    layer.A_log.copy_(torch.tensor([0.0051, -2.03]).exp().log())
    hidden = normal(300, 48, seed=0)
    exact = exact_output(layer, hidden)
    plain = trace(layer, hidden).output
    assert_within_budget("fp32", layer.evaluate(hidden[None])[0], plain, exact)
    layer.A_log.copy_(layer.A_log.bfloat16())
    moved = relative_error(layer.evaluate(hidden[None])[0], exact)
    assert moved > 100 * relative_error(plain, exact)
    a_log = torch.linspace(-3, 3, 1001)
    assert 3e-3 < (a_log.bfloat16().double().exp() / a_log.double().exp() - 1).abs().max() < 1e-2


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, projection="flat"), OLMO], ids=["interleaved", "flat", "OLMo-hybrid"]
)
def test_evaluate_by_chunks_and_token_by_token(config: GatedDeltaNetConfig) -> None:
    layer, hidden = make_layer(config), normal(2, 75, 48, seed=0)
    exact = torch.stack([exact_output(layer, row) for row in hidden])
    plain = torch.stack([trace(layer, row).output for row in hidden])
    assert_within_budget("token by token", layer.evaluate(hidden, token_by_token=True), plain, exact)
    assert_within_budget("by chunks", layer.evaluate(hidden), plain, exact)
    double = copy.deepcopy(layer).double().evaluate(hidden.double(), dtype=torch.float64)
    assert relative_error(double, exact) < 1e-12  # both exact: no plain evaluation to compare with


@pytest.mark.parametrize("config", [SMALL, OLMO], ids=["silu", "OLMo-hybrid"])
def test_the_tests_own_trace_is_the_same_layer(config: GatedDeltaNetConfig) -> None:
    layer, hidden = make_layer(config), normal(40, 48, seed=0)
    own = trace(copy.deepcopy(layer).double(), hidden.double(), cuts=(3, 30), dtype=torch.float64).output
    assert relative_error(own, exact_output(layer, hidden)) < 1e-12


def test_beta_reaches_two_only_with_allow_neg_eigval() -> None:
    hidden = normal(20, 48, seed=0)
    once, twice = (make_layer(replace(OLMO, allow_neg_eigval=allowed)) for allowed in (False, True))
    assert relative_error(once.evaluate(hidden[None])[0], exact_output(twice, hidden)) > 0.05


def test_sequences_of_a_batch_do_not_meet() -> None:
    layer, hidden = make_layer(), normal(3, 40, 48, seed=0)
    other = hidden.clone()
    other[1] = torch.nan
    assert torch.equal(layer.evaluate(hidden)[::2], layer.evaluate(other)[::2])


def test_evaluate_is_differentiable_and_causal() -> None:
    layer = make_layer().requires_grad_(True)
    hidden = normal(1, 40, 48, seed=0).requires_grad_(True)
    layer.evaluate(hidden)[0, 20].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :21].abs().sum(-1).all()
    assert not hidden.grad[0, 21:].any()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in layer.parameters())
