"""Random inputs for a case, in as many sets as it takes to keep them out of the caches."""

import torch
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch, Row
from gated_delta.bench.cases import MODELS, NO_MODEL, STATES, Case
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.layer import GatedDeltaNetAttention, Projected
from gated_delta.state import LayerState, StatePool
from gated_delta.testing.inputs import Inputs, cu_seqlens, prefill_inputs, raw_gates, recurrent_inputs, with_state

MOST_SETS = 256
SHARED = ("cu_seqlens", "state_indices", "initial_state_indices", "ssm_state_indices", "weight", "batch")
"""What is the same object in all sets: peers keep what they derive from such descriptions of a batch."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def unwritten(like: Tensor, *rows: int) -> Tensor:
    """For results: NaN, so that what nobody writes is found; ``rows`` stand in the place of the first dimension."""
    return like.new_full((*rows, *like.shape[len(rows) > 0 :]), torch.nan)


def make_sets(case: Case, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Sets of inputs of more than ``cache_bytes`` in all, one if that is 0; the same for a case every time."""
    torch.manual_seed(0)
    with torch.device(device):
        first = _BUILDERS[case.operation](case)
        count = min(MOST_SETS, -(-cache_bytes // nbytes(first))) if cache_bytes else 1
        shared = {name: first[name] for name in SHARED if name in first}
        return [first, *({**_BUILDERS[case.operation](case), **shared} for _ in range(count - 1))]


def nbytes(inputs: Inputs) -> int:
    """Of all tensors and of a layer's weights."""
    weights = inputs["layer"].parameters() if "layer" in inputs else ()
    return sum(x.nbytes for x in (*inputs.values(), *weights) if isinstance(x, Tensor))


def _prefill(case: Case) -> Inputs:
    h, hv, size_k, size_v = case.heads
    given = prefill_inputs(case.lengths, hq=h, hk=h, hv=hv, head_k=size_k, head_v=size_v, gates=case.gates, seed=None)
    inputs = with_state(given, seed=None)
    del inputs["g_space"]
    results = {"output": unwritten(inputs["v"]), "output_state": unwritten(inputs["initial_state"])}
    asked = {"output_final_state": True, "max_seqlen": max(case.lengths)}
    return {**inputs, **results, **asked, "log_g": inputs["g"], "g": inputs["g"].exp()}


def _recurrent(case: Case) -> Inputs:
    (h, hv, size_k, size_v), rows, steps = case.heads, case.batch, case.tokens
    inputs = recurrent_inputs(
        rows, steps, h=h, hv=hv, head_k=size_k, head_v=size_v, state_dtype=STATES[case.state], gates=case.gates,
        seed=None,
    )  # fmt: skip
    inputs["output"], state = unwritten(inputs["v"]), inputs["state"]
    if case.form == "K-major":
        inputs["state"] = state.mT.contiguous()
    if case.form == "slots":  # behind those that are read, one a token
        inputs["ssm_state_indices"] = torch.arange(rows, rows * (steps + 1), dtype=torch.int32).view(rows, steps)
        state = torch.cat((state, unwritten(state, rows * steps)))
    if case.form == "snapshots":
        inputs["intermediate_states_buffer"] = unwritten(state, rows, steps)
    if case.operation == "verify":
        inputs["disable_state_update"] = case.form in ("outputs", "snapshots")
    if case.operation == "verify" or case.form == "pool":
        slots = torch.arange(rows, dtype=torch.int32)
        inputs |= {"state": None, "initial_state": state, "initial_state_indices": slots}
    return inputs


def _conv(case: Case) -> Inputs:
    width, channels, rows = 4, case.heads.conv_dim, len(case.lengths)
    by_channel = case.form == "update D"
    states = normal(rows, width - 1, channels).transpose(1, 2) if by_channel else normal(rows, channels, width - 1)
    x, weight = normal(sum(case.lengths), channels), normal(channels, width)
    packed = {"cu_seqlens": cu_seqlens(case.lengths), "has_initial_state": None} if case.form == "prefill" else {}
    return {"x": x, "conv_states": states, "weight": weight, "state_indices": None, **packed}


def _norm(case: Case) -> Inputs:
    shape = (case.batch, case.heads.hv, case.heads.v)
    return {"x": normal(*shape), "z": normal(*shape), "weight": normal(case.heads.v), "eps": 1e-6}


def _in_pool(case: Case) -> tuple[GatedDeltaNetConfig, LayerState]:
    """The case's layer, interleaved, and a state for each of its rows."""
    h, hv, k, v = case.heads
    _, hidden = MODELS.get(case.heads, NO_MODEL)
    config = GatedDeltaNetConfig(hidden_size=hidden, num_k_heads=h, num_v_heads=hv, head_k_dim=k, head_v_dim=v)
    device, bf16, dtype = torch.get_default_device(), torch.bfloat16, STATES.get(case.state, torch.float32)
    pool = StatePool(config, layers=1, slots=len(case.lengths), conv_dtype=bf16, state_dtype=dtype, device=device)
    state = pool.layer(0)
    state.conv.normal_()
    state.recurrent.normal_().mul_(k**-0.5)
    return config, state


def _step(case: Case) -> Inputs:
    config, state = _in_pool(case)
    wide = normal(case.batch, config.conv_dim + config.value_dim), normal(case.batch, 2 * config.num_v_heads)
    heads, raw = Projected(config, wide).heads, raw_gates(case.gates, case.batch, config.num_v_heads)
    heads.a.copy_(raw["a"].view_as(heads.a))
    return {
        **heads._asdict(), "conv_states": state.conv, "conv_weight": normal(config.conv_dim, config.conv_width),
        "state": state.recurrent, "A_log": raw["A_log"], "dt_bias": raw["dt_bias"], "tickets": state.tickets,
        "norm_weight": normal(config.head_v_dim), "state_indices": torch.arange(case.batch, dtype=torch.int32),
        "output": torch.full((case.batch, config.num_v_heads, config.head_v_dim), torch.nan, dtype=torch.bfloat16),
        "eps": 1e-6,
    }  # fmt: skip


def _layer(case: Case) -> Inputs:
    """A layer with weights of its own, states in a pool, and a step that goes on from them."""
    config, state = _in_pool(case)
    layer = GatedDeltaNetAttention(config).to(torch.bfloat16).requires_grad_(False)
    x = normal(sum(case.lengths), config.hidden_size)
    batch = GatedDeltaNetBatch.build([Row(n, slot) for slot, n in enumerate(case.lengths)], device=x.device)
    found = {"layer": layer, "batch": batch, "layer_state": state, "hidden": x, "recurrent": state.recurrent}
    if case.form.endswith(" core"):
        found |= {"projected": layer.project(x), "output": x.new_empty(len(x), config.num_v_heads, config.head_v_dim)}
    return found


_BUILDERS = {
    "prefill": _prefill, "decode": _recurrent, "verify": _recurrent, "step": _step, "conv": _conv, "norm": _norm,
    "layer": _layer,
}  # fmt: skip
