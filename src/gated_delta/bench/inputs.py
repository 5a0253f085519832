"""Random inputs for a case, in as many sets as it takes to keep them out of the caches."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gated_delta import reference
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.bench.cases import MODELS, STATES, Case
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import StatePool

Inputs = dict[str, Any]
"""Tensors of one set by the names of our operators' arguments; ``log_alpha`` beside ``alpha`` for those who want it."""

MOST_SETS = 256
CLOSED = -30.0
"""A_log of a head that forgets nothing: its rate is e^-30."""


class Maker:
    """Makes tensors on one device from one seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.randn(*shape, device=self.device, generator=self.generator)
        return x.to(dtype)

    def unwritten(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """For results: NaN, so that what nobody writes is found."""
        return torch.full(shape, torch.nan, device=self.device, dtype=dtype)

    def integers(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)


def gates(make: Maker, kind: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """``A_log [HV]``, ``a [*shape]`` and ``dt_bias [HV]`` (HV is the last of ``shape``) of the log decay
    ``-exp(A_log) softplus(a + dt_bias)``.

    "none": no decay. "weak": -0.05 to -0.005 a token. "mix": three heads in four ``logsigmoid(N(0,1)) / 16``, the rest
    none. "model": rates of 0.05 to 16 over the heads and a bias of -4, as trained layers spread theirs.
    """
    heads, a = shape[-1], make.normal(*shape, dtype=torch.float32)
    a_log, bias = torch.zeros(heads, device=make.device), torch.zeros(heads, device=make.device)
    if kind == "model":
        a_log, bias = torch.logspace(-1.3, 1.2, heads, device=make.device).log(), bias - 4.0
    elif kind == "none":
        a_log = a_log + CLOSED
    elif kind == "mix":
        a_log = torch.where(torch.arange(heads, device=make.device) % 4 == 3, CLOSED, -math.log(16))
    else:
        uniform = torch.rand(*shape, device=make.device, generator=make.generator) * 0.045 + 0.005
        a = torch.expm1(uniform).log()  # the inverse of softplus
    return {"A_log": a_log, "a": a.to(dtype), "dt_bias": bias}


def make_sets(case: Case, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Sets of inputs whose tensors are more than ``cache_bytes`` in all; one if ``cache_bytes`` is 0.

    What describes a batch (``cu_seqlens``, slots) is the same object in all: peers keep what they derive from it.
    """
    make = Maker(device)
    builder = _BUILDERS[case.operation]
    first = builder(case, make, None)
    count = min(MOST_SETS, -(-cache_bytes // nbytes(first))) if cache_bytes else 1
    return [first, *(builder(case, make, first) for _ in range(count - 1))]


def nbytes(inputs: Inputs) -> int:
    """Of all tensors and of a layer's weights."""
    layer = inputs.get("layer")
    weights = sum(p.nbytes for p in layer.parameters()) if layer is not None else 0
    return weights + sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))


def _prefill(case: Case, make: Maker, first: Inputs | None) -> Inputs:
    heads, lengths = case.heads, case.lengths
    total, state = sum(lengths), (len(lengths), heads.hv, heads.v, heads.k)
    q, k = (F.normalize(make.normal(total, heads.h, heads.k).float(), dim=-1).bfloat16() for _ in range(2))
    raw = gates(make, case.gates, total, heads.hv, dtype=torch.float32)
    log_alpha = -raw["A_log"].exp() * reference.softplus(raw["a"] + raw["dt_bias"])
    return {
        "q": q, "k": k, "v": make.normal(total, heads.hv, heads.v), "alpha": log_alpha.exp(), "log_alpha": log_alpha,
        "beta": make.normal(total, heads.hv, dtype=torch.float32).sigmoid(),
        "initial_state": make.normal(*state, dtype=torch.float32) * heads.k**-0.5,
        "output": make.unwritten(total, heads.hv, heads.v),
        "output_state": make.unwritten(*state, dtype=torch.float32),
        "cu_seqlens": first["cu_seqlens"] if first else make.integers([*accumulate(lengths, initial=0)]),
    }  # fmt: skip


