"""Gated Delta Net for inference: operators, a layer over a pool of states, and a small model that shows the path.

Importing this package loads torch and registers the operators; kernels load when they first run.
"""

from gated_delta.conv import causal_conv1d, causal_conv1d_update
from gated_delta.decode import (
    gated_delta_net_step,
    gated_delta_rule_decode,
    gated_delta_rule_decode_pretranspose,
    gated_delta_rule_mtp,
)  # fmt: skip
from gated_delta.dispatch import explain
from gated_delta.norm import rms_norm_gated
from gated_delta.prefill import chunk_gated_delta_rule
from gated_delta.validation.data import checked
from gated_delta.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "causal_conv1d", "causal_conv1d_update", "checked", "chunk_gated_delta_rule", "explain", "gated_delta_net_step",
    "gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp", "rms_norm_gated",
    "warmup",
]  # fmt: skip
