"""Random inputs for a case, in as many sets as it takes to keep them out of the caches."""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gated_delta import reference
from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.bench.cases import MODELS, NO_MODEL, STATES, Case
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import StatePool

Inputs = dict[str, Any]
"""Tensors of one set by the names of our operators' arguments; ``log_alpha`` beside ``alpha`` for those who want it."""

MOST_SETS = 256
CLOSED = -30.0
"""A_log of a head that forgets nothing: its rate is e^-30."""


SHARED = ("cu_seqlens", "slots", "token_slots", "weight", "batch")
"""What is the same object in all sets: peers keep what they derive from such descriptions of a batch."""


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For results: NaN, so that what nobody writes is found."""
    return torch.full(shape, torch.nan, dtype=dtype)


def gates(kind: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """``A_log [HV]``, ``a [*shape]`` and ``dt_bias [HV]`` (HV is the last of ``shape``) of the log decay
    ``-exp(A_log) softplus(a + dt_bias)``.

    "none": no decay. "weak": -0.05 to -0.005 a token. "mix": three heads in four ``logsigmoid(N(0,1)) / 16``, the rest
    none. "model": rates of 0.05 to 16 over the heads and a bias of -4, as trained layers spread theirs.
    """
    heads, a = shape[-1], torch.randn(*shape)
    a_log, bias = torch.zeros(heads), torch.zeros(heads)
    if kind == "model":
        a_log, bias = torch.logspace(-1.3, 1.2, heads).log(), bias - 4.0
    elif kind == "none":
        a_log = a_log + CLOSED
    elif kind == "mix":
        a_log = torch.where(torch.arange(heads) % 4 == 3, CLOSED, -math.log(16))
    else:
        a = torch.expm1(torch.rand(*shape) * 0.045 + 0.005).log()  # the inverse of softplus
    return {"A_log": a_log, "a": a.to(dtype), "dt_bias": bias}


def make_sets(case: Case, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Sets of inputs whose tensors are more than ``cache_bytes`` in all; one if ``cache_bytes`` is 0. The same case
    has the same inputs every time.
    """
    torch.manual_seed(0)
    with torch.device(device):
        first = _BUILDERS[case.operation](case)
        count = min(MOST_SETS, -(-cache_bytes // nbytes(first))) if cache_bytes else 1
        shared = {name: first[name] for name in SHARED if name in first}
        return [first, *({**_BUILDERS[case.operation](case), **shared} for _ in range(count - 1))]


def nbytes(inputs: Inputs) -> int:
    """Of all tensors and of a layer's weights."""
    layer = inputs.get("layer")
    weights = sum(p.nbytes for p in layer.parameters()) if layer is not None else 0
    return weights + sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))


def _starts(case: Case) -> Tensor:
    return torch.tensor([*accumulate(case.lengths, initial=0)], dtype=torch.int32)


def _prefill(case: Case) -> Inputs:
    (h, hv, size_k, size_v), total = case.heads, sum(case.lengths)
    state = (len(case.lengths), hv, size_v, size_k)
    q, k = (F.normalize(normal(total, h, size_k).float(), dim=-1).bfloat16() for _ in range(2))
    raw = gates(case.gates, total, hv, dtype=torch.float32)
    log_alpha = -raw["A_log"].exp() * reference.softplus(raw["a"] + raw["dt_bias"])
    return {
        "q": q, "k": k, "v": normal(total, hv, size_v), "alpha": log_alpha.exp(), "log_alpha": log_alpha,
        "beta": torch.randn(total, hv).sigmoid(), "initial_state": torch.randn(*state) * size_k**-0.5,
        "output": unwritten(total, hv, size_v), "output_state": unwritten(*state, dtype=torch.float32),
        "cu_seqlens": _starts(case),
    }  # fmt: skip


def _recurrent(case: Case) -> Inputs:
    (h, hv, size_k, size_v), rows, steps, dtype = case.heads, case.batch, case.tokens, STATES[case.state]
    last = (size_k, size_v) if case.form == "K-major" else (size_v, size_k)
    apart = steps + 1 if case.form == "slots" else 1  # slots of a row: the one that is read, then one a token
    slots = torch.arange(rows * apart, dtype=torch.int32).view(rows, apart)
    inputs = {
        "q": normal(rows, steps, h, size_k), "k": normal(rows, steps, h, size_k), "v": normal(rows, steps, hv, size_v),
        "b": normal(rows, steps, hv), "state": (torch.randn(rows * apart, hv, *last) * size_k**-0.5).to(dtype),
        "output": unwritten(rows, steps, hv, size_v), "slots": slots[:, 0].contiguous(),
        **gates(case.gates, rows, steps, hv),
    }  # fmt: skip
    if case.form == "slots":
        inputs["token_slots"] = slots[:, 1:].contiguous()
    if case.form == "snapshots":
        inputs["snapshots"] = unwritten(rows, steps, hv, *last, dtype=dtype)
    return inputs


def _conv(case: Case) -> Inputs:
    width, channels, rows = 4, case.heads.conv_dim, len(case.lengths)
    by_channel = case.form == "update D"
    states = normal(rows, width - 1, channels).transpose(1, 2) if by_channel else normal(rows, channels, width - 1)
    x, weight = normal(sum(case.lengths), channels), normal(channels, width)
    return {"x": x, "conv_states": states, "weight": weight, "cu_seqlens": _starts(case)}


def _norm(case: Case) -> Inputs:
    shape = (case.batch, case.heads.hv, case.heads.v)
    return {"x": normal(*shape), "z": normal(*shape), "weight": normal(case.heads.v)}


def _layer(case: Case) -> Inputs:
    """A layer with weights of its own, states in a pool, and a step that goes on from them."""
    h, hv, size_k, size_v = case.heads
    _, hidden = MODELS.get(case.heads, NO_MODEL)
    config = GatedDeltaNetConfig(
        hidden_size=hidden, num_k_heads=h, num_v_heads=hv, head_k_dim=size_k, head_v_dim=size_v
    )
    layer = GatedDeltaNetAttention(config).to(torch.bfloat16).requires_grad_(False)
    x = normal(sum(case.lengths), hidden)
    pool = StatePool(config, layers=1, slots=len(case.lengths), conv_dtype=torch.bfloat16, device=x.device)
    state = pool.layer(0)
    state.conv.normal_()
    state.recurrent.normal_().mul_(size_k**-0.5)
    batch = GatedDeltaNetBatch.build([Row(n, slot) for slot, n in enumerate(case.lengths)], device=x.device)
    return {"layer": layer, "batch": batch, "layer_state": state, "hidden": x, "recurrent": state.recurrent}


_BUILDERS = {
    "prefill": _prefill, "decode": _recurrent, "verify": _recurrent, "conv": _conv, "norm": _norm, "layer": _layer,
}  # fmt: skip
