"""Random inputs for every operator, and the cases that the usual tests miss."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gated_delta import reference

Inputs = dict[str, Any]
"""Keyword arguments of an operator."""

GATES = ("none", "weak", "mix", "model", "strong")
CLOSED = -30.0
"""A_log of a head that forgets nothing: its rate is e^-30."""


def raw_gates(kind: str, *shape: int, generator: torch.Generator | None = None) -> Inputs:
    """``A_log [HV]``, ``a [*shape]`` and ``dt_bias [HV]`` (HV is the last of ``shape``) of the log decay
    ``-exp(A_log) softplus(a + dt_bias)``, in fp32.

    "none": no decay. "weak": -0.05 to -0.005 a token. "mix": three heads in four ``logsigmoid(N(0,1)) / 16``, the rest
    none. "model": rates of 0.05 to 16 over the heads and a bias of -4, as trained layers spread theirs. "strong": -20.
    """
    heads, a = shape[-1], torch.randn(*shape, generator=generator)
    a_log, bias = torch.zeros(heads), torch.zeros(heads)
    if kind == "model":
        a_log, bias = torch.logspace(-1.3, 1.2, heads).log(), bias - 4.0
    elif kind == "none":
        a_log = a_log + CLOSED
    elif kind == "mix":
        a_log = torch.where(torch.arange(heads) % 4 == 3, CLOSED, -math.log(16))
    elif kind == "weak":
        a = torch.expm1(torch.rand(*shape, generator=generator) * 0.045 + 0.005).log()  # the inverse of softplus
    elif kind == "strong":
        a = torch.full_like(a, 20.0)
    else:
        raise ValueError(f"gates is {kind!r}; it must be one of {', '.join(GATES)}")
    return {"A_log": a_log, "a": a, "dt_bias": bias}


def _generator(seed: int | None) -> torch.Generator | None:
    """None is torch's own, on whatever device tensors are made."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """The first token of every packed sequence, and one past the last token."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


def prefill_inputs(
    lengths: Sequence[int], *, hq: int = 2, hk: int = 2, hv: int = 4, head_k: int = 64, head_v: int = 64,
    dtype: torch.dtype = torch.bfloat16, gates: str = "model", g_space: str = "log", similar_keys: bool = False,
    seed: int | None = 0,
) -> Inputs:  # fmt: skip
    """Arguments of ``chunk_gated_delta_rule``: normalised q and k, ``beta = sigmoid(N(0,1))``, gates as
    :func:`raw_gates` makes them. ``similar_keys`` points all keys of a head roughly the same way, which makes the
    system inside a chunk as stiff as it gets.
    """
    generator = _generator(seed)
    total, heads = sum(lengths), max(hq, hv)
    normal = partial(torch.randn, generator=generator)
    k = normal(total, hk, head_k)
    if similar_keys:
        k = 0.2 * k + normal(1, hk, head_k)
    raw = raw_gates(gates, total, heads, generator=generator)
    g = -raw["A_log"].exp() * reference.softplus(raw["a"] + raw["dt_bias"])
    return {
        "q": reference.l2norm(normal(total, hq, head_k)).to(dtype),
        "k": reference.l2norm(k).to(dtype),
        "v": normal(total, hv, head_v).to(dtype),
        "g": g if g_space == "log" else g.exp(),
        "beta": torch.sigmoid(normal(total, heads)),
        "g_space": g_space,
        "cu_seqlens": cu_seqlens(lengths),
    }


def with_state(inputs: Inputs, *, dtype: torch.dtype = torch.float32, seed: int | None = 1) -> Inputs:
    """The same with a random ``initial_state`` of one state a sequence."""
    shape = (len(inputs["cu_seqlens"]) - 1, inputs["beta"].shape[1], inputs["v"].shape[-1], inputs["k"].shape[-1])
    state = torch.randn(*shape, generator=_generator(seed)) / shape[-1] ** 0.5
    return {**inputs, "initial_state": state.to(dtype)}


