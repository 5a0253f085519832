"""The Triton backend: every operator on any GPU that Triton serves."""

from gated_delta.kernels.triton.conv import bound_causal_conv1d, bound_causal_conv1d_update
from gated_delta.kernels.triton.norm import bound_rms_norm_gated, rms_norm_gated
from gated_delta.kernels.triton.prefill import bound_gates, bound_prefill
from gated_delta.kernels.triton.recurrent import bound_recurrent
from gated_delta.kernels.triton.step import bound_gated_delta_net_step

__all__ = [
    "bound_causal_conv1d", "bound_causal_conv1d_update", "bound_gated_delta_net_step", "bound_gates", "bound_prefill",
    "bound_recurrent", "bound_rms_norm_gated", "rms_norm_gated",
]  # fmt: skip
