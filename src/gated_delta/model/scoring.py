"""Bits per byte of any text, decoded token by token so that every token rounds the stored state."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gated_delta.errors import OptionError
from gated_delta.model.network import HybridLM
from gated_delta.model.session import Session

ROWS = 64
"""Windows decoded in step."""

UNCOUNTED = -1


def score_steps(text: bytes, window: int) -> int:
    """How many steps :func:`score` will take.

    Raises:
        OptionError: the text has fewer than 2 bytes.
    """
    if len(text) < 2:
        raise OptionError("score", "the text", f"{len(text)} bytes long", "at least 2 bytes long")
    return sum(min(window, len(text) - 1 - first) for first in range(0, len(text) - 1, ROWS * window))


def score(
    model: HybridLM, text: bytes, *, state_dtype: torch.dtype = torch.float32,
    advance: Callable[[int], object] = lambda steps: None,
) -> float:  # fmt: skip
    """Bits per byte of ``text`` under ``model``, in windows of the model's positions that each start from nothing.

    ``advance(1)`` is called after every step, :func:`score_steps` times in all.

    Raises as :func:`score_steps`.
    """
    device, window = model.embedding.weight.device, model.config.max_positions
    score_steps(text, window)
    predictions = len(text) - 1
    short = -predictions % window  # the last window is filled up with targets that do not count
    inputs = torch.tensor([*text[:-1], *[0] * short], device=device).view(-1, window)
    targets = torch.tensor([*text[1:], *[UNCOUNTED] * short], device=device).view(-1, window)
    nats = 0.0
    for rows in range(0, len(inputs), ROWS):
        given, wanted = inputs[rows : rows + ROWS], targets[rows : rows + ROWS]
        session = Session(model.config, rows=len(given), state_dtype=state_dtype, device=device)
        for t in range(min(window, predictions - rows * window)):
            logits = model(given[:, t : t + 1], session)[:, 0].double()
            session.keep(1)
            nats += F.cross_entropy(logits, wanted[:, t], reduction="sum", ignore_index=UNCOUNTED).item()
            advance(1)
    return nats / predictions / math.log(2)
