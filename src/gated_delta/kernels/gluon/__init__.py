"""Prefill for Hopper GPUs, K = V = 128 and activations of 16 bits. Everything else is the Triton backend's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gated_delta.kernels import triton
from gated_delta.kernels.gluon.prefill import prefill as by_tiles
from gated_delta.kernels.gluon.prefill import tileable
from gated_delta.kernels.triton.prefill import MOST_SEQUENCES


def prefill(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float, cu_seqlens: Tensor, *rest: Any
) -> None:
    """As :mod:`gated_delta.library` has it. Views of q, k or v that the copy engine cannot take tiles of, and more
    sequences than a grid has room for, are left to the Triton backend.
    """
    fits = cu_seqlens.shape[0] - 1 <= MOST_SEQUENCES and tileable(q) and tileable(k) and tileable(v)
    (by_tiles if fits else triton.prefill)(q, k, v, g, beta, scale, cu_seqlens, *rest)
