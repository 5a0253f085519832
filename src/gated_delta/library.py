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

_LIBRARY = Library("gated_delta", "DEF")


@cache
def _implementation(operator: str, backend: str) -> Any:
    return getattr(import_module(f"gated_delta.kernels.{backend}"), operator)


def bound_recurrent(backend: str, *args: Any) -> Any:
    """A launch of :data:`recurrent` with these arguments that takes only its tensors' pointers."""
    return _implementation("bound_recurrent", backend)(*args)


def _register(operator: str, schema: str) -> Any:
    def run(*args: Any) -> None:
        *rest, backend = args
        _implementation(operator, backend)(*rest)

    def fake(*args: Any) -> None:
        return None

    _LIBRARY.define(f"{operator}({schema}, str backend) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(operator, run, "CompositeExplicitAutograd")
    register_fake(f"gated_delta::{operator}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gated_delta, operator).default


prefill = _register(
    "prefill",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, Tensor cu_seqlens, "
    "Tensor? initial_state, Tensor? has_initial_state, Tensor? state_indices, int null_slot, "
    "bool in_place, bool use_qk_l2norm, bool log_gates, Tensor(a!) output, bool zero_padding, "
    "Tensor(b!)? final_state, Tensor(c!)? checkpoints, Tensor? checkpoint_starts, int checkpoint_every",
)
recurrent = _register(
    "recurrent",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) state, bool state_v_first, Tensor A_log, Tensor a, Tensor dt_bias, "
    "Tensor b, float scale, bool use_qk_l2norm, bool allow_neg_eigval, Tensor? read_slots, int null_slot, "
    "bool update_state, Tensor? write_slots, Tensor? token_slots, Tensor(b!)? snapshots, Tensor(c!) output, "
    "bool zero_padding",
)
causal_conv1d = _register(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor cu_seqlens, Tensor? state_indices, "
    "Tensor? has_initial_state, bool activate, int null_slot, Tensor(b!) output",
)
causal_conv1d_update = _register(
    "causal_conv1d_update",
    "Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, bool activate, Tensor? state_indices, "
    "Tensor? num_accepted_tokens, Tensor? cu_seqlens, int null_slot, Tensor(b!) output",
)
rms_norm_gated = _register(
    "rms_norm_gated", "Tensor x, Tensor z, Tensor weight, float eps, str activation, Tensor(a!) output"
)
gated_delta_net_step = _register(
    "gated_delta_net_step",
    "Tensor q, Tensor k, Tensor v, Tensor z, Tensor b, Tensor a, Tensor(a!) conv_states, Tensor conv_weight, "
    "Tensor(b!) state, Tensor A_log, Tensor dt_bias, Tensor norm_weight, float scale, float eps, str activation, "
    "bool allow_neg_eigval, Tensor state_indices, Tensor? cu_seqlens, Tensor? num_accepted_tokens, "
    "Tensor(c!)? tickets, int null_slot, Tensor(d!) output",
)
