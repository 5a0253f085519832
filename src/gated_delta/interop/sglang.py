"""The Gated Delta Net layers of SGLang (Qwen3-Next, Qwen3.5) on our operators, as a plug-in: docs/integrate/sglang.md.

SGLang keeps projections, pools, metadata, a prefill's gates and the gated norm. Ours is what its dispatcher of kernels
asks for, and the convolution before that. States stay in its pools, by its slots; negative ones are padding.
"""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import gated_delta
from gated_delta.interop import conv, is_tested, vllm_conv

TESTED = ("0.5.23", "0.5.23")
NAME = "gated_delta"
"""What ``--linear-attn-backend`` and the flags for one phase call us."""
MODULE = "sglang.srt.layers.attention.linear.gdn_backend"

served: Counter[str] = Counter()
"""Calls of this process that were ours: "decode", "extend", "verify" and "conv". CUDA graphs count when captured."""


def register() -> None:
    """Let SGLang's flags choose us; it calls this in each of its processes (entry point ``sglang.srt.plugins``).

    A version outside :data:`TESTED` is left as it is, with a warning; its flags do not know us then.
    """
    if not is_tested("SGLang", importlib.metadata.version("sglang"), *TESTED):
        return
    choices, hooks = (import_module(f"sglang.srt.{name}") for name in ("arg_groups.choices", "plugins.hook_registry"))
    if NAME not in choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES:
        choices.add_linear_attn_kernel_backend_choices([NAME])
        target = f"{MODULE}.GDNKernelDispatcher.__init__"
        hooks.HookRegistry.register(target, _dispatch, hooks.HookType.AROUND)


def _dispatch(stock: Callable[..., None], dispatcher: Any, decode: Any, prefill: Any, verify: Any = None) -> None:
    """Around the making of a dispatcher, which knows SGLang's kernels alone: ours take the phases that name us.

    Verification goes where decodes go, unless its flag says another.
    """
    flags, module = import_module("sglang.srt.runtime_context").get_exec().mamba, import_module(MODULE)
    for_decode = flags.linear_attn_decode_backend or flags.linear_attn_backend
    for_prefill = flags.linear_attn_prefill_backend or flags.linear_attn_backend
    names = (for_decode, for_prefill, flags.linear_attn_verify_backend or for_decode)
    ours = [phase for phase, name in zip(("decode", "extend", "verify"), names, strict=True) if name == NAME]
    known = (decode, prefill, verify)
    stock(dispatcher, *(type(decode).TRITON if name == NAME else x for x, name in zip(known, names, strict=True)))
    base = import_module("sglang.srt.layers.attention.linear.kernels.kernel_backend").LinearAttnKernelBase
    kernel = type("GatedDeltaGDNKernel", (_Kernel, base), {})()
    for phase in ours:
        setattr(dispatcher, f"{phase}_kernel", kernel)
    dispatcher.supports_packed_decode &= "decode" not in ours
    if "extend" in ours:
        vars(module)["causal_conv1d_fn"] = _conv
    if ours not in ([], ["extend"]) and not isinstance(module.causal_conv1d_update, partial):
        vars(module)["causal_conv1d_update"] = partial(_conv_update, module.causal_conv1d_update)
    said, version = "gated_delta serves %s of GDN layers in SGLang %s", importlib.metadata.version("sglang")
    logging.getLogger(__name__).info(said, ", ".join(ours) or "nothing", version)


