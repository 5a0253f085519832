"""A stand-in for SGLang: what our plug-in touches of it, and calls in the form in which its backend makes them.

It computes nothing but a prefill's gates.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from enum import Enum
from functools import wraps
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gated_delta.interop import sglang as plugin

SLOTS = 8
FLAGS = SimpleNamespace()


class Choice(Enum):
    TRITON = "triton"
    CUSTOM = "custom"

    @classmethod
    def _missing_(cls, value: object) -> Choice:
        return cls.CUSTOM


class LinearAttnKernelBase:
    uses_state_checkpoints = supports_strided_target_verify_qkv = False


class TritonGDNKernel(LinearAttnKernelBase):
    """SGLang's own, which needs a GPU."""


class GDNKernelDispatcher:
    def __init__(self, decode: Choice, prefill: Choice, verify: Choice) -> None:
        assert Choice.CUSTOM not in (decode, prefill, verify), "SGLang knows no backend of that name"
        self.decode_kernel = self.extend_kernel = self.verify_kernel = self.tree_verify_kernel = TritonGDNKernel()
        self.supports_packed_decode = True


class HookRegistry:
    hooks: ClassVar[list[Any]] = []

    @classmethod
    def register(cls, target: str, hook: Any, kind: str) -> None:
        cls.hooks.append((target, hook, kind))


def of(name: str) -> Any:
    return sys.modules[f"sglang.srt.{name}"]


def install(patch: Any) -> None:
    choices = ["triton"]

    def convolve(*args: Any, **named: Any) -> None:
        raise AssertionError("SGLang's own convolution needs a GPU")

    modules: dict[str, dict[str, Any]] = {
        "arg_groups.choices": {
            "LINEAR_ATTN_KERNEL_BACKEND_CHOICES": choices, "add_linear_attn_kernel_backend_choices": choices.extend
        },
        "plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": SimpleNamespace(AROUND="around")},
        "runtime_context": {"get_exec": lambda: SimpleNamespace(mamba=FLAGS)},
        "layers.attention.linear.kernels.kernel_backend": {"LinearAttnKernelBase": LinearAttnKernelBase},
        "layers.attention.linear.gdn_backend": {
            "GDNKernelDispatcher": GDNKernelDispatcher, "causal_conv1d_fn": convolve, "causal_conv1d_update": convolve
        },
    }  # fmt: skip
    for name, names in modules.items():
        parts = f"sglang.srt.{name}".split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            module.__path__ = []
            patch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
        vars(of(name)).update(names)
    version = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "0.5.23" if name == "sglang" else version(name))
    patch.setattr(HookRegistry, "hooks", [])
    patch.setattr(GDNKernelDispatcher, "__init__", GDNKernelDispatcher.__init__)


def load_plugins() -> None:
    """Runs ours, as its entry point says, and puts its hook around what that names."""
    plugin.register()
    ((target, hook, kind),) = HookRegistry.hooks
    assert (target, kind) == (f"{plugin.MODULE}.GDNKernelDispatcher.__init__", "around")
    dispatcher: Any = GDNKernelDispatcher
    stock = dispatcher.__init__

    @wraps(stock)
    def around(self: Any, *args: Any) -> None:
        hook(stock, self, *args)

    dispatcher.__init__ = around


