"""The Gated Delta Net layer of vLLM (Qwen3-Next, Qwen3.5) on our operators, as a plug-in: docs/integrate/vllm.md.

vLLM keeps projections, weights, caches and metadata; this is what one operator between the projections does.
"""

import logging
import sys
import warnings
from collections import Counter
from dataclasses import replace
from importlib import abc, import_module, machinery, util
from itertools import accumulate
from math import lcm
from typing import Any, NoReturn

import torch
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.interop import is_tested
from gated_delta.layer import GatedDeltaNetAttention, Projected
from gated_delta.state import LayerState
from gated_delta.validation.arguments import Arguments

TESTED = ("0.32", "0.33")
LAYER, MODULE = "QwenGatedDeltaNetAttention", "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
NULL_SLOT, CHUNK = 0, 64  # slot of padding; prefixes are cached at multiples of so many tokens

served: Counter[str] = Counter()
"""Of this process: "calls" of layers, their "decode", "speculative" and "prefill" rows, the "checkpoint" states taken
(such a prefill counts twice), and calls of "profile" runs, which have no rows. CUDA graphs count when captured."""

_Part = tuple[GatedDeltaNetBatch, Tensor | slice, Tensor]
"""Rows of a step that run together (speculative ones, or decodes and prefills), which of its tokens are theirs, and
``[n, 2]`` slots whose states the prefix cache keeps as they are afterwards, with the slots where it wants them."""
_NONE, _warm = torch.empty(0, 2), set[GatedDeltaNetConfig]()
_ours: Any = GatedDeltaNetAttention


def register() -> None:
    """Serve the layer from now on; vLLM calls this in each of its processes (entry point ``vllm.general_plugins``).

    The layer's module is left for vLLM to import: it asks for the GPU, which a process has not chosen yet. A version
    outside :data:`TESTED` is left as it is, with a warning.
    """
    version = import_module("vllm").__version__
    if not is_tested("vLLM", version, *TESTED):
        return
    if MODULE in sys.modules:
        _replace(sys.modules[MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec: Any = util.find_spec(fullname)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), _replace(module))
        return spec


def _replace(module: Any) -> None:
    """Let our subclass stand in for the layer of ``module``, unless it does."""
    plugins = import_module("vllm.model_executor.custom_op")
    known = plugins.op_registry_oot.get(LAYER)
    if known is None:
        names = {"_engine": module, "__module__": __name__}
        ours = type(f"GatedDelta{LAYER}", (_Served, getattr(module, LAYER)), names)
        plugins.PluggableLayer.register_oot(ours, name=LAYER)
        said = "gated_delta serves %s of vLLM %s"
        logging.getLogger("vllm.gated_delta").info(said, LAYER, import_module("vllm").__version__)
    elif not issubclass(known, _Served):
        warnings.warn(f"gated_delta serves no layer of vLLM: {known} already stands in for {LAYER}", stacklevel=2)


