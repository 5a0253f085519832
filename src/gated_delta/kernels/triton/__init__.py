"""The Triton backend: every operator on any GPU that Triton serves."""

from gated_delta.kernels.triton.conv import causal_conv1d, causal_conv1d_update
from gated_delta.kernels.triton.gates import gates
from gated_delta.kernels.triton.norm import rms_norm_gated
from gated_delta.kernels.triton.prefill import bound_prefill
from gated_delta.kernels.triton.recurrent import bound_recurrent, recurrent
from gated_delta.kernels.triton.step import gated_delta_net_step

__all__ = [
    "bound_prefill", "bound_recurrent", "causal_conv1d", "causal_conv1d_update", "gated_delta_net_step", "gates",
    "recurrent", "rms_norm_gated",
]  # fmt: skip
