"""The small hybrid language model: byte embeddings, GDN and attention layers, a tied output projection; its shape, its
weights, and what it keeps of running sequences.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import OptionError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.parallel import opened_file
from gated_delta.state import LayerState, StatePool

WEIGHTS = Path(__file__).with_name("hybrid_lm.safetensors")
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


class Session:
    """A running sequence, or ``rows`` of equal length in step: slots of GDN state, KV cache, position.

    With ``drafts`` every step after the first is speculative: the state after each of its tokens is kept until
    :meth:`keep` says how many of them count.

    Raises (in :meth:`begin`):
        OptionError: the context would outgrow the positions that the model was trained for.
    """

    def __init__(
        self, config: HybridConfig, *, rows: int = 1, drafts: int = 0, state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.drafts, self.device = config, drafts, torch.device(device)
        attention = [config.is_attention(i) for i in range(config.layers)]
        self._pool = StatePool(
            config.delta_net, layers=attention.count(False), slots=rows * (drafts + 1), num_spec=drafts,
            state_dtype=state_dtype, device=device,
        )  # fmt: skip
        self._slots = [self._pool.allocate(drafts + 1) for _ in range(rows)]
        kv_shape = (2, rows, config.max_positions, config.attention_heads, config.hidden_size // config.attention_heads)
        self.states: list[LayerState | Tensor] = [
            torch.zeros(kv_shape, device=device) if here else self._pool.layer(attention[:i].count(False))
            for i, here in enumerate(attention)
        ]
        """What each layer of the model keeps: GDN state, or a cache of keys and values."""
        self.length = 0
        self._accepted = 1
        self._stepped = 0

    def begin(self, tokens: int) -> GatedDeltaNetBatch:
        """Describe a step of ``tokens`` tokens a row; :meth:`keep` ends it."""
        if self.length + tokens > self.config.max_positions:
            was, most = f"{self.length + tokens} tokens long", self.config.max_positions
            raise OptionError("Session", "the context", was, f"at most {most}, the model's positions")
        rows: list[Row | SpecRow] = [Row(tokens, slots[0], fresh=self.length == 0) for slots in self._slots]
        if self.drafts and self.length:
            rows = [SpecRow(tokens, slots, self._accepted) for slots in self._slots]
        self._stepped = tokens
        return GatedDeltaNetBatch.build(rows, num_spec=self.drafts, device=self.device)

    def keep(self, tokens: int) -> None:
        """End a step: its first ``tokens`` tokens count, the rest is rolled back.

        Raises:
            OptionError: more than the step had, none, or fewer where the session is not speculative.
        """
        least = 1 if self.drafts and self.length else max(1, self._stepped)
        if not least <= tokens <= self._stepped:
            raise OptionError("Session.keep", "tokens", tokens, f"in [{least}, {self._stepped}]")
        self._accepted = tokens if self.drafts and self.length else 1
        self.length += tokens
        self._stepped = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of GDN state that one sequence holds, whatever its length: a slot, and one more for each draft."""
        return self._pool.bytes_per_slot * (self.drafts + 1)

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of KV cache of a sequence now: of the attention layers, and what the GDN layers would add as such."""
        caches = [state[:, 0, : self.length] for state in self.states if isinstance(state, Tensor)]
        return caches[0].nbytes * len(caches), caches[0].nbytes * (self.config.layers - len(caches))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position embedding of ``x [..., T, H, D]`` at ``positions [..., T]``."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[..., None, None].to(torch.float32) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.rope_base = config.attention_heads, config.rope_base
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, start: int = 0, cache: Tensor | None = None) -> Tensor:
        """Tokens ``start`` onwards, hidden ``[B, T, hidden]``, against themselves and, with a cache of keys and values
        ``[2, B, positions, H, D]``, all before them there.
        """
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, seen = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base), None
        if cache is not None:
            stop = start + len(positions)
            cache[:, :, start:stop] = torch.stack((k, v))
            k, v = cache[:, :, :stop]
            seen = torch.arange(stop, device=hidden.device) <= positions[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * size, bias=False)
        self.down = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A mixer (GDN or attention) and an MLP, each behind an RMSNorm and added to the residual."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = Attention(config) if config.is_attention(layer) else GatedDeltaNetAttention(config.delta_net)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)
        self.layer = layer

    def forward(self, x: Tensor, session: Session | None, batch: GatedDeltaNetBatch | None) -> Tensor:
        """A step of x ``[B, T, hidden]``, or whole sequences of it where there is no session."""
        hidden = self.mixer_norm(x)
        if session is None or batch is None:
            x = x + (self.mixer(hidden) if isinstance(self.mixer, Attention) else self.mixer.evaluate(hidden))
        elif isinstance(self.mixer, Attention):
            x = x + self.mixer(hidden, session.length, session.states[self.layer])
        else:
            mixed = self.mixer(hidden.flatten(0, 1), batch, session.states[self.layer])
            x = x + mixed.unflatten(0, x.shape[:2])
        return x + self.mlp(self.mlp_norm(x))


class HybridLM(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: HybridConfig | None = None) -> None:
        super().__init__()
        self.config = config or HybridConfig()
        self.embedding = nn.Embedding(VOCABULARY, self.config.hidden_size)
        self.blocks = nn.ModuleList(Block(self.config, i) for i in range(self.config.layers))
        self.norm = nn.RMSNorm(self.config.hidden_size, eps=self.config.norm_eps)

    def forward(self, tokens: Tensor, session: Session | None = None) -> Tensor:
        """Tokens ``[B, T]`` -> logits ``[B, T, 256]``: of whole sequences in plain differentiable torch, or of one step
        in a session, without gradients; call ``session.keep`` before the next one.
        """
        with torch.set_grad_enabled(session is None and torch.is_grad_enabled()):
            batch = None if session is None else session.begin(tokens.shape[1])
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, session, batch)
            return F.linear(self.norm(x), self.embedding.weight)


def load_model(device: torch.device | str = "cpu", path: Path = WEIGHTS) -> HybridLM:
    """The bundled language model in fp32 (stored in bf16), ready to generate.

    Raises:
        OptionError: safetensors is not installed, or ``path`` is no safetensors file.
    """
    model = HybridLM()
    with opened_file("load_model", "path", path) as stored:
        model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return model.to(device).eval().requires_grad_(False)


def weights_facts(path: Path = WEIGHTS) -> dict[str, str]:
    """What training wrote beside the weights: text, steps, bits per byte. Raises as :func:`load_model`."""
    with opened_file("load_model", "path", path) as stored:
        return dict(stored.metadata() or {})
