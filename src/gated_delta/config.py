"""The shape of a Gated Delta Net layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gated_delta.errors import OptionError
from gated_delta.validation.arguments import HEAD_SIZES, LISTED_HEAD_SIZES, Arguments

PROJECTIONS = ("interleaved", "flat", "merged")
_MODELS = {
    "qwen3_next": "interleaved", "qwen3_5": "flat", "qwen3_5_text": "flat", "qwen3_5_moe": "flat",
    "qwen3_5_moe_text": "flat", "olmo_hybrid": "flat",
}  # fmt: skip
"""``model_type`` of the configs that :meth:`GatedDeltaNetConfig.from_hf` knows, and the layout of their weights."""
_OLMO_EPS = 1e-5
"""OLMo-hybrid's gated norm has its own constant, whatever ``rms_norm_eps`` says of the other norms."""
_NEEDED = object()


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Shape of one layer.

    ``projection`` is the layout of the input projections: "interleaved" (Qwen3-Next: rows of one matrix grouped by
    key head), "flat" (Qwen3.5 and OLMo-hybrid: q, k, v in one matrix, z, b and a in their own, so that an adapter
    can attach to each) or "merged" (the flat ones joined, q, k, v, z and b, a: two matrix products instead of four).
    ``allow_neg_eigval`` doubles beta (OLMo-hybrid).
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
        args = Arguments("GatedDeltaNetConfig")
        for name in ("hidden_size", "num_k_heads", "num_v_heads"):
            args.whole(name, getattr(self, name), least=1)
        for name in ("head_k_dim", "head_v_dim"):
            args.word(name, getattr(self, name), HEAD_SIZES, f"one of {LISTED_HEAD_SIZES}")
        args.word("conv_width", self.conv_width, range(2, 6), "2 to 5")
        if self.num_v_heads % self.num_k_heads:
            must = f"a multiple of num_k_heads={self.num_k_heads}"
            raise OptionError(args.where, "num_v_heads", self.num_v_heads, must)
        args.word("projection", self.projection, PROJECTIONS, " or ".join(f'"{name}"' for name in PROJECTIONS))
        args.word("output_gate", self.output_gate, ("silu", "swish", "sigmoid"), '"silu", "swish" or "sigmoid"')

    @classmethod
    def from_hf(cls, config: Any) -> "GatedDeltaNetConfig":
        """The layer of a published model: of a Transformers config, or of what its ``config.json`` holds.

        Args:
            config: an object or a mapping with ``model_type`` qwen3_next, qwen3_5, qwen3_5_moe or olmo_hybrid, or a
                composite one whose ``text_config`` is such.

        Raises:
            OptionError: another ``model_type``, a field that is missing, or one that no layer can have.
        """

        def field(name: str, default: Any = _NEEDED) -> Any:
            found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if found is None and default is _NEEDED:
                raise OptionError("GatedDeltaNetConfig.from_hf", f"config.{name}", "missing", "given")
            return default if found is None else found

        config = field("text_config", config)
        kind = field("model_type")
        if kind not in _MODELS:
            raise OptionError("GatedDeltaNetConfig.from_hf", "model_type", repr(kind), f"one of {', '.join(_MODELS)}")
        is_olmo = kind == "olmo_hybrid"
        heads = field("num_attention_heads") if is_olmo else _NEEDED
        hidden, key_heads = field("hidden_size"), field("linear_num_key_heads", heads)
        key = field("linear_key_head_dim", int(0.75 * hidden / key_heads) if is_olmo else _NEEDED)
        return cls(
            hidden_size=hidden, num_k_heads=key_heads, num_v_heads=field("linear_num_value_heads", heads),
            head_k_dim=key, head_v_dim=field("linear_value_head_dim", 2 * key if is_olmo else _NEEDED),
            conv_width=field("linear_conv_kernel_dim"), projection=_MODELS[kind],
            norm_eps=_OLMO_EPS if is_olmo else field("rms_norm_eps"),
            output_gate=field("output_gate_type", field("hidden_act", "silu")),
            allow_neg_eigval=is_olmo and field("linear_allow_neg_eigval", True),
        )  # fmt: skip

    def shard(self, size: int) -> "GatedDeltaNetConfig":
        """The part of one of ``size`` ranks that share the heads.

        Raises:
            OptionError: ``size`` does not divide the heads.
        """
        for name in ("num_k_heads", "num_v_heads"):
            if size < 1 or getattr(self, name) % size:
                must = f"at least 1 and a divisor of {name}={getattr(self, name)}"
                raise OptionError("GatedDeltaNetConfig.shard", "tensor-parallel size", size, must)
        return replace(self, num_k_heads=self.num_k_heads // size, num_v_heads=self.num_v_heads // size)

    @property
    def ratio(self) -> int:
        """Value heads that share a key head."""
        return self.num_v_heads // self.num_k_heads

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[L, conv_dim]`` -> q and k ``[L, Hk, K]``, v ``[L, HV, V]``, all views."""
        q, k, v = qkv.split_with_sizes((self.key_dim, self.key_dim, self.value_dim), -1)
        heads = (-1, self.num_k_heads, self.head_k_dim)
        return q.view(heads), k.view(heads), v.view(-1, self.num_v_heads, self.head_v_dim)
