"""The shape of a Gated Delta Net layer."""

from __future__ import annotations

from dataclasses import dataclass

from gated_delta.errors import OptionError
from gated_delta.validation.arguments import HEAD_SIZES, LISTED_HEAD_SIZES


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Shape of one layer.

    ``projection`` is the layout of the input projections: "interleaved" (Qwen3-Next: rows of one matrix grouped by
    key head) or "flat" (Qwen3.5 and OLMo-hybrid: q, k, v in one matrix, z, b and a in their own, so that an adapter
    can attach to each). ``allow_neg_eigval`` doubles beta (OLMo-hybrid).
    """

    hidden_size: int
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int = 128
    head_v_dim: int = 128
    conv_width: int = 4
    projection: str = "interleaved"
    norm_eps: float = 1e-6
    output_gate: str = "silu"
    allow_neg_eigval: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_k_heads", "num_v_heads"):
            if getattr(self, name) < 1:
                raise OptionError("GatedDeltaNetConfig", name, getattr(self, name), "at least 1")
        for name in ("head_k_dim", "head_v_dim"):
            if getattr(self, name) not in HEAD_SIZES:
                must = f"one of {LISTED_HEAD_SIZES}"
                raise OptionError("GatedDeltaNetConfig", name, getattr(self, name), must)
        if not 2 <= self.conv_width <= 5:
            raise OptionError("GatedDeltaNetConfig", "conv_width", self.conv_width, "2 to 5")
        if self.num_v_heads % self.num_k_heads:
            raise OptionError(
                "GatedDeltaNetConfig", "num_v_heads", self.num_v_heads, f"a multiple of num_k_heads={self.num_k_heads}"
            )
        if self.projection not in ("interleaved", "flat"):
            raise OptionError("GatedDeltaNetConfig", "projection", repr(self.projection), '"interleaved" or "flat"')
        if self.output_gate not in ("silu", "swish", "sigmoid"):
            raise OptionError(
                "GatedDeltaNetConfig", "output_gate", repr(self.output_gate), '"silu", "swish" or "sigmoid"'
            )

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim
