"""Transformers' Gated Delta Net layers on our operators: ``patch()``, ``unpatch()``, or ``with patch():``.

A layer's forward looks its operators up in its module when it runs, so models made before and after are served alike.
Of the Qwen families it is replaced itself, for decode steps: there all between their matrix products is one operator.
Whatever asks for a gradient goes to Transformers' own functions.
"""

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

import gated_delta
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.interop import conv, fla, is_tested
from gated_delta.layer import Projected, projection_sizes
from gated_delta.validation.arguments import Arguments

TESTED = ("5.16", "5.23")
FAMILIES = {"qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe", "olmo_hybrid": "OlmoHybrid"}
"""Model type: how its class names begin."""
_STEPPING = {"qwen3_next": "interleaved", "qwen3_5": "flat", "qwen3_5_moe": "flat"}
"""Families whose decode steps are one operator, and how :class:`GatedDeltaNetConfig` names their projections."""

_ARGUMENTS, _config = Arguments("gated_delta.interop.transformers"), cache(GatedDeltaNetConfig)
_stock: list[tuple[Any, str, Callable[..., Any]]] = []
"""(owner, name, value) of everything that was replaced."""


def patch() -> ExitStack:
    """Serve the layers of :data:`FAMILIES` from now on; as a context manager until its end, unless they were before.

    A version of Transformers outside :data:`TESTED` is left as it is, with a warning.
    """
    version = importlib.metadata.version("transformers")
    undo = ExitStack()
    if is_tested("Transformers", version, *TESTED) and not _stock:
        found: list[tuple[Any, str]] = []
        for family, prefix in FAMILIES.items():
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            found += [*((module, name) for name in _FUNCTIONS), (getattr(module, f"{prefix}RMSNormGated"), "forward")]
        _stock.extend([(owner, name, getattr(owner, name)) for owner, name in found])
        for owner, name, stock in _stock:
            setattr(owner, name, _without_gradient(_FUNCTIONS.get(name, _norm), stock))
        for family, projection in _STEPPING.items():
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            layer = getattr(module, f"{FAMILIES[family]}GatedDeltaNet")
            _stock.append((layer, "forward", layer.forward))
            layer.forward = _stepping(layer.forward, projection)
        logging.getLogger("gated_delta").info("serving %s of Transformers %s", ", ".join(FAMILIES), version)
        undo.callback(unpatch)
    return undo


def unpatch() -> None:
    """Put Transformers' own functions back."""
    while _stock:
        setattr(*_stock.pop())


def patched() -> bool:
    """Whether the layers are served."""
    return bool(_stock)


def _without_gradient(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def serve(*args: Any, **kwargs: Any) -> Any:
        inputs = (getattr(x, "weight", x) for x in (*args, *kwargs.values()))  # the norm is a module with a weight
        trained = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
        return (stock if trained else ours)(*args, **kwargs)

    return serve


def _stepping(stock: Callable[..., Tensor], projection: str) -> Callable[..., Tensor]:
    """A layer's forward: one token of every row of a cache that was prefilled here as one operator, the rest as stock's
    does it, which calls the operators one by one.
    """

    @wraps(stock)
    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **rest: Any
    ) -> Tensor:
        state = window = None
        # Accelerate moves a hooked weight when stock's forward begins.
        other = torch.is_grad_enabled() or attention_mask is not None or hasattr(self.conv1d, "_hf_hook")
        if cache_params is not None and hidden_states.shape[1] == 1 and not other and "cu_seq_lens_q" not in rest:
            kept = cache_params.layers[self.layer_idx]
            if cache_params.has_previous_state(self.layer_idx, state_idx=0) and not kept.record_past:
                window, state = kept.conv_states[0], kept.recurrent_states[0]
        if state is None or window is None or state.stride(-1) == 1:
            return stock(self, hidden_states, cache_params, attention_mask, **rest)
        c = _config(
            hidden_size=self.hidden_size, num_k_heads=self.num_k_heads, num_v_heads=self.num_v_heads,
            head_k_dim=self.head_k_dim, head_v_dim=self.head_v_dim, projection=projection,
        )  # fmt: skip
        x, norm = hidden_states[:, 0], self.norm
        p = Projected(c, tuple([getattr(self, name)(x) for name in projection_sizes(c)]))
        output = gated_delta.gated_delta_net_step(
            # The oldest column of a cache is one that no convolution reads, stock's neither: it stays as it is.
            *p.heads, window[..., 1:], self.conv1d.weight.squeeze(1), state.mT,
            self.A_log.float(), self.dt_bias, norm.weight, eps=norm.variance_epsilon, activation=norm.activation,
            state_indices=torch.arange(len(x), dtype=torch.int32, device=x.device),
        )  # fmt: skip
        return self.out_proj(output.view(len(x), 1, -1))

    return forward


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, **unused: object,
) -> fla.Result:  # fmt: skip
    because = "a cache keeps one convolution's end, not those of packed sequences (cu_seq_lens_q)"
    _ARGUMENTS.excluded("use_cache=True", cu_seqlens is not None and output_final_state, because)
    norm = use_qk_l2norm_in_kernel
    return fla.chunk_gated_delta_rule(
        query, key, value, g, beta, None, initial_state, output_final_state, norm, cu_seqlens=cu_seqlens
    )


def _recurrent(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    **unused: object,
) -> fla.Result:  # fmt: skip
    if initial_state is None or cu_seqlens is not None or query.shape[1] != 1:
        return _chunk(
            query, key, value, g, beta, 64, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
        )
    state = initial_state if output_final_state else initial_state.clone()  # a cache takes the new state in any case
    v_first = state.stride(-1) != 1  # as a cache lies in memory that took its first state from us, not from stock
    decode = gated_delta.gated_delta_rule_decode_pretranspose if v_first else gated_delta.gated_delta_rule_decode
    output, _ = decode(
        query, key, value, state.mT if v_first else state, None, g, None, beta, use_qk_l2norm=use_qk_l2norm_in_kernel
    )
    return output, state if output_final_state else None


def _conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **unused: object,
) -> object:  # fmt: skip
    if cu_seq_lens_q is None:
        _ARGUMENTS.needed("cu_seq_lens_q", seq_idx is None, "seq_idx is, and the delta rule is cut by nothing else")
    return conv.convolved(hidden_states.mT, weight, bias, None, activation, cu_seq_lens_q).mT


def _norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    return gated_delta.rms_norm_gated(hidden_states, gate, self.weight, self.variance_epsilon, self.activation)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _chunk,
    "torch_recurrent_gated_delta_rule": _recurrent,
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": conv.causal_conv1d_update,
}
