"""Bits per byte of any text, decoded token by token so that every token rounds the stored state."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F

from gated_delta.errors import OptionError
from gated_delta.model.network import HybridLM
from gated_delta.model.session import Session

ROWS = 64
"""Windows decoded in step."""

UNCOUNTED = -1


def score(
    model: HybridLM, text: bytes, *, state_dtype: torch.dtype = torch.float32,
    track: Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]] = iter,
) -> float:  # fmt: skip
    """Bits per byte of ``text`` under ``model``, in windows of the model's positions that each start from nothing.

    ``track`` goes through the list of all steps (first window, token), and may show how far it has come.

    Raises:
        OptionError: the text has fewer than 2 bytes.
    """
    device, window, predictions = model.embedding.weight.device, model.config.max_positions, len(text) - 1
    if predictions < 1:
        raise OptionError("score", "the text", f"{len(text)} bytes long", "at least 2 bytes long")
    short = -predictions % window  # the last window is filled up with targets that do not count
    inputs = torch.tensor([*text[:-1], *[0] * short], device=device).view(-1, window)
    targets = torch.tensor([*text[1:], *[UNCOUNTED] * short], device=device).view(-1, window)
    first_rows = range(0, len(inputs), ROWS)
    steps = [(first, t) for first in first_rows for t in range(min(window, predictions - first * window))]
    nats = 0.0
    for first, together in groupby(track(steps), key=itemgetter(0)):
        given, wanted = inputs[first : first + ROWS], targets[first : first + ROWS]
        session = Session(model.config, rows=len(given), state_dtype=state_dtype, device=device)
        for _, t in together:
            logits = model(given[:, t : t + 1], session)[:, 0].double()
            session.keep(1)
            nats += F.cross_entropy(logits, wanted[:, t], reduction="sum", ignore_index=UNCOUNTED).item()
    return nats / predictions / math.log(2)
