"""Our public signatures beside FlashInfer's, parameter by parameter, and the table that docs/integrate has of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import gated_delta as gd
from gated_delta.testing.inputs import recurrent_inputs
from helpers import nans, same_bits

PAGE = Path(__file__).parents[1] / "docs" / "integrate" / "flashinfer.md"
# FlashInfer 0.7.2.post1: every parameter in its order, with its default.
THEIRS = {
    "chunk_gated_delta_rule": (
        "q k v g=None beta=None scale=None initial_state=None output_final_state=False cu_seqlens=None "
        "use_qk_l2norm_in_kernel=False output=None output_state=None state_checkpoints=None checkpoint_cu_starts=None "
        "checkpoint_every_n_tokens=0 use_cp=auto state_indices=None _cp_chunk_len=None backend=auto max_seqlen=None"
    ),
    "gated_delta_rule_decode": (
        "q k v state A_log a dt_bias b scale=None output=None use_qk_l2norm=True backend=auto"
    ),
    "gated_delta_rule_decode_pretranspose": (
        "q k v state A_log a dt_bias b scale=None output=None use_qk_l2norm=True initial_state=None "
        "initial_state_indices=None output_state_indices=None intermediate_states_buffer=None "
        "disable_state_update=False backend=auto"
    ),
    "gated_delta_rule_mtp": (
        "q k v initial_state initial_state_indices A_log a dt_bias b scale=None output=None "
        "intermediate_states_buffer=None ssm_state_indices=None disable_state_update=None use_qk_l2norm=True "
        "output_state_indices=None cache_replayssm=False replayssm_rawv=None replayssm_rawk=None replayssm_g=None "
        "replayssm_beta=None"
    ),
}  # fmt: skip


def ours(operator: str, *, keyword: bool) -> dict[str, str]:
    """Parameters of ours that are positional or not: name, and name with default as above."""
    kind = inspect.Parameter.KEYWORD_ONLY if keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [p for p in inspect.signature(getattr(gd, operator)).parameters.values() if p.kind is kind]
    return {p.name: p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters}


def theirs(operator: str) -> dict[str, str]:
    return {text.split("=")[0]: text for text in THEIRS[operator].split()}


@pytest.mark.parametrize("operator", THEIRS)
def test_positional_parameters_are_theirs_one_by_one(operator: str) -> None:
    own = [*ours(operator, keyword=False).values()]
    assert own == [*theirs(operator).values()][: len(own)]


@pytest.mark.parametrize("operator", THEIRS)
def test_what_we_take_by_keyword_has_their_default_and_must_be_optional(operator: str) -> None:
    for name, text in ours(operator, keyword=True).items():
        assert text == theirs(operator).get(name, text)
        assert "=" in text


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def test_the_page_has_the_table() -> None:
    rows = []
    for operator in THEIRS:
        there, positional, keyword = theirs(operator), ours(operator, keyword=False), ours(operator, keyword=True)
        only_there = [name for name in there if name not in positional and name not in keyword]
        only_here = [name for name in keyword if name not in there]
        moved = [name for name in there if name in keyword]
        rows.append(f"| `{operator}` | {listed(only_there)} | {listed(only_here)} | {listed(moved)} |")
    assert "\n".join(rows) in PAGE.read_text()


def test_links_of_the_pages_lead_somewhere() -> None:
    pages = [*PAGE.parent.glob("*.md")]
    assert PAGE in pages
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_page_says_what_padding_and_large_gates_do() -> None:
    inputs = recurrent_inputs(3, head_k=32, head_v=32)
    inputs["a"] = torch.full_like(inputs["a"], 3e4)
    pool = inputs.pop("state")
    before, slots = pool.clone(), torch.tensor([2, -1, 0])
    given = nans(*inputs["v"].shape, dtype=torch.bfloat16)
    options = {"state": None, "initial_state": pool, "initial_state_indices": slots}
    output, _ = gd.gated_delta_rule_decode_pretranspose(**inputs, **options, output=given)
    assert output is given
    assert output[[0, 2]].isfinite().all()
    assert output[1].isnan().all()
    assert same_bits(pool[1], before[1])
    assert (pool[[0, 2]] != before[[0, 2]]).any()
    pool.copy_(before)
    output, _ = gd.gated_delta_rule_decode_pretranspose(**inputs, **options)
    assert (output[1] == 0).all()
