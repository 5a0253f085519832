"""The small hybrid language model: byte embeddings, GDN and attention layers, a tied output projection; its weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gated_delta.batch import GatedDeltaNetBatch
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.model.config import VOCABULARY, HybridConfig
from gated_delta.model.session import Session
from gated_delta.parallel import opened_file

WEIGHTS = Path(__file__).with_name("hybrid_lm.safetensors")


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
    model.load_state_dict(_read(path)[0])
    return model.to(device).eval().requires_grad_(False)


def weights_facts(path: Path = WEIGHTS) -> dict[str, str]:
    """What training wrote beside the weights: text, steps, bits per byte. Raises as :func:`load_model`."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened_file("load_model", "path", path) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
