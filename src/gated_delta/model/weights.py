"""The bundled weights: where they are and how they come in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from gated_delta.errors import OptionError
from gated_delta.model.network import HybridLM

WEIGHTS = Path(__file__).with_name("hybrid_lm.safetensors")


def load_model(device: torch.device | str = "cpu", path: Path = WEIGHTS) -> HybridLM:
    """The bundled language model in fp32 (stored in bf16), ready to generate.

    Raises:
        OptionError: safetensors is not installed, or ``path`` is no file.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise OptionError("load_model", "safetensors", "not installed", 'installed: pip install "gated-delta[cli]"')
    from safetensors.torch import load_file  # noqa: PLC0415 (an extra)

    if not path.is_file():
        raise OptionError("load_model", "path", str(path), "an existing safetensors file")
    model = HybridLM()
    model.load_state_dict(load_file(path))
    return model.to(device).eval().requires_grad_(False)


def weights_facts(path: Path = WEIGHTS) -> dict[str, str]:
    """What training wrote beside the weights: text, steps, bits per byte."""
    from safetensors import safe_open  # noqa: PLC0415 (an extra)

    with safe_open(path, framework="pt") as stored:
        return dict(stored.metadata() or {})
