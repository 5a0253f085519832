"""GatedDeltaNetConfig: from the configs of published models, and cut among ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import OptionError

LINEAR = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
QWEN = {"hidden_size": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_hidden_layers": 48, **LINEAR}
QWEN3_NEXT = {"model_type": "qwen3_next", **QWEN}
DENSE = {"model_type": "qwen3_5_text", **QWEN, "linear_num_value_heads": 48, "hidden_size": 5120}
EXPERTS = {"model_type": "qwen3_5_moe_text", **QWEN, "linear_num_value_heads": 64, "output_gate_type": "swish"}
OLMO = {
    "model_type": "olmo_hybrid", "hidden_size": 3840, "num_attention_heads": 30, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "linear_num_key_heads": None, "linear_num_value_heads": None, "linear_key_head_dim": None,
    "linear_value_head_dim": None, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
}  # fmt: skip
COMMON: dict[str, Any] = {"head_k_dim": 128, "head_v_dim": 128, "conv_width": 4, "norm_eps": 1e-6}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3-Next": (
        QWEN3_NEXT,
        {"hidden_size": 2048, "num_k_heads": 16, "num_v_heads": 32, "projection": "interleaved", **COMMON},
    ),
    "Qwen3.5": (
        {"model_type": "qwen3_5", "text_config": DENSE, "vision_config": {"hidden_size": 1152}},
        {"hidden_size": 5120, "num_k_heads": 16, "num_v_heads": 48, "projection": "flat", **COMMON},
    ),
    "Qwen3.5, text alone, named as a whole": (
        {**DENSE, "model_type": "qwen3_5"},
        {"hidden_size": 5120, "num_k_heads": 16, "num_v_heads": 48, "projection": "flat", **COMMON},
    ),
    "Qwen3.5 with experts": (
        {"model_type": "qwen3_5_moe", "text_config": EXPERTS},
        {
            "hidden_size": 2048, "num_k_heads": 16, "num_v_heads": 64, "projection": "flat", "output_gate": "swish",
            **COMMON,
        },
    ),
    "OLMo-hybrid": (
        OLMO,
        {
            "hidden_size": 3840, "num_k_heads": 30, "num_v_heads": 30, "head_k_dim": 96, "head_v_dim": 192,
            "conv_width": 4, "projection": "flat", "norm_eps": 1e-5, "output_gate": "silu", "allow_neg_eigval": True,
        },
    ),
}  # fmt: skip


def as_object(config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{k: as_object(v) if isinstance(v, dict) else v for k, v in config.items()})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("given", [dict, as_object])
def test_from_hf(name: str, given: Any) -> None:
    config, wanted = SHAPES[name]
    assert GatedDeltaNetConfig.from_hf(given(config)) == GatedDeltaNetConfig(**wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (
        {**QWEN3_NEXT, "model_type": "llama"},
        "model_type is 'llama'; it must be one of qwen3_next, qwen3_5, qwen3_5_text, qwen3_5_moe, qwen3_5_moe_text, "
        "olmo_hybrid",
    ),
    "a composite of another model": (
        {"model_type": "qwen3_5", "text_config": {**DENSE, "model_type": "qwen3_vl_text"}},
        "model_type is 'qwen3_vl_text'; it must be one of",
    ),
    "no model": (QWEN, "config.model_type is missing; it must be given"),
    "no heads": (
        {k: v for k, v in QWEN3_NEXT.items() if k != "linear_num_key_heads"},
        "config.linear_num_key_heads is missing; it must be given",
    ),
    "heads that no layer has": ({**QWEN3_NEXT, "linear_key_head_dim": 100}, "head_k_dim is 100; it must be one of"),
    "another gate": ({**QWEN3_NEXT, "hidden_act": "gelu"}, "output_gate is 'gelu'; it must be"),
    "another layout": ({"projection": "sideways"}, 'must be "interleaved" or "flat" or "merged"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(OptionError) as raised:
        if "projection" in config:
            GatedDeltaNetConfig(hidden_size=8, num_k_heads=1, num_v_heads=1, **config)
        else:
            GatedDeltaNetConfig.from_hf(config)
    assert message in str(raised.value)


def test_shards() -> None:
    whole = GatedDeltaNetConfig.from_hf(QWEN3_NEXT)
    own = whole.shard(4)
    assert (own.num_k_heads, own.num_v_heads, own.ratio, own.hidden_size) == (4, 8, 2, 2048)
    assert whole.shard(1) == whole
    for size in (3, 0, -2, 32):
        with pytest.raises(OptionError, match=f"size is {size}; it must be at least 1 and a divisor of num_k_heads=16"):
            whole.shard(size)