class _Kernel:
    """What is ours of SGLang's kernel: q, k, v ``[1, tokens, H, D]``, a, b ``[tokens, HV]`` and a pool ``[slots, HV, V,
    K]``, written in place, give ``[1, tokens, HV, V]``.
    """

    supports_strided_target_verify_qkv = uses_state_checkpoints = True

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, A_log: Tensor, dt_bias: Tensor,
        ssm_states: Tensor, cache_indices: Tensor, query_start_loc: Tensor,
    ) -> Tensor:  # fmt: skip
        served["decode"] += 1
        output, _ = gated_delta.gated_delta_rule_decode_pretranspose(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), None, A_log, a[:, None], dt_bias, b[:, None],
            initial_state=ssm_states, initial_state_indices=cache_indices,
        )  # fmt: skip
        return output.transpose(0, 1)

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, ssm_states: Tensor, cache_indices: Tensor,
        query_start_loc: Tensor, state_checkpoint_cu_starts: Tensor | None = None, num_state_checkpoints: int = 0,
        state_checkpoint_every_n_tokens: int = 0, output: Tensor | None = None, layer_id: int | None = None,
        extend_prefix_lens: Tensor | None = None, track_state: None = None, track_chunk_idx: None = None,
    ) -> tuple[Tensor, None, Tensor | None]:  # fmt: skip
        """Prefills, with log g and beta ``[1, tokens, HV]``; the last result is the states that prefix caches want."""
        served["extend"] += 1
        kept = ssm_states.new_empty(num_state_checkpoints, *ssm_states.shape[1:]) if num_state_checkpoints else None
        result: Any = gated_delta.chunk_gated_delta_rule(
            q[0], k[0], v[0], g[0].float(), beta[0].float(), initial_state=ssm_states, cu_seqlens=query_start_loc,
            use_qk_l2norm_in_kernel=True, output=None if output is None else output[0], output_state=ssm_states,
            state_checkpoints=kept, checkpoint_cu_starts=state_checkpoint_cu_starts,
            checkpoint_every_n_tokens=state_checkpoint_every_n_tokens, g_space="log", state_indices=cache_indices,
        )  # fmt: skip
        return result[None], None, None if kept is None else kept[None]

    def target_verify(
        self, A_log: Tensor, dt_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *,
        ssm_states: Tensor, cache_indices: Tensor, query_start_loc: Tensor, intermediate_states_buffer: Tensor,
        intermediate_state_indices: Tensor, cache_steps: int, retrieve_parent_token: None, stable_rows: bool,
    ) -> Tensor:  # fmt: skip
        """A chain of drafts a row: the pool stays, states after each token go to ``[rows, steps, HV, V, K]``."""
        served["verify"] += 1
        rows, buffer = len(query_start_loc) - 1, intermediate_states_buffer
        q, k, v, a, b = (x.unflatten(0, (rows, -1)) for x in (q[0], k[0], v[0], a, b))
        # Ours go row by row. SGLang's are others under pipelines, and fewer where a batch is padded beyond its pool.
        moved = stable_rows or len(buffer) < rows
        kept = buffer.new_zeros(rows, *buffer.shape[1:]) if moved else buffer
        output, _ = gated_delta.gated_delta_rule_mtp(
            q, k, v, ssm_states, cache_indices[:rows], A_log, a, dt_bias, b, intermediate_states_buffer=kept,
            disable_state_update=True,
        )  # fmt: skip
        if moved:
            buffer[intermediate_state_indices[:rows]] = kept
        return output.flatten(0, 1)[None]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, block_table: object = None, **named: Any) -> Tensor:
    served["conv"] += 1
    del named["seq_lens_cpu"]  # as block_table, it shapes SGLang's grid
    return vllm_conv.causal_conv1d_fn(x, weight, bias, null_block_id=None, **named)


def _conv_update(
    stock: Callable[..., Tensor], x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None,
    activation: str | None, *, conv_state_indices: Tensor, **drafts: Any,
) -> Tensor:  # fmt: skip
    """One token ``[N, D]``, or a chain ``[N, D, T]`` whose windows after each go to ``[rows, T, D, W-1]``."""
    if drafts.get("retrieve_parent_token") is not None:  # SGLang's dispatcher, too, leaves trees of drafts with Triton
        return stock(x, conv_state, weight, bias, activation, conv_state_indices=conv_state_indices, **drafts)
    served["conv"] += 1
    if (kept := drafts.get("intermediate_conv_window")) is not None:
        windows = torch.cat((conv_state[conv_state_indices], x), -1).unfold(-1, conv_state.shape[-1], 1)[:, :, 1:]
        kept[drafts["intermediate_state_indices"], : x.shape[-1]] = windows.transpose(1, 2)
    return conv.causal_conv1d_update(x, conv_state, weight, bias, activation, None, conv_state_indices)