def recurrent_inputs(
    batch: int, tokens: int = 1, *, h: int = 2, hv: int = 4, head_k: int = 64, head_v: int = 64,
    dtype: torch.dtype = torch.bfloat16, state_dtype: torch.dtype = torch.float32, gates: str = "model",
    seed: int | None = 0,
) -> Inputs:  # fmt: skip
    """Arguments of the decode operators with raw gates; ``state`` is ``[B, HV, V, K]``."""
    generator = _generator(seed)
    normal = partial(torch.randn, generator=generator)
    return {
        "q": normal(batch, tokens, h, head_k).to(dtype),
        "k": normal(batch, tokens, h, head_k).to(dtype),
        "v": normal(batch, tokens, hv, head_v).to(dtype),
        "state": (normal(batch, hv, head_v, head_k) / head_k**0.5).to(state_dtype),
        **(raw := raw_gates(gates, batch, tokens, hv, generator=generator)),
        "a": raw["a"].to(dtype),
        "b": normal(batch, tokens, hv).to(dtype),
    }


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same on another device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _changed(inputs: Inputs, names: Iterable[str], change: Callable[[Tensor], Tensor]) -> Inputs:
    return {**inputs, **{name: change(inputs[name]) for name in names}}


def _constant_beta(inputs: Inputs, value: float) -> Inputs:
    return _changed(inputs, ["beta"], lambda x: torch.full_like(x, value))


def _sprinkled(inputs: Inputs, name: str, values: Sequence[float]) -> Inputs:
    """Every fifth token of ``name`` takes one of ``values``, in turn."""
    changed = inputs[name].clone()
    for i, row in enumerate(range(2, len(changed), 5)):
        changed[row] = values[i % len(values)]
    return {**inputs, name: changed}


def _strided(inputs: Inputs) -> Inputs:
    """A token's q, k, v and gates as slices of wider buffers, as a fused projection leaves them."""
    inputs = _changed(inputs, ("q", "k", "v", "g", "beta"), lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]])
    return _changed(inputs, ["cu_seqlens"], lambda x: x.repeat_interleave(2)[::2])


def _weak(tokens: int = 200, **options: Any) -> Inputs:
    return with_state(prefill_inputs([tokens], gates="weak", **options))


BLIND_SPOTS: dict[str, Callable[[], Inputs]] = {
    "K != V": lambda: with_state(prefill_inputs([70, 130], head_k=96, head_v=192)),
    "K > V": lambda: with_state(prefill_inputs([70, 130], head_k=128, head_v=32)),
    "all q and k negative": lambda: _changed(prefill_inputs([200]), "qk", lambda x: -x.abs()),
    "similar keys": lambda: _weak(similar_keys=True),
    "similar keys, beta 1": lambda: _constant_beta(_weak(similar_keys=True), 1.0),
    "similar keys, beta 2": lambda: _constant_beta(_weak(400, similar_keys=True), 2.0),
    "similar keys, beta 2, fp32": lambda: _constant_beta(_weak(400, similar_keys=True, dtype=torch.float32), 2.0),
    "32k tokens, no decay": lambda: prefill_inputs([32768], hq=1, hk=1, hv=1, head_k=32, head_v=32, gates="none"),
    "32k tokens, weak decay": lambda: prefill_inputs([32768], hq=1, hk=1, hv=1, head_k=32, head_v=32, gates="weak"),
    "-20 nats a token": lambda: with_state(prefill_inputs([200], gates="strong")),
    "-20 nats, then weak, in one chunk": lambda: _sprinkled(_weak(), "g", [-20.0]),
    "log gate exactly 0": lambda: _sprinkled(_weak(), "g", [0.0]),
    "alpha exactly 0": lambda: _sprinkled(_weak(g_space="linear"), "g", [0.0]),
    "beta 0, 1 and 2": lambda: _sprinkled(with_state(prefill_inputs([200])), "beta", [0.0, 1.0, 2.0]),
    "beta all 0": lambda: _constant_beta(with_state(prefill_inputs([100])), 0.0),
    "empty sequences everywhere": lambda: with_state(prefill_inputs([0, 0, 65, 0, 1, 0, 64, 0])),
    "strided inputs": lambda: _strided(with_state(prefill_inputs([33, 100]))),
    # So short that a wrong epsilon shows.
    "l2norm of short vectors": lambda: _changed(
        with_state({**prefill_inputs([100]), "use_qk_l2norm_in_kernel": True}), "qk", lambda x: x * 2e-3
    ),
    "scale 0": lambda: {**prefill_inputs([100]), "scale": 0.0},
}
"""Named prefill inputs that a suite on friendly data would not try."""
