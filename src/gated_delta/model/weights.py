"""The bundled weights: where they are and how they come in."""

from pathlib import Path

import torch
from torch import Tensor

from gated_delta.model.network import HybridLM
from gated_delta.parallel import opened_file

WEIGHTS = Path(__file__).with_name("hybrid_lm.safetensors")


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
