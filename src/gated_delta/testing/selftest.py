"""Every operator and the layer against float64: what ``gated-delta check`` runs, and our own tests too."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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


def _both(evaluate: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """The plain evaluation and the exact one."""
    return [evaluate(*args, **options, dtype=dtype) for dtype in (torch.float32, torch.float64)]


def _judged(evaluations: Sequence[oracle.Evaluation], **results: Tensor) -> list[Verdict]:
    """Results by the fields of the evaluations that are named so."""
    return [judge(name, x, *(getattr(each, name) for each in evaluations)) for name, x in results.items()]


def _evaluations(inputs: Inputs, device: str, **options: Any) -> list[oracle.Evaluation]:
    """Of a prefill: GPUs multiply in tensor cores, and so in the dtype of the activations."""
    operands = None if device == "cpu" else inputs["q"].dtype
    plain = oracle.prefill(**inputs, **options, dtype=torch.float32, operands=operands)
    return [plain, oracle.prefill(**inputs, **options)]


def _prefill(make: Callable[[], Inputs], device: str) -> list[Verdict]:
    inputs = make()
    output, state = gd.chunk_gated_delta_rule(**to_device(inputs, device), output_final_state=True)
    return _judged(_evaluations(inputs, device), output=output, state=state)


def _checkpoints(device: str) -> list[Verdict]:
    inputs = with_state(prefill_inputs([200, 0, 64, 300]), dtype=torch.bfloat16)
    starts = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32, device=device)
    stored = torch.zeros(8, 4, 64, 64, device=device)
    gd.chunk_gated_delta_rule(
        **to_device(inputs, device), state_checkpoints=stored, checkpoint_cu_starts=starts, checkpoint_every_n_tokens=64
    )
    plain, exact = (torch.stack(found.kept) for found in _evaluations(inputs, device, checkpoint_every_n_tokens=64))
    return [judge("checkpoints", stored, plain, exact)]


def _decode(operator: str, dtype: torch.dtype, state_dtype: torch.dtype, device: str) -> list[Verdict]:
    inputs = recurrent_inputs(5, dtype=dtype, state_dtype=state_dtype, head_k=96, head_v=128)
    evaluations = _both(oracle.recurrent, **inputs)
    given = to_device(inputs, device)  # on the same device the operator writes into these very tensors
    k_first = operator == "gated_delta_rule_decode"
    given["state"] = given["state"].mT.contiguous() if k_first else given["state"]
    output, state = getattr(gd, operator)(**given)
    return _judged(evaluations, output=output, state=state.mT if k_first else state)


def _mtp(tokens: int, state_dtype: torch.dtype, device: str) -> list[Verdict]:
    inputs = recurrent_inputs(3, tokens, state_dtype=state_dtype)
    given = to_device(inputs, device)
    state = given.pop("state")
    pool = torch.full((7, *state.shape[1:]), torch.nan, dtype=state_dtype, device=device)
    slots = torch.tensor([4, 1, 6], device=device)
    pool[slots] = state
    snapshots = torch.empty(3, tokens, *state.shape[1:], dtype=state_dtype, device=device)
    output, pool = gd.gated_delta_rule_mtp(
        **given, initial_state=pool, initial_state_indices=slots, intermediate_states_buffer=snapshots,
        disable_state_update=False,
    )  # fmt: skip
    evaluations = _both(oracle.recurrent, **inputs)
    kept = judge("snapshots", snapshots, *(torch.stack(each.kept, 1) for each in evaluations))
    return [*_judged(evaluations, output=output, state=pool[slots]), kept]


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _conv(dtype: torch.dtype, width: int, device: str) -> list[Verdict]:
    x, weight, bias = _normal(90, 48, seed=0, dtype=dtype), _normal(48, width, seed=1), _normal(48, seed=2)
    states = _normal(3, 48, width - 1, seed=3, dtype=dtype)
    starts = torch.tensor([0, 1, 1, 90], dtype=torch.int32)
    history = states.transpose(1, 2)
    evaluations = _both(oracle.conv, x, weight, bias, history, starts, "silu")
    given = to_device({"x": x, "weight": weight, "bias": bias, "conv_states": states, "cu_seqlens": starts}, device)
    kept = [torch.cat((h, x[a:b]))[1 - width :].T for h, a, b in zip(history, starts, starts[1:], strict=False)]
    exact_states = torch.stack(kept).double()
    y = gd.causal_conv1d(**given, state_indices=None, has_initial_state=None)
    return [judge("output", y, *evaluations), judge("state", given["conv_states"], exact_states, exact_states)]


def _conv_update(dtype: torch.dtype, device: str) -> list[Verdict]:
    x, weight, states = (_normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((4, 3, 32), (32, 4), (4, 32, 5))))
    accepted = torch.tensor([1, 3, 2, 1])
    history = torch.stack([row[:, n - 1 : n + 2].T for row, n in zip(states, accepted.tolist(), strict=True)])
    evaluations = _both(oracle.conv, x.flatten(0, 1), weight, None, history, torch.arange(5) * 3, "silu")
    window = torch.cat((history[:, 1:], x), dim=1).transpose(1, 2).double()  # 5 columns, all that the states have
    given = to_device({"x": x, "conv_states": states, "weight": weight, "num_accepted_tokens": accepted}, device)
    y = gd.causal_conv1d_update(**given, state_indices=None)
    return [judge("output", y.flatten(0, 1), *evaluations), judge("state", given["conv_states"], window, window)]


def _norm(dtype: torch.dtype, activation: str, device: str) -> list[Verdict]:
    x, z, weight = _normal(50, 4, 64, seed=0, dtype=dtype), _normal(50, 4, 64, seed=1, dtype=dtype), _normal(64, seed=2)
    gate, dtypes = getattr(functional, activation), (torch.float32, torch.float64)
    gated = [functional.rms_norm(x.to(t), (64,), weight.to(t), 1e-6) * gate(z.to(t)) for t in dtypes]
    y = gd.rms_norm_gated(x.to(device), z.to(device), weight.to(device), 1e-6, activation)
    return [judge("output", y, *gated)]


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


def _cases() -> Iterator[Case]:
    for name, make in BLIND_SPOTS.items():
        yield Case("chunk_gated_delta_rule", name, partial(_prefill, make))
    yield Case("chunk_gated_delta_rule", "checkpoints", _checkpoints)
    decode = ("gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose")
    for dtype in FLOATS:
        for hq, hk, hv in ((2, 2, 2), (2, 2, 6), (4, 2, 2)):
            make = partial(prefill_inputs, [100, 1, 64, 35], dtype=dtype, hq=hq, hk=hk, hv=hv)
            name = f"{_name(dtype)}, heads {hq}/{hk}/{hv}"
            yield Case("chunk_gated_delta_rule", name, partial(_prefill, lambda m=make: with_state(m())))
        for operator, state in product(decode, FLOATS):
            name = f"{_name(dtype)}, state {_name(state)}"
            yield Case(operator, name, partial(_decode, operator, dtype, state))
        for activation in ("silu", "sigmoid"):
            yield Case("rms_norm_gated", f"{_name(dtype)}, {activation}", partial(_norm, dtype, activation))
        for width in (2, 3, 4, 5):
            yield Case("causal_conv1d", f"{_name(dtype)}, W={width}", partial(_conv, dtype, width))
        yield Case("causal_conv1d_update", _name(dtype), partial(_conv_update, dtype))
    for tokens, state in product((1, 2, 5, 16), FLOATS):
        yield Case("gated_delta_rule_mtp", f"T={tokens}, state {_name(state)}", partial(_mtp, tokens, state))
    for projection, steps in product(("interleaved", "flat"), _LAYER_STEPS):
        yield Case("GatedDeltaNetAttention", f"{projection}, {steps}", partial(_layer, projection, steps))


CASES = [*_cases()]
