"""SGLang's own Python files around our kernels: plug-in loader, flags, backend, pools and metadata, on a CPU.

Its compiled part is stubbed, and what loads models. Its Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LOADERS = ("model_executor.model_runner", "model_loader", "utils.hf_transformers", "utils.hf_transformers_utils")
STUBBED = ("tvm_ffi", *(f"sglang.srt.{name}" for name in LOADERS))
LIGHT = "sglang.srt.configs"
"""Its package file imports every model's; the files in it are imported as they are."""
SLOTS = 8


class _Any(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub


class Stub(metaclass=_Any):
    """Stands for any class or function that is imported and not used."""


class _Finder:
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        stubbed = fullname == LIGHT or any(f"{fullname}.".startswith(f"{name}.") for name in STUBBED)
        return ModuleSpec(fullname, self, is_package=True) if stubbed else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name == LIGHT:
            found = find_spec("sglang")
            assert found is not None and found.origin is not None
            spec.submodule_search_locations = [str(Path(found.origin).parent / "srt" / "configs")]
        return type("Module", (ModuleType,), {"__getattr__": lambda _, name: getattr(Stub, name)})(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(patch: Any) -> None:
    patch.setattr(sys, "meta_path", [_Finder(), *sys.meta_path])


def load_plugins() -> None:
    """By its entry points."""
    of("plugins").load_plugins()


def of(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")


class Backend:
    """SGLang's GDN backend for one layer, with requests 1, 2, ... in slots 1, 2, ... of its pool."""

    def __init__(self, c: Any, weights: Any, dtype: torch.dtype, drafts: int, flags: dict[str, Any]) -> None:
        contexts, utils, self._scopes = of("runtime_context"), of("configs.mamba_utils"), ExitStack()
        self._scopes.enter_context(contexts.get_parallel().override(attn_tp_size=1))
        self._scopes.enter_context(
            contexts.get_context().override_server_args(
                attention_backend="triton", chunked_prefill_size=-1, enable_mis=False, speculative_eagle_topk=1,
                speculative_num_draft_tokens=drafts, _mamba_cache_chunk_size=64, **flags,
            )
        )  # fmt: skip
        shape = utils.Mamba2StateShape.create(
            tp_world_size=1, intermediate_size=c.value_dim, n_groups=c.num_k_heads, num_heads=c.num_v_heads,
            head_dim=c.head_v_dim, state_size=c.head_k_dim, conv_kernel=c.conv_width,
        )  # fmt: skip
        self.pool = of("mem_cache.memory_pool").HybridReqToTokenPool(
            size=SLOTS, mamba_size=SLOTS, mamba_spec_state_size=SLOTS, max_context_len=64, device="cpu",
            enable_memory_saver=False, mamba_layer_ids=[0], enable_mamba_extra_buffer=False,
            cache_params=utils.Mamba2CacheParams(
                shape=shape, layers=[0], dtype=utils.Mamba2StateDType(conv=dtype, temporal=torch.float32)
            ),
            speculative_num_draft_tokens=drafts or None, enable_overlap_schedule=False,
        )  # fmt: skip
        self.pool.req_index_to_mamba_index_mapping[: SLOTS + 1] = torch.arange(SLOTS + 1)
        self.layer = of("layers.radix_linear_attention").RadixLinearAttention(
            layer_id=0, num_q_heads=c.num_k_heads, num_k_heads=c.num_k_heads, num_v_heads=c.num_v_heads,
            head_q_dim=c.head_k_dim, head_k_dim=c.head_k_dim, head_v_dim=c.head_v_dim, conv_weights=weights.conv,
            bias=weights.bias, activation="silu", A_log=weights.A_log, dt_bias=weights.dt_bias,
        )  # fmt: skip
        runner = SimpleNamespace(
            device="cpu", is_draft_worker=False, req_to_token_pool=self.pool, token_to_kv_pool=None,
            server_args=contexts.get_server_args(), model_config=SimpleNamespace(hf_text_config=None),
            linear_attn_backends=of("layers.attention.linear.utils").resolve_linear_attn_backends(),
        )  # fmt: skip
        self.backend = of("layers.attention.linear.gdn_backend").GDNAttnBackend(runner)
        self.dispatcher, self.drafts = self.backend.kernel_dispatcher, drafts
        self.backend.init_cuda_graph_state(SLOTS, SLOTS * max(drafts, 1))
        self.cache = self.pool.mamba2_layer_cache(0)
        """conv[0] ``[slots, D, W-1]``, temporal ``[slots, HV, V, K]``; with drafts intermediate_ssm and
        intermediate_conv_window[0], ``[rows, T, ...]`` after each."""

    def close(self) -> None:
        self._scopes.close()

    def forward(
        self, kind: str, qkv: Tensor, a: Tensor, b: Tensor, requests: Sequence[int], lengths: Sequence[int],
        known: Sequence[int], padding: int = 0, track: dict[int, tuple[int, int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """A step of ``requests`` that have ``known`` tokens already, behind them ``padding`` rows, as a graph has them.
        ``track``: the slot that keeps a request's state after so many tokens. Result ``[tokens, HV, V]``.
        """
        info, rows = of("model_executor.forward_batch_info"), len(requests) + padding
        mode = {"decode": "DECODE", "extend": "EXTEND", "verify": "TARGET_VERIFY"}[kind]
        own, new = (torch.tensor([*x, *[0] * padding], dtype=torch.int32) for x in (requests, lengths))
        before = torch.tensor([*known, *[0] * padding], dtype=torch.int32)
        batch = info.ForwardBatch(
            forward_mode=info.ForwardMode[mode], batch_size=rows, input_ids=torch.zeros(len(qkv), dtype=torch.int64),
            req_pool_indices=own, seq_lens=before + new, seq_lens_cpu=before + new, out_cache_loc=None, seq_lens_sum=0,
        )  # fmt: skip
        if kind == "extend":
            batch.extend_prefix_lens, batch.extend_seq_lens = before, new
            batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = before.tolist(), new.tolist()
            batch.extend_start_loc = new.cumsum(0) - new
        if kind == "verify":
            batch.spec_info = SimpleNamespace(draft_token_num=self.drafts, ragged_verify_layout=None)
        if track:
            kept = [track.get(request, (0, 0)) for request in requests]
            batch.mamba_track_mask = torch.tensor([slot > 0 for slot, _ in kept])
            batch.mamba_track_indices = torch.tensor([slot for slot, _ in kept])
            batch.mamba_track_seqlens = torch.tensor([count for _, count in kept])
        if padding:
            batch.num_padding = padding
            self.backend.init_forward_metadata_out_graph(batch)
        else:
            self.backend.init_forward_metadata(batch)
        run = self.backend.forward_decode if kind == "decode" else self.backend.forward_extend
        return run(self.layer, batch, qkv, a, b).squeeze(0)
