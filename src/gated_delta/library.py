"""The operators as torch sees them: schemas with their mutations, fakes, and the way to each backend.

An operator writes into tensors that its caller made and returns nothing, so its fake has nothing to say and a
compiler sees every mutation. Implementations are imported when they first run: importing this module imports none.
``Library.define`` and ``impl`` cost a call a quarter of what ``torch.library.custom_op`` does (docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.library import Library, register_fake

_SCHEMAS = {
    "prefill": (
        "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, Tensor cu_seqlens, "
        "Tensor? initial_state, Tensor? has_initial_state, Tensor? state_indices, int null_slot, "
        "bool in_place, bool use_qk_l2norm, bool log_gates, Tensor(a!) output, bool zero_padding, "
        "Tensor(b!)? final_state, Tensor(c!)? checkpoints, Tensor? checkpoint_starts, int checkpoint_every"
    ),
    "recurrent": (
        "Tensor q, Tensor k, Tensor v, Tensor(a!) state, bool state_v_first, Tensor A_log, Tensor a, Tensor dt_bias, "
        "Tensor b, float scale, bool use_qk_l2norm, bool allow_neg_eigval, Tensor? read_slots, int null_slot, "
        "bool update_state, Tensor? write_slots, Tensor? token_slots, Tensor(b!)? snapshots, Tensor(c!) output, "
        "bool zero_padding"
    ),
    "causal_conv1d": (
        "Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor cu_seqlens, Tensor? state_indices, "
        "Tensor? has_initial_state, bool activate, int null_slot, Tensor(b!) output"
    ),
    "causal_conv1d_update": (
        "Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool activate, Tensor? state_indices, "
        "Tensor? num_accepted_tokens, Tensor? cu_seqlens, int null_slot, Tensor(b!) output"
    ),
    "rms_norm_gated": "Tensor x, Tensor z, Tensor weight, float eps, str activation, Tensor(a!) output",
    "gated_delta_net_step": (
        "Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor(a!) conv_states, Tensor conv_weight, "
        "Tensor(b!) state, Tensor A_log, Tensor dt_bias, Tensor norm_weight, float scale, float eps, str activation, "
        "bool allow_neg_eigval, Tensor state_indices, Tensor? cu_seqlens, Tensor? num_accepted_tokens, "
        "Tensor(c!)? tickets, int null_slot, Tensor(d!) output"
    ),
}


@cache
def _implementation(operator: str, backend: str) -> Any:
    return getattr(import_module(f"gated_delta.kernels.{backend}"), operator)


def bound_recurrent(backend: str, *args: Any) -> Any:
    """A launch of :data:`recurrent` with these arguments that takes only its tensors' pointers."""
    return _implementation("bound_recurrent", backend)(*args)


def _register(library: Library, operator: str, schema: str) -> Any:
    def run(*args: Any) -> None:
        *rest, backend = args
        _implementation(operator, backend)(*rest)

    def fake(*args: Any) -> None:
        return None

    library.define(f"{operator}({schema}, str backend) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(operator, run, "CompositeExplicitAutograd")
    register_fake(f"gated_delta::{operator}", fake, lib=library)
    return getattr(torch.ops.gated_delta, operator).default


_LIBRARY = Library("gated_delta", "DEF")
prefill = _register(_LIBRARY, "prefill", _SCHEMAS["prefill"])
recurrent = _register(_LIBRARY, "recurrent", _SCHEMAS["recurrent"])
causal_conv1d = _register(_LIBRARY, "causal_conv1d", _SCHEMAS["causal_conv1d"])
causal_conv1d_update = _register(_LIBRARY, "causal_conv1d_update", _SCHEMAS["causal_conv1d_update"])
rms_norm_gated = _register(_LIBRARY, "rms_norm_gated", _SCHEMAS["rms_norm_gated"])
gated_delta_net_step = _register(_LIBRARY, "gated_delta_net_step", _SCHEMAS["gated_delta_net_step"])
