"""GatedDeltaNetBatch.build: every field of hand-worked batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gated_delta.batch import GatedDeltaNetBatch, Row, SpecRow

COUNTS = (
    "num_prefills", "num_prefill_tokens", "num_decodes", "num_decode_tokens", "num_spec_decodes",
    "num_spec_decode_tokens", "num_actual_tokens",
)  # fmt: skip

EXAMPLES: dict[str, tuple[Sequence[Row | SpecRow], int, tuple[int, ...], dict[str, Any]]] = {
    "decodes": (
        [Row(1, 7), Row(1, 2), Row(1, 0)], 0, (0, 0, 3, 3, 0, 0, 3),
        {
            "has_initial_state": [True, True, True],
            "non_spec_query_start_loc": [0, 1, 2, 3],
            "non_spec_state_indices": [7, 2, 0],
        },
    ),
    "prefills": (
        [Row(5, 3, fresh=True), Row(2, 1), Row(1, 4, fresh=True)], 0, (3, 8, 0, 0, 0, 0, 8),
        {
            "has_initial_state": [False, True, False],
            "non_spec_query_start_loc": [0, 5, 7, 8],
            "non_spec_state_indices": [3, 1, 4],
        },
    ),
    "decodes, then prefills": (
        [Row(1, 9), Row(1, 8), Row(4, 6, fresh=True), Row(3, 2)], 3, (2, 7, 2, 2, 0, 0, 9),
        {
            "has_initial_state": [True, True, False, True],
            "non_spec_query_start_loc": [0, 1, 2, 6, 9],
            "non_spec_state_indices": [9, 8, 6, 2],
        },
    ),
    "speculation only": (
        [SpecRow(3, [4, 5, 6], 2), SpecRow(1, [1, 2, 3], 3)], 2, (0, 0, 0, 0, 2, 4, 4),
        {
            "has_initial_state": [],
            "non_spec_query_start_loc": [0],
            "non_spec_state_indices": [],
            "spec_query_start_loc": [0, 3, 4],
            "spec_state_indices": [[4, 5, 6], [1, 2, 3]],
            "spec_token_index": [0, 1, 2, 3],
            "non_spec_token_index": [],
            "num_accepted_tokens": [2, 3],
        },
    ),
    "speculation between a prefill and a single token": (
        [Row(3, 9, fresh=True), SpecRow(2, [4, 5], 1), Row(1, 8), SpecRow(1, [6, 7, 1], 3)], 3, (2, 4, 0, 0, 2, 3, 7),
        {
            "has_initial_state": [False, True],
            "non_spec_query_start_loc": [0, 3, 4],
            "non_spec_state_indices": [9, 8],
            "spec_query_start_loc": [0, 2, 3],
            "spec_state_indices": [[4, 5, -1, -1], [6, 7, 1, -1]],
            "spec_token_index": [3, 4, 6],
            "non_spec_token_index": [0, 1, 2, 5],
            "num_accepted_tokens": [1, 3],
        },
    ),
    "nothing": (
        [], 0, (0,) * 7,
        {"has_initial_state": [], "non_spec_query_start_loc": [0], "non_spec_state_indices": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_field(name: str) -> None:
    rows, num_spec, counts, wanted = EXAMPLES[name]
    fields = vars(GatedDeltaNetBatch.build(rows, num_spec=num_spec))
    assert tuple(fields.pop(count) for count in COUNTS) == counts
    assert {key: x.tolist() for key, x in fields.items() if x is not None} == wanted
    for key, x in fields.items():
        if isinstance(x, Tensor):
            assert x.dtype == (torch.bool if key == "has_initial_state" else torch.int32), key


def test_a_batch_is_built_on_the_device_that_was_named() -> None:
    batch = GatedDeltaNetBatch.build([Row(2, 1), SpecRow(1, [2], 1)], num_spec=1, device="meta")
    assert {x.device.type for x in vars(batch).values() if isinstance(x, Tensor)} == {"meta"}


def test_a_batch_does_not_change() -> None:
    batch = GatedDeltaNetBatch.build([Row(1, 0)])
    with pytest.raises(AttributeError):
        batch.num_decodes = 2  # pyright: ignore[reportAttributeAccessIssue]