def _recurrent(case: Case, make: Maker, first: Inputs | None) -> Inputs:
    (h, hv, size_k, size_v), rows, steps, dtype = case.heads, case.batch, case.tokens, STATES[case.state]
    last = (size_k, size_v) if case.form == "K-major" else (size_v, size_k)
    apart = steps + 1 if case.form == "slots" else 1  # slots of a row: the one that is read, then one a token
    inputs = {
        "q": make.normal(rows, steps, h, size_k), "k": make.normal(rows, steps, h, size_k),
        "v": make.normal(rows, steps, hv, size_v), "b": make.normal(rows, steps, hv),
        "state": (make.normal(rows * apart, hv, *last, dtype=torch.float32) * size_k**-0.5).to(dtype),
        "output": make.unwritten(rows, steps, hv, size_v), **gates(make, case.gates, rows, steps, hv),
    }  # fmt: skip
    slots = torch.arange(rows * apart, dtype=torch.int32, device=make.device).view(rows, apart)
    inputs["slots"] = first["slots"] if first else slots[:, 0].contiguous()
    if case.form == "slots":
        inputs["token_slots"] = first["token_slots"] if first else slots[:, 1:].contiguous()
    if case.form == "snapshots":
        inputs["snapshots"] = make.unwritten(rows, steps, hv, *last, dtype=dtype)
    return inputs


def _conv(case: Case, make: Maker, first: Inputs | None) -> Inputs:
    width, channels, rows, total = 4, case.heads.conv_dim, len(case.lengths), sum(case.lengths)
    states = make.normal(rows, channels, width - 1)
    if case.form == "update D":
        states = make.normal(rows, width - 1, channels).transpose(1, 2)
    starts = first["cu_seqlens"] if first else make.integers([*accumulate(case.lengths, initial=0)])
    weight = first["weight"] if first else make.normal(channels, width)
    return {"x": make.normal(total, channels), "conv_states": states, "weight": weight, "cu_seqlens": starts}


def _norm(case: Case, make: Maker, first: Inputs | None) -> Inputs:
    shape = (case.batch, case.heads.hv, case.heads.v)
    weight = first["weight"] if first else make.normal(case.heads.v)
    return {"x": make.normal(*shape), "z": make.normal(*shape), "weight": weight}


def _layer(case: Case, make: Maker, first: Inputs | None) -> Inputs:
    """A layer with weights of its own, states in a pool, and a step that goes on from them."""
    h, hv, size_k, size_v = case.heads
    model = MODELS.get(case.heads)
    config = GatedDeltaNetConfig(
        hidden_size=model.hidden if model else 256, num_k_heads=h, num_v_heads=hv, head_k_dim=size_k, head_v_dim=size_v
    )
    rows = len(case.lengths)
    layer = GatedDeltaNetAttention(config).to(device=make.device, dtype=torch.bfloat16).requires_grad_(False)
    pool = StatePool(config, layers=1, slots=rows, conv_dtype=torch.bfloat16, device=make.device)
    state = pool.layer(0)
    state.conv.normal_(generator=make.generator)
    state.recurrent.normal_(generator=make.generator).mul_(size_k**-0.5)
    steps = [Row(length, slot) for slot, length in enumerate(case.lengths)]
    batch = first["batch"] if first else GatedDeltaNetBatch.build(steps, device=make.device)
    hidden = make.normal(sum(case.lengths), config.hidden_size)
    return {"layer": layer, "batch": batch, "layer_state": state, "hidden": hidden, "recurrent": state.recurrent}


_BUILDERS = {
    "prefill": _prefill, "decode": _recurrent, "verify": _recurrent, "conv": _conv, "norm": _norm, "layer": _layer,
}  # fmt: skip
