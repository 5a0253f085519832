"""Every operator and the layer against float64: what ``gated-delta check`` runs, and our own tests too."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import gated_delta as gd
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.state import StatePool
from gated_delta.testing import oracle
from gated_delta.testing.budget import Verdict, judge
from gated_delta.testing.inputs import BLIND_SPOTS, Inputs, prefill_inputs, recurrent_inputs, to_device, with_state
from gated_delta.validation.arguments import FLOATS, describe_dtypes


class Case(NamedTuple):
    """One call of an operator, and how to judge what it gives."""

    operator: str
    name: str
    run: Callable[[str], list[Verdict]]
    """Takes the device to run on."""


def _name(dtype: torch.dtype) -> str:
    return describe_dtypes([dtype])


def _operator(operator: str, make: Callable[[], Inputs], device: str) -> list[Verdict]:
    """One call with the arguments that ``make`` makes: all that it leaves."""
    inputs, operands = make(), None
    if operator == "chunk_gated_delta_rule":
        inputs["output_final_state"] = True
        operands = None if device == "cpu" else inputs["q"].dtype  # of tensor cores
    plain = oracle.evaluate(operator, inputs, dtype=torch.float32, operands=operands)
    exact = oracle.evaluate(operator, inputs)
    given = to_device(inputs, device)  # on the same device the operator writes into these very tensors
    returned = getattr(gd, operator)(**given)
    found = oracle.results(operator, given, *(returned if isinstance(returned, tuple) else (returned,)))
    return [judge(name, x, plain[name], exact[name]) for name, x in found.items()]


def _checkpoints() -> Inputs:
    stored, starts = torch.zeros(8, 4, 64, 64), torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    asked = {"state_checkpoints": stored, "checkpoint_cu_starts": starts, "checkpoint_every_n_tokens": 64}
    return with_state(prefill_inputs([200, 0, 64, 300]), dtype=torch.bfloat16) | asked


def _decode(operator: str, dtype: torch.dtype, state_dtype: torch.dtype) -> Inputs:
    inputs = recurrent_inputs(5, dtype=dtype, state_dtype=state_dtype, head_k=96, head_v=128)
    turned = {"state": inputs["state"].mT.contiguous()} if operator == "gated_delta_rule_decode" else {}
    return inputs | turned


def _mtp(tokens: int, state_dtype: torch.dtype) -> Inputs:
    inputs, slots = recurrent_inputs(3, tokens, state_dtype=state_dtype), torch.tensor([4, 1, 6])
    states = inputs.pop("state")
    pool, snapshots = states.new_full((7, *states.shape[1:]), torch.nan), states.new_empty(3, tokens, *states.shape[1:])
    pool[slots] = states
    asked = {"intermediate_states_buffer": snapshots, "disable_state_update": False}
    return {**inputs, "initial_state": pool, "initial_state_indices": slots, **asked}


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _conv(dtype: torch.dtype, width: int) -> Inputs:
    return {
        "x": _normal(90, 48, seed=0, dtype=dtype), "weight": _normal(48, width, seed=1), "bias": _normal(48, seed=2),
        "conv_states": _normal(3, 48, width - 1, seed=3, dtype=dtype), "state_indices": None,
        "cu_seqlens": torch.tensor([0, 1, 1, 90], dtype=torch.int32), "has_initial_state": None,
    }  # fmt: skip


def _conv_update(dtype: torch.dtype) -> Inputs:
    x, weight, states = (_normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((4, 3, 32), (32, 4), (4, 32, 5))))
    accepted = torch.tensor([1, 3, 2, 1])  # a step leaves 5 columns, all that the states have
    return {"x": x, "conv_states": states, "weight": weight, "state_indices": None, "num_accepted_tokens": accepted}


def _norm(dtype: torch.dtype, activation: str) -> Inputs:
    x, z = (_normal(50, 4, 64, seed=seed, dtype=dtype) for seed in (0, 1))
    return {"x": x, "z": z, "weight": _normal(64, seed=2), "eps": 1e-6, "activation": activation}


_LAYER_STEPS: dict[str, list[tuple[int, int, Row | SpecRow]]] = {
    "prefill, decode": [
        (0, 50, Row(50, 2, fresh=True)), (50, 77, Row(27, 2)), *((t, t + 1, Row(1, 2)) for t in range(77, 80)),
    ],
    "prefill, speculation": [
        (0, 50, Row(50, 2, fresh=True)),
        *((t, t + 3, SpecRow(3, [2, 0, 1], 1 if t == 50 else 2)) for t in range(50, 76, 2)),  # keeps 2 of 3 each time
    ],
}  # fmt: skip
"""First and one past the last token of each step, and the row that it is."""


@torch.no_grad()
def _layer(projection: str, steps: str, device: str) -> list[Verdict]:
    """One sequence in the steps named, in a pool full of NaN."""
    torch.manual_seed(0)
    config = GatedDeltaNetConfig(
        hidden_size=64, num_k_heads=2, num_v_heads=4, head_k_dim=32, head_v_dim=64, projection=projection
    )
    layer, hidden = GatedDeltaNetAttention(config), _normal(1, 80, 64, seed=0)
    plain = layer.evaluate(hidden, token_by_token=True)[0]
    exact = layer.double().evaluate(hidden.double(), token_by_token=True, dtype=torch.float64)[0]
    layer = layer.float().to(device)
    state = StatePool(config, layers=1, slots=3, num_spec=2, device=device).layer(0)
    state.conv.fill_(torch.nan)
    state.recurrent.fill_(torch.nan)
    output = torch.full_like(hidden[0], torch.nan, device=device)
    for first, last, row in _LAYER_STEPS[steps]:
        batch = GatedDeltaNetBatch.build([row], num_spec=2, device=device)
        output[first:last] = layer(hidden[0, first:last].to(device), batch, state)
    done = _LAYER_STEPS[steps][-1][1]
    return [judge("output", output[:done], plain[:done], exact[:done])]


def _inputs() -> Iterator[tuple[str, str, Callable[[], Inputs]]]:
    """Operator, name of the case, arguments."""
    prefill, mtp, norm = "chunk_gated_delta_rule", "gated_delta_rule_mtp", "rms_norm_gated"
    for name, make in BLIND_SPOTS.items():
        yield prefill, name, make
    yield prefill, "checkpoints", _checkpoints
    for dtype in FLOATS:
        for hq, hk, hv in ((2, 2, 2), (2, 2, 6), (4, 2, 2)):
            make = partial(prefill_inputs, [100, 1, 64, 35], dtype=dtype, hq=hq, hk=hk, hv=hv)
            yield prefill, f"{_name(dtype)}, heads {hq}/{hk}/{hv}", lambda make=make: with_state(make())
        for operator, state in product(("gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose"), FLOATS):
            yield operator, f"{_name(dtype)}, state {_name(state)}", partial(_decode, operator, dtype, state)
        for activation in ("silu", "sigmoid"):
            yield norm, f"{_name(dtype)}, {activation}", partial(_norm, dtype, activation)
        for width in (2, 3, 4, 5):
            yield "causal_conv1d", f"{_name(dtype)}, W={width}", partial(_conv, dtype, width)
        yield "causal_conv1d_update", _name(dtype), partial(_conv_update, dtype)
    for tokens, state in product((1, 2, 5, 16), FLOATS):
        yield mtp, f"T={tokens}, state {_name(state)}", partial(_mtp, tokens, state)


CASES = [
    *(Case(operator, name, partial(_operator, operator, make)) for operator, name, make in _inputs()),
    *(
        Case("GatedDeltaNetAttention", f"{projection}, {steps}", partial(_layer, projection, steps))
        for projection, steps in product(("interleaved", "flat"), _LAYER_STEPS)
    ),
]
