"""Tensor parallelism: shards of every layout, loaded from checkpoints, add up to the layer; also over two processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import GradientError, OptionError, ShapeError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.parallel import Parallel, load_weights
from gated_delta.state import StatePool
from gated_delta.testing.budget import assert_within_budget
from helpers import same_bits
from layer_helpers import exact_output, make_layer, normal, trace

safetensors = pytest.importorskip("safetensors.torch")
CONFIG = GatedDeltaNetConfig(hidden_size=32, num_k_heads=4, num_v_heads=8, head_k_dim=32, head_v_dim=32)
LAYOUTS = {name: replace(CONFIG, projection=name) for name in ("interleaved", "flat", "merged")}
PREFIX = "model.layers.3.linear_attn."


def run(layer: GatedDeltaNetAttention, hidden: Tensor) -> Tensor:
    """A prompt in two pieces, then tokens one by one."""
    state = StatePool(layer.config, layers=1, slots=2, conv_dtype=hidden.dtype).layer(0)
    outputs, at = [], 0
    for tokens in (5, 9, 1, 1, 1):
        batch = GatedDeltaNetBatch.build([Row(tokens, 1, fresh=at == 0)])
        outputs.append(layer(hidden[at : at + tokens], batch, state))
        at += tokens
    return torch.cat(outputs)


def checkpoint(layout: str, dtype: torch.dtype = torch.float32) -> tuple[GatedDeltaNetAttention, dict[str, Tensor]]:
    """A whole layer, and the weights from which layers of this layout are loaded."""
    published = make_layer(LAYOUTS["flat" if layout == "merged" else layout], dtype=dtype)
    return published, {PREFIX + name: x.clone() for name, x in published.state_dict().items()}


def shard(layout: str, weights: Any, parallel: Parallel, dtype: torch.dtype = torch.float32) -> GatedDeltaNetAttention:
    layer = GatedDeltaNetAttention(LAYOUTS[layout], parallel).to(dtype).requires_grad_(False)
    load_weights(layer, weights, PREFIX)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_add_up(layout: str, size: int, dtype: torch.dtype) -> None:
    whole, weights = checkpoint(layout, dtype)
    hidden = normal(17, 32, seed=1, dtype=dtype)
    outputs = [run(shard(layout, weights, Parallel(rank, size), dtype), hidden) for rank in range(size)]
    plain = trace(whole, hidden).output
    assert_within_budget("output", torch.stack(outputs).sum(0), plain, exact_output(whole, hidden))


def olmo_names(weights: dict[str, Tensor], c: GatedDeltaNetConfig) -> dict[str, Tensor]:
    """A flat checkpoint as OLMo-hybrid publishes it: everything apart."""
    parts = (c.key_dim, c.key_dim, c.value_dim)
    named = {PREFIX + name: weights[PREFIX + name] for name in ("A_log", "dt_bias")}
    for joined, apart in (("in_proj_qkv", "{}_proj"), ("conv1d", "{}_conv1d")):
        for x, part in zip("qkv", weights[f"{PREFIX}{joined}.weight"].split(parts), strict=True):
            named[f"{PREFIX}{apart.format(x)}.weight"] = part.contiguous()
    renamed = {"in_proj_z": "g_proj", "in_proj_b": "b_proj", "in_proj_a": "a_proj", "norm": "o_norm"}
    for name, other in {**renamed, "out_proj": "o_proj"}.items():
        named[f"{PREFIX}{other}.weight"] = weights[f"{PREFIX}{name}.weight"]
    return named


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_loaded_as_tensors_are(layout: str, tmp_path: Path) -> None:
    """Of several files and of both vocabularies."""
    _, weights = checkpoint(layout)
    names = sorted(weights)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, own in zip(paths, (names[::2], names[1::2]), strict=True):
        safetensors.save_file({name: weights[name] for name in own}, path)
    sources: list[Any] = [paths]
    if layout != "interleaved":
        safetensors.save_file(olmo_names(weights, CONFIG), tmp_path / "olmo.safetensors")
        sources += [tmp_path / "olmo.safetensors", olmo_names(weights, CONFIG)]
    for rank in range(2):
        wanted = shard(layout, weights, Parallel(rank, 2)).state_dict()
        for source in sources:
            found = shard(layout, source, Parallel(rank, 2)).state_dict()
            assert all(same_bits(x, wanted[name]) for name, x in found.items())


def _without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: {key: x for key, x in weights.items() if key != PREFIX + name}


def _longer(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: {**weights, PREFIX + name: torch.cat((weights[PREFIX + name],) * 2)}


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = {
    "missing": (
        _without("out_proj.weight"), OptionError,
        f"{PREFIX}out_proj.weight or {PREFIX}o_proj.weight is missing; it must be in the checkpoint",
    ),
    "shape": (
        _longer("conv1d.weight"), ShapeError,
        f"{PREFIX}conv1d.weight is of shape [1024, 1, 4]; it must be of shape [512, 1, 4]",
    ),
    "no file": (lambda _: "nowhere.safetensors", OptionError, "source is nowhere.safetensors; it must be an existing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_loads_nothing(name: str) -> None:
    change, error, message = BAD[name]
    _, weights = checkpoint("flat")
    layer = GatedDeltaNetAttention(LAYOUTS["flat"], Parallel(0, 2)).requires_grad_(False)
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    with pytest.raises(error) as raised:
        load_weights(layer, change(weights), PREFIX)
    assert message in str(raised.value)
    assert all(same_bits(x, before[key]) for key, x in layer.state_dict().items())


@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_do_not_divide_the_heads(size: int) -> None:
    with pytest.raises(OptionError, match=f"tensor-parallel size is {size}; it must be .* a divisor of num_k_heads=4"):
        GatedDeltaNetAttention(CONFIG, Parallel(0, size))


def _rank(rank: int, folder: Path, dtype: torch.dtype) -> None:
    """One of two processes: its shard of each layout, and the one way in which it must refuse."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    hidden = normal(17, 32, seed=1, dtype=dtype)
    for layout in LAYOUTS:
        layer = shard(layout, folder / f"{layout}.safetensors", Parallel.of(), dtype)
        torch.save(run(layer, hidden), folder / f"{layout}-{rank}.pt")
        with pytest.raises(GradientError, match="output is a tensor that requires grad"):
            layer.requires_grad_(True).evaluate(hidden[None])
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    dtype, hidden = torch.bfloat16, normal(17, 32, seed=1, dtype=torch.bfloat16)
    wholes = {}
    for layout in LAYOUTS:
        wholes[layout], weights = checkpoint(layout, dtype)
        safetensors.save_file(weights, tmp_path / f"{layout}.safetensors")
    mp.spawn(_rank, (tmp_path, dtype), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for layout, whole in wholes.items():
        first, second = (torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in range(2))
        assert same_bits(first, second)
        assert_within_budget(layout, first, trace(whole, hidden).output, exact_output(whole, hidden))
