"""Prefill for Hopper GPUs, K = V = 128 and activations of 16 bits. Everything else is the Triton backend's."""

from gated_delta.kernels import triton
from gated_delta.kernels.gluon.prefill import bound_prefill as by_tiles
from gated_delta.kernels.gluon.prefill import tileable
from gated_delta.kernels.triton.launch import Start
from gated_delta.kernels.triton.prefill import MOST_SEQUENCES
from gated_delta.library import Prefill


def bound_prefill(call: Prefill) -> Start:
    """Views of q, k or v that the copy engine cannot take tiles of, and more sequences than a grid has room for, are
    left to the Triton backend.
    """
    fits = call.cu_seqlens.shape[0] - 1 <= MOST_SEQUENCES and all(map(tileable, (call.q, call.k, call.v)))
    return (by_tiles if fits else triton.bound_prefill)(call)
