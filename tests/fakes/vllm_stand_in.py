"""A stand-in for vLLM: what our plug-in touches of it, which cannot compute anything itself."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.interop import vllm as plugin


class Layer(nn.Module):
    """What ours calls of the engine's class."""

    def __init__(self, config: Any, vllm_config: Any, prefix: str = "", gqa_interleaved_layout: bool = False) -> None:
        super().__init__()
        c, ratio = config, config.linear_num_value_heads // config.linear_num_key_heads
        self.prefix, self.gqa_interleaved_layout, self.tp_size, self.activation = (
            prefix,
            gqa_interleaved_layout,
            1,
            "silu",
        )
        self.hidden_size, self.layer_norm_epsilon = c.hidden_size, c.rms_norm_eps
        self.num_k_heads, self.num_v_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.head_k_dim, self.head_v_dim = c.linear_key_head_dim, c.linear_value_head_dim
        self.conv_kernel_size, self.cache_config = c.linear_conv_kernel_dim, vllm_config.cache_config
        shape = GatedDeltaNetConfig(
            hidden_size=c.hidden_size, num_k_heads=self.num_k_heads, num_v_heads=ratio * self.num_k_heads,
            head_k_dim=self.head_k_dim, head_v_dim=self.head_v_dim,
        )  # fmt: skip
        self.in_proj_qkvz = Pair(c.hidden_size, shape.conv_dim + shape.value_dim)
        self.in_proj_ba, self.out_proj = Pair(c.hidden_size, 2 * self.num_v_heads), Pair(shape.value_dim, c.hidden_size)
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, c.linear_conv_kernel_dim, groups=shape.conv_dim)
        self.norm = nn.Module()
        self.norm.weight, self.norm.activation = nn.Parameter(torch.ones(c.linear_value_head_dim)), c.output_gate_type
        self.dt_bias, self.A_log = (nn.Parameter(torch.ones(self.num_v_heads)) for _ in range(2))
        columns = c.linear_conv_kernel_dim - 1 + vllm_config.num_speculative_tokens
        conv = (columns, shape.conv_dim) if Layer.layout == "SD" else (shape.conv_dim, columns)
        self.shapes = conv, (self.num_v_heads, self.head_v_dim, self.head_k_dim)
        self.kv_cache: Any = []

    layout = "SD"

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        pages, first, bound = kv_cache.squeeze(dim=(1, 2)), 0, []
        for shape in self.shapes:
            size = 4 * torch.Size(shape).numel()
            bound.append(pages[:, first : first + size].view(torch.float32).view(-1, *shape))
            first += size
        self.kv_cache = tuple(bound)

    def split_ba(self, ba: Tensor) -> tuple[Tensor, ...]:
        return ba.chunk(2, dim=-1)


class Pair(nn.Linear):
    """A projection that gives an output and a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


class Plugins:
    """Its registry: a class that is registered by another's name is made in its place."""

    op_registry_oot: ClassVar[dict[str, type]] = {}

    class PluggableLayer(Layer):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(Plugins.op_registry_oot.get(cls.__name__, cls))

        @classmethod
        def register_oot(cls, ours: type, name: str) -> None:
            assert name not in Plugins.op_registry_oot
            Plugins.op_registry_oot[name] = ours


CONTEXT = SimpleNamespace(attn_metadata=None, layers={})


def operator(qkvz: Tensor, ba: Tensor, out: Tensor, layer_name: str) -> None:
    CONTEXT.layers[layer_name]._forward_core_fused_norm_packed(mixed_qkvz=qkvz, ba=ba, core_attn_out=out)


class Finder:
    """Finds the layer's module, which has not been imported."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == plugin.MODULE else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        module.QwenGatedDeltaNetAttention = type(plugin.LAYER, (Plugins.PluggableLayer,), {})
        module.is_conv_state_dim_first = lambda: Layer.layout == "DS"
        module.get_forward_context, module._encode_layer_name = lambda: CONTEXT, str


def install(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plugins, "op_registry_oot", {})
    names = [plugin.MODULE.rsplit(".", depth)[0] for depth in range(1, 6)]
    for name in (*names, "vllm.model_executor.custom_op"):
        module: Any = ModuleType(name)
        module.__path__, module.__version__ = [], "0.33.0"
        module.PluggableLayer, module.op_registry_oot = Plugins.PluggableLayer, Plugins.op_registry_oot
        patch.setitem(sys.modules, name, module)
    patch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    patch.delitem(sys.modules, plugin.MODULE, raising=False)
