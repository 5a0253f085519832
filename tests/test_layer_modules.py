"""The layer's projections: three layouts of one model, and other people's modules in their places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gated_delta.errors import ShapeError
from gated_delta.layer import GatedDeltaNetAttention, projection_sizes
from gated_delta.parallel import load_weights
from helpers import same_bits
from layer_helpers import OLMO, SMALL, Engine, Move, make_layer

FLAT = replace(SMALL, projection="flat")


class LowRank(nn.Module):
    """A frozen projection and an adapter beside it."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class EightBit(nn.Module):
    """A weight in 8 bits with a scale a row."""

    scale: Tensor
    stored: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("stored", (linear.weight / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.stored * self.scale).to(x.dtype).T


class Wrong(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.outputs)


def steps(engine: Engine) -> None:
    a, b = engine.add(20), engine.add(20)
    engine.step(Move(a, 9), Move(b, 3))
    for _ in range(3):
        engine.step(Move(a, 1), Move(b, 1))
    engine.step(Move(b, 1), Move(a, 4))
    engine.assert_right()


def with_adapters(layer: GatedDeltaNetAttention) -> None:
    """On each projection by itself: q, k, v without z."""
    for name, size in {**projection_sizes(layer.config), "out_proj": layer.config.hidden_size}.items():
        inputs = layer.config.value_dim if name == "out_proj" else layer.config.hidden_size
        setattr(layer, name, LowRank(getattr(layer, name), inputs, size))


def in_eight_bits(layer: GatedDeltaNetAttention) -> None:
    for name in (*projection_sizes(layer.config), "out_proj"):
        setattr(layer, name, EightBit(getattr(layer, name)))


@pytest.mark.parametrize("config", [SMALL, FLAT, replace(OLMO, projection="merged")], ids=lambda c: c.projection)
@pytest.mark.parametrize("change", [with_adapters, in_eight_bits])
def test_replaced_projections(config: object, change: Callable[[GatedDeltaNetAttention], None]) -> None:
    """The engine's oracle runs the same modules in float64."""
    layer = make_layer(config)  # pyright: ignore[reportArgumentType]
    change(layer)
    layer.requires_grad_(False)
    steps(Engine(layer))


@pytest.mark.parametrize("name", [*projection_sizes(FLAT), "out_proj"])
def test_a_projection_of_the_wrong_shape(name: str) -> None:
    engine = Engine(make_layer(FLAT))
    a, b = engine.add(20), engine.add(20)
    engine.step(Move(a, 9))
    size = {**projection_sizes(FLAT), "out_proj": 48}[name]
    before = [x.clone() for x in engine.state[:2]]
    setattr(engine.layer, name, Wrong(size + 1))
    with pytest.raises(ShapeError) as raised:
        engine.step(Move(a, 1), Move(b, 4))
    assert f"what {name} gives is of shape" in str(raised.value)
    assert f", {size + 1}]; it must be [" in str(raised.value)
    assert all(same_bits(x, y) for x, y in zip(before, engine.state[:2], strict=True))


def test_one_model_in_three_layouts() -> None:
    """Merged weights come from the flat checkpoint and give what that gives."""
    flat = make_layer(FLAT)
    merged = make_layer(replace(SMALL, projection="merged"))
    load_weights(merged, flat.state_dict())
    hidden = torch.randn(1, 30, 48, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(merged.evaluate(hidden), flat.evaluate(hidden), rtol=1e-5, atol=1e-6)
    steps(Engine(merged))