class Backend:
    """One layer, with requests 1, 2, ... in slots 1, 2, ... of its pool."""

    def __init__(self, c: Any, weights: Any, dtype: torch.dtype, drafts: int, flags: dict[str, Any]) -> None:
        self.c, self.weights, self.drafts = c, weights, drafts
        for phase in ("", "decode_", "prefill_", "verify_"):
            setattr(FLAGS, f"linear_attn_{phase}backend", flags.get(f"linear_attn_{phase}backend"))
        FLAGS.linear_attn_backend = base = FLAGS.linear_attn_backend or "triton"
        chosen = (FLAGS.linear_attn_decode_backend or base, FLAGS.linear_attn_prefill_backend or base)
        self.dispatcher: Any = GDNKernelDispatcher(
            *map(Choice, (*chosen, FLAGS.linear_attn_verify_backend or "triton"))
        )
        self.cache = SimpleNamespace(
            conv=[torch.zeros(SLOTS + 1, c.conv_dim, c.conv_width - 1, dtype=dtype)],
            temporal=torch.zeros(SLOTS + 1, c.num_v_heads, c.head_v_dim, c.head_k_dim),
        )
        if drafts:
            self.cache.intermediate_ssm = torch.zeros(SLOTS + 1, drafts, *self.cache.temporal.shape[1:])
            # Windows share their inputs.
            inputs = torch.zeros(SLOTS + 1, c.conv_dim, drafts + c.conv_width - 2, dtype=dtype)
            self.cache.intermediate_conv_window = [inputs.unfold(-1, c.conv_width - 1, 1).transpose(1, 2)]

    def close(self) -> None:
        pass

    def forward(
        self, kind: str, qkv: Tensor, a: Tensor, b: Tensor, requests: Sequence[int], lengths: Sequence[int],
        known: Sequence[int], padding: int = 0, track: dict[int, tuple[int, int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """As that of the real one."""
        module, w, conv, states = of("layers.attention.linear.gdn_backend"), self.weights, *self.states()
        slots = torch.tensor([*requests, *[-1] * padding], dtype=torch.int32)
        ends = torch.tensor([*accumulate([*lengths, *[0] * padding], initial=0)], dtype=torch.int32)
        given = {"A_log": w.A_log, "dt_bias": w.dt_bias, "ssm_states": states, "query_start_loc": ends}
        rows = torch.arange(len(slots), dtype=torch.int32)
        if kind == "decode":
            mixed = module.causal_conv1d_update(qkv, conv, w.conv, w.bias, "silu", conv_state_indices=slots)
            return self.dispatcher.decode_kernel.decode(**self.heads(mixed), a=a, b=b, cache_indices=slots, **given)[0]
        if kind == "verify":
            mixed = module.causal_conv1d_update(
                qkv.view(len(slots), self.drafts, -1).mT, conv, w.conv, w.bias, "silu", conv_state_indices=slots,
                intermediate_conv_window=self.cache.intermediate_conv_window[0], intermediate_state_indices=rows,
                retrieve_next_token=None, retrieve_next_sibling=None, retrieve_parent_token=None,
            )  # fmt: skip
            return self.dispatcher.verify_kernel.target_verify(
                **self.heads(mixed.mT.reshape(len(qkv), -1)), a=a, b=b, cache_indices=slots, **given,
                intermediate_states_buffer=self.cache.intermediate_ssm, intermediate_state_indices=rows,
                cache_steps=self.drafts, retrieve_parent_token=None, stable_rows=False,
            )[0]  # fmt: skip
        kept = {number: place for number, place in (track or {}).items() if number in requests}
        for number, (slot, count) in kept.items():
            last = int(ends[list(requests).index(number)]) + count - known[list(requests).index(number)]
            conv[slot] = qkv[last - conv.shape[-1] : last].mT
        mixed = module.causal_conv1d_fn(
            qkv.mT, w.conv, w.bias, activation="silu", conv_states=conv, cache_indices=slots, query_start_loc=ends,
            has_initial_state=torch.tensor(known) > 0, seq_lens_cpu=list(lengths),
        ).mT  # fmt: skip
        counts = torch.tensor(lengths) // 64
        firsts = counts.cumsum(0) - counts
        output, _, h = self.dispatcher.extend_kernel.extend(
            **self.heads(mixed), g=(-w.A_log.exp() * softplus(a.float() + w.dt_bias.float()))[None],
            beta=b.float().sigmoid()[None], ssm_states=states, cache_indices=slots, query_start_loc=ends,
            state_checkpoint_cu_starts=torch.cat((firsts, counts.sum()[None])) if kept else None,
            num_state_checkpoints=int(counts.sum()) if kept else 0,
            state_checkpoint_every_n_tokens=64 if kept else 0, output=None, layer_id=0,
            extend_prefix_lens=torch.tensor(known), track_state=None, track_chunk_idx=None,
        )  # fmt: skip
        for number, (slot, count) in kept.items():
            row = list(requests).index(number)
            states[slot] = h[0, firsts[row] + (count - known[row]) // 64 - 1]
        return output[0]

    def states(self) -> tuple[Tensor, Tensor]:
        return self.cache.conv[0], self.cache.temporal

    def heads(self, mixed: Tensor) -> dict[str, Tensor]:
        c = self.c
        q, k, v = mixed[None].split([c.key_dim, c.key_dim, c.value_dim], -1)
        k_heads, v_heads = (c.num_k_heads, c.head_k_dim), (c.num_v_heads, c.head_v_dim)
        return {"q": q.unflatten(-1, k_heads), "k": k.unflatten(-1, k_heads), "v": v.unflatten(-1, v_heads)}
