"""What a first look over the operators accepted or answered with a raw error: each is refused in words now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gated_delta as gd
from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow
from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import BackendError, DataError, DtypeError, LayoutError, OptionError, ShapeError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.model.generation import Options
from gated_delta.model.network import HybridConfig, Session, load_model, weights_facts
from gated_delta.state import StatePool
from gated_delta.testing.inputs import prefill_inputs, recurrent_inputs

SHARED = "a view whose rows share memory; it must be memory of its own: it is written"


def prefill(**changes: Any) -> object:
    return gd.chunk_gated_delta_rule(**{**prefill_inputs([5, 3]), **changes})


def decode(**changes: Any) -> object:
    return gd.gated_delta_rule_decode_pretranspose(**{**recurrent_inputs(3), **changes})


def mtp(**changes: Any) -> object:
    inputs = recurrent_inputs(3, 2)
    pool = torch.zeros(7, 4, 64, 64)
    del inputs["state"]
    given = {"initial_state": pool, "initial_state_indices": torch.arange(3), "disable_state_update": False}
    return gd.gated_delta_rule_mtp(**{**inputs, **given, **changes})


def config(**changes: Any) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(**{"hidden_size": 64, "num_k_heads": 2, "num_v_heads": 4, **changes})


def shared(*shape: int) -> torch.Tensor:
    return torch.zeros(1, *shape[1:]).expand(shape)


PREFILL_ONLY = "it serves chunk_gated_delta_rule and nothing else"
ONE_OPERATOR = "it serves gated_delta_net_step, which it makes of other operators, and nothing else"
HEADS = "such that HQ = HK divides HV (grouped values) or HK = HV divides HQ (grouped queries)"
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "shared state": (lambda: decode(state=shared(3, 4, 64, 64)), LayoutError, f"state is {SHARED}"),
    "shared pool": (lambda: mtp(initial_state=shared(7, 4, 64, 64)), LayoutError, f"initial_state is {SHARED}"),
    "shared output": (lambda: prefill(output=shared(8, 4, 64)), LayoutError, f"output is {SHARED}"),
    "shared final": (lambda: prefill(output_state=shared(2, 4, 64, 64)), LayoutError, f"output_state is {SHARED}"),
    "no value heads": (
        lambda: prefill(v=torch.zeros(8, 0, 64).bfloat16(), g=None, beta=None),
        ShapeError, f"(HQ, HK, HV) is (2, 2, 0); it must be {HEADS}",
    ),
    "no value heads in decode": (
        lambda: decode(v=torch.zeros(3, 1, 0, 64).bfloat16()),
        ShapeError, "v is of 0 heads; it must be of a multiple of the 2 heads of q and k",
    ),
    "no slots": (
        lambda: mtp(initial_state_indices=None),
        OptionError, "initial_state_indices is None; it must be given: initial_state is a pool",
    ),
    "norm flag": (
        lambda: prefill(use_qk_l2norm_in_kernel="no"),
        DtypeError, "use_qk_l2norm_in_kernel is a str; it must be True or False",
    ),
    "final flag": (
        lambda: prefill(output_final_state=1), DtypeError, "output_final_state is a int; it must be True or False"
    ),
    "decode flags": (
        lambda: decode(use_qk_l2norm=None), DtypeError, "use_qk_l2norm is a NoneType; it must be True or False"
    ),
    "eigenvalue flag": (
        lambda: decode(allow_neg_eigval="no"), DtypeError, "allow_neg_eigval is a str; it must be True or False"
    ),
    "update flag": (
        lambda: decode(disable_state_update="no"),
        DtypeError, "disable_state_update is a str; it must be True or False",
    ),
    "mtp update flag": (
        lambda: mtp(disable_state_update=1), DtypeError, "disable_state_update is a int; it must be True or False"
    ),
    "scale": (lambda: prefill(scale=float("nan")), OptionError, "scale is nan; it must be a finite number"),
    "eps": (
        lambda: gd.rms_norm_gated(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), -1.0),
        OptionError, "eps is -1.0; it must be at least 0",
    ),
    "slot": (
        lambda: mtp(null_slot=2**70), OptionError, f"null_slot is {2**70}; it must be below 2**63"
    ),
    "device": (
        lambda: gd.explain("rms_norm_gated", device="foo"),
        BackendError, "device is 'foo'; it must be a device that torch knows",
    ),
    "config heads": (lambda: config(num_k_heads=0), OptionError, "num_k_heads is 0; it must be at least 1"),
    "config size": (
        lambda: config(head_k_dim=33), OptionError, "head_k_dim is 33; it must be one of 32, 64, 96, 128, 192, 256"
    ),
    "config width": (lambda: config(conv_width=7), OptionError, "conv_width is 7; it must be 2 to 5"),
    "drafts": (
        lambda: GatedDeltaNetBatch.build([Row(1, 0)], num_spec=-1),
        OptionError, "num_spec is -1; it must be at least 0",
    ),
    "speculative rows": (
        lambda: GatedDeltaNetBatch.build([SpecRow(1, [0], 1)]),
        OptionError, "num_spec is 0; it must be at least 1 with speculative rows",
    ),
    "temperature": (
        lambda: Options(temperature=1e-320),
        OptionError, "temperature is 1e-320; it must be 0 (greedy), or in [0.01, 100]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).endswith(message)


def test_an_unread_token_of_a_step_is_kept_once() -> None:
    session = Session(HybridConfig())
    with pytest.raises(OptionError, match=r"tokens is 0; it must be in \[1, 0\]"):
        session.keep(0)
    session.begin(3)
    session.keep(3)
    with pytest.raises(OptionError, match=r"tokens is 3; it must be in \[1, 0\]"):
        session.keep(3)


@pytest.mark.parametrize("read", [load_model, weights_facts])
def test_weights_that_are_none(read: Callable[..., object], tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing", tmp_path / "broken"
    broken.write_bytes(b"not safetensors")
    with pytest.raises(OptionError, match="missing; it must be an existing safetensors file"):
        read(path=missing)
    with pytest.raises(OptionError, match=r"broken .*; it must be a safetensors file"):
        read(path=broken)


@pytest.mark.parametrize("starts", [[0, 5, 3], [0, 5, 9], [0, 8, 0]])
def test_wrong_starts_never_write_outside_their_tensors(starts: list[int]) -> None:
    """Undefined without checked mode, but not undefined enough to corrupt the process."""
    states = torch.zeros(2, 6, 3)
    for _ in range(50):
        try:
            gd.causal_conv1d(
                torch.ones(8, 6), torch.ones(6, 4), conv_states=states, cu_seqlens=torch.tensor(starts),
                state_indices=None, has_initial_state=None,
            )  # fmt: skip
        except (RuntimeError, IndexError):
            continue


RACES = {
    "a slot for two rows": ({"ssm_state_indices": [[3, 4], [4, 5], [6, -1]]}, "4 more than once"),
    "token and final": (
        {"ssm_state_indices": [[3, 4], [-1, -1], [-1, -1]], "output_state_indices": [-1, 4, -1]},
        "4, written by rows 0 and 1",
    ),
    "read by another": (
        {"output_state_indices": [1, 5, 6]}, "1, read by row 1 and written by row 0"
    ),
}  # fmt: skip
HARMLESS = {
    "rows of padding": {"initial_state_indices": [-1, 1, 2], "output_state_indices": [3, 3, 2]},
    "tokens of padding": {"initial_state_indices": [-1, 1, 2], "ssm_state_indices": [[1, 1], [3, 4], [5, 6]]},
    "null slot": {"initial_state_indices": [0, 0, 2], "null_slot": 0},
    "null slot behind the pool": {"initial_state_indices": [9, 1, 2], "null_slot": 9},
}


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(x) if isinstance(x, list) else x for name, x in given.items()}


@pytest.mark.parametrize(("given", "message"), RACES.values(), ids=RACES.keys())
def test_races_are_found(given: dict[str, Any], message: str) -> None:
    with gd.checked(), pytest.raises(DataError, match=message):
        mtp(**tensors(given))


@pytest.mark.parametrize("given", HARMLESS.values(), ids=HARMLESS.keys())
def test_padding_is_not_blamed(given: dict[str, Any]) -> None:
    with gd.checked():
        mtp(**tensors(given))


def test_gates_behind_the_last_sequence_are_not_read() -> None:
    inputs = prefill_inputs([5, 3])
    inputs["g"][6:], inputs["beta"][6:] = torch.nan, torch.nan
    with gd.checked():
        gd.chunk_gated_delta_rule(**{**inputs, "cu_seqlens": torch.tensor([0, 4, 6])})


def test_no_backend_is_said_before_values_are_read() -> None:
    x = torch.ones(2, 4, device="meta")
    with gd.checked(), pytest.raises(BackendError):
        gd.causal_conv1d(
            x, torch.ones(4, 4, device="meta"), conv_states=None, cu_seqlens=torch.ones(2, device="meta").int(),
            state_indices=None, has_initial_state=None,
        )  # fmt: skip


def test_a_batch_wider_than_the_pool_is_refused() -> None:
    layer = GatedDeltaNetAttention(config(head_k_dim=32, head_v_dim=32)).requires_grad_(False)
    state = StatePool(layer.config, layers=1, slots=5, num_spec=1).layer(0)
    batch = GatedDeltaNetBatch.build([SpecRow(2, [0, 1, 2, 3, 4], 1)], num_spec=4)
    with pytest.raises(ShapeError, match=r"spec_state_indices is of 5 columns; it must be of at most 2"):
        layer(torch.zeros(2, 64), batch, state)


def test_a_decode_without_history_is_found() -> None:
    layer = GatedDeltaNetAttention(config(head_k_dim=32, head_v_dim=32)).requires_grad_(False)
    state = StatePool(layer.config, layers=1, slots=1).layer(0)
    batch = replace(GatedDeltaNetBatch.build([Row(1, 0)]), has_initial_state=torch.tensor([False]))
    with gd.checked(), pytest.raises(DataError, match="has_initial_state is False for a decode"):
        layer(torch.zeros(1, 64), batch, state)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float64}, "it serves bfloat16 or float16 or float32, and this is float64"),
        ({"head_k": 7}, "it serves head sizes 32, 64, 96, 128, 192, 256, and these are K=7, V=128"),
    ],
)
def test_explain_knows_what_is_not_served(facts: dict[str, Any], reason: str) -> None:
    found = gd.explain("gated_delta_rule_mtp", **facts)
    others = {"gluon": PREFILL_ONLY, "separate": ONE_OPERATOR}
    assert (found.chosen, found.reasons) == (None, {"cpu": reason, "triton": reason, **others})
