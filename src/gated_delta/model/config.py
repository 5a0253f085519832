"""Shape of the small hybrid language model."""

from dataclasses import dataclass

from gated_delta.config import GatedDeltaNetConfig

VOCABULARY = 256
"""Tokens are bytes."""
DELTA_NET = GatedDeltaNetConfig(hidden_size=256, num_k_heads=2, num_v_heads=4, head_k_dim=64, head_v_dim=64)


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Gated Delta Net layers with one full-attention layer in four, as in Qwen3-Next, at a few million parameters."""

    hidden_size: int = 256
    layers: int = 8
    attention_every: int = 4
    attention_heads: int = 4
    mlp_size: int = 576
    max_positions: int = 1024
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    delta_net: GatedDeltaNetConfig = DELTA_NET

    def is_attention(self, layer: int) -> bool:
        return (layer + 1) % self.attention_every == 0