class _Served:
    """What is ours of the layer, before the engine's own class. ``self.config`` is the shape of this rank's part."""

    _plain_rows, _spec_rows, _step = _ours._plain_rows, _ours._spec_rows, _ours._step
    _prefill, _rule = _ours._prefill, _ours._rule

    def __init__(self: Any, config: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        Arguments(f"gated_delta in vLLM, layer {self.prefix}").word("hidden_act", self.activation, ("silu", "swish"))
        self.config = GatedDeltaNetConfig(
            hidden_size=self.hidden_size, num_k_heads=self.num_k_heads, num_v_heads=self.num_v_heads,
            head_k_dim=self.head_k_dim, head_v_dim=self.head_v_dim, conv_width=self.conv_kernel_size,
            projection="interleaved" if self.gqa_interleaved_layout else "merged", norm_eps=self.layer_norm_epsilon,
            output_gate=self.norm.activation,
        ).shard(self.tp_size)  # fmt: skip
        self._checkpoint_alignment = CHUNK if self.cache_config.mamba_cache_mode == "align" else None
        # Nobody multiplies by this weight, and on a CPU it would be packed for other kernels.
        self.vllm_config, self.conv1d.quant_method = vllm_config, None

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        """With a block for a checkpoint. 0.33 asks for one where ``_checkpoint_alignment`` is set, 0.32 never."""
        spec = super().get_kv_cache_spec(vllm_config)  # type: ignore[misc]
        if self._checkpoint_alignment is None or hasattr(type(self), "_exports_checkpoints"):
            return spec
        return replace(spec, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=lcm(CHUNK, spec.block_size))

    def bind_kv_cache(self: Any, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)  # type: ignore[misc]
        self._tickets = kv_cache.new_zeros(len(kv_cache), self.config.num_k_heads, dtype=torch.int32)

    @property
    def _state(self: Any) -> LayerState:
        conv, recurrent = self.kv_cache  # not ours to hold: they are dropped to free their memory
        conv = conv if self._engine.is_conv_state_dim_first() else conv.mT
        return LayerState(conv, recurrent, NULL_SLOT, self._tickets)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Hidden ``[tokens, hidden]`` -> the same, on every platform."""
        qkvz, ba = self.in_proj_qkvz(hidden_states)[0], self.in_proj_ba(hidden_states)[0]
        normed = qkvz.new_empty(qkvz.shape[0], self.config.num_v_heads, self.config.head_v_dim)
        operator = torch.ops.vllm.qwen_gdn_attention_core_fused_norm_packed
        operator(qkvz, ba, normed, layer_name=self._engine._encode_layer_name(self.prefix))
        return self.out_proj(normed.flatten(1))[0]

    def _forward_core(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("gated_delta serves the layer as a whole; no other code may run a part of it")

    _forward_core_rocm = _forward_core_fused_norm = _forward_core

    def _forward_core_fused_norm_packed(self: Any, mixed_qkvz: Tensor, ba: Tensor, core_attn_out: Tensor) -> None:
        """The operator: qkvz ``[tokens, 2 Hk K + 2 HV V]`` and ba ``[tokens, 2 HV]`` -> ``[tokens, HV, V]``, normed."""
        if (metadata := (self._engine.get_forward_context().attn_metadata or {}).get(self.prefix)) is None:
            core_attn_out.zero_()
            served["profile"] += 1
            if mixed_qkvz.device.type != "cpu" and self.config not in _warm:  # a CPU has nothing to compile
                self._warm_up(mixed_qkvz)
            return
        if not hasattr(metadata, "_gated_delta"):
            metadata._gated_delta = _parts(metadata)  # once a step: its layers share the metadata
        served["calls"] += 1
        core_attn_out[sum(batch.num_row_tokens for batch, _, _ in metadata._gated_delta) :] = 0
        if ba.shape[-1] != 2 * self.config.num_v_heads:  # those of all ranks, as some quantised kernels want it
            ba = torch.cat(self.split_ba(ba), dim=-1)
        state, p = self._state, Projected(self.config, (mixed_qkvz, ba))
        for batch, tokens, kept in metadata._gated_delta:
            served.update(decode=batch.num_decodes, prefill=batch.num_prefills)
            served.update(speculative=batch.num_spec_decodes, checkpoint=len(kept))
            run, output = self._spec_rows if batch.num_spec_decodes else self._plain_rows, core_attn_out[tokens]
            run(p.of(tokens), batch, state, output)
            if isinstance(tokens, Tensor):  # then the output is a copy
                core_attn_out[tokens] = output
            for states in state[:2] if len(kept) else ():
                states[kept[:, 1]] = states[kept[:, 0]]

    def _warm_up(self: Any, like: Tensor) -> None:
        """Compile what steps need while the engine measures its memory, on two pages cut as the real ones will be."""
        _warm.add(self.config)
        spec, bound = self.get_kv_cache_spec(self.vllm_config), self.kv_cache
        self.bind_kv_cache(torch.zeros(2, 1, 1, spec.page_size_bytes, dtype=torch.int8, device=like.device))
        layer = GatedDeltaNetAttention(replace(self.config, hidden_size=1)).to(like)
        layer.conv1d, layer.norm, layer.A_log, layer.dt_bias = self.conv1d, self.norm, self.A_log, self.dt_bias
        layer.warmup(self._state, max_batch=self.vllm_config.scheduler_config.max_num_seqs)
        self.kv_cache = bound


def _parts(m: Any) -> list[_Part]:
    """A step by its metadata, less the rows and tokens that pad it for a graph."""
    spec, decodes = m.num_spec_decodes, min(m.num_decodes, m.num_decode_tokens)
    rows, count, parts = decodes + m.num_prefills, m.num_spec_decode_tokens, []
    if spec:
        batch = GatedDeltaNetBatch(
            num_spec_decodes=spec, num_spec_decode_tokens=count, num_actual_tokens=count,
            num_accepted_tokens=m.num_accepted_tokens[:spec], spec_query_start_loc=m.spec_query_start_loc[: spec + 1],
            spec_state_indices=m.spec_state_indices_tensor[:spec],
        )  # fmt: skip
        parts.append((batch, m.spec_token_indx if rows else slice(count), _NONE))
    if rows:
        starts, slots = m.non_spec_query_start_loc[: rows + 1], m.non_spec_state_indices_tensor[:rows]
        known, count = m.has_initial_state[:rows] if m.num_prefills else None, decodes + m.num_prefill_tokens
        tokens = m.non_spec_token_indx if spec else slice(count)
        if m.num_prefills and m.checkpoint is not None:
            return parts + _checkpointed(m.checkpoint, decodes, starts, slots, known, tokens)
        parts.append((_plain(decodes, starts, slots, known, count), tokens, _NONE))
    return parts


def _plain(decodes: int, starts: Tensor, slots: Tensor, known: Tensor | None, count: int) -> GatedDeltaNetBatch:
    return GatedDeltaNetBatch(
        num_prefills=len(slots) - decodes, num_prefill_tokens=count - decodes, num_decodes=decodes,
        num_decode_tokens=decodes, num_actual_tokens=count, has_initial_state=known,
        non_spec_query_start_loc=starts, non_spec_state_indices=slots,
    )  # fmt: skip


def _checkpointed(
    wanted: Any, decodes: int, starts: Tensor, slots: Tensor, known: Tensor | None, tokens: Tensor | slice
) -> list[_Part]:
    """Rows up to the tokens whose states are wanted, ``offsets[row]`` behind a row's first (0: none), then the rest."""
    lengths = (getattr(wanted, "query_lens", None) or starts.diff().tolist())[: len(slots)]  # 0.32 has them not
    cut = [offset or length for offset, length in zip(wanted.offsets, lengths, strict=False)]
    late = torch.cat([torch.arange(length) >= end for length, end in zip(lengths, cut, strict=True)])

    def part(decodes: int, mask: Tensor, lengths: list[int], rows: Any, known: Any, kept: Tensor) -> _Part:
        index = mask.nonzero().flatten()
        run = slice(int(index[0]), int(index[-1]) + 1)
        ends = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=slots.device)
        batch = _plain(decodes, ends, slots[rows], known, len(index))
        chosen = run if run.stop - run.start == len(index) else index.to(slots.device)  # a run needs no copies
        return batch, chosen if isinstance(tokens, slice) else tokens[chosen], kept

    split = [row for row in range(len(slots)) if wanted.offsets[row]]
    rows = torch.tensor(split, device=slots.device)
    kept = torch.stack((slots[rows].long(), wanted.state_indices[rows].long()), 1)
    rest = part(0, late, [lengths[i] - cut[i] for i in split], rows, rows >= 0, _NONE)  # all of them have history
    return [part(decodes, ~late, cut, slice(None), known, kept), rest]
