"""What a step holds: which tokens belong to which sequence, and which slots these read and write."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gated_delta.errors import DataError, OptionError
from gated_delta.library import slot_number
from gated_delta.validation import data
from gated_delta.validation.arguments import INDICES, Arguments


@dataclass(frozen=True)
class Row:
    """``tokens`` new tokens of a sequence whose state is in ``slot``; ``fresh`` if it has no history yet."""

    tokens: int
    slot: int
    fresh: bool = False


@dataclass(frozen=True)
class SpecRow:
    """The last sampled token and its drafts, ``tokens`` in all, of a speculating sequence.

    ``slots[j]`` receives the state after token j; ``accepted`` tokens of the previous step (the sampled one included)
    were kept, so ``slots[accepted - 1]`` holds the state to go on from. After a prefill: 1, the prefill's slot first.
    """

    tokens: int
    slots: Sequence[int]
    accepted: int


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetBatch:
    """Metadata of one step, shared by all layers; tensors are int32 on the device unless they say otherwise.

    Without speculative rows, decodes (one token, with history) come first, then prefills. With them, every other row
    counts as a prefill, and tokens stand anywhere: the two index tensors say where. Tokens behind
    ``num_actual_tokens`` are padding.

    Raises:
        OptionError: counts that contradict each other, or rows without their tensors.
        ShapeError: a tensor that does not fit the counts.
        DtypeError: one that is no index. DeviceError: one on another device than the rest.
    """

    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_decodes: int = 0
    num_decode_tokens: int = 0
    num_spec_decodes: int = 0
    num_spec_decode_tokens: int = 0
    num_actual_tokens: int
    has_initial_state: Tensor | None = None
    """bool ``[non-spec rows]``; True for decodes, whose slots are always read"""
    non_spec_query_start_loc: Tensor | None = None
    """``[non-spec rows + 1]``"""
    non_spec_state_indices: Tensor | None = None
    """``[non-spec rows]``"""
    spec_query_start_loc: Tensor | None = None
    """``[spec rows + 1]``"""
    spec_state_indices: Tensor | None = None
    """``[spec rows, num_spec + 1]``; -1 where a row has no such token"""
    spec_token_index: Tensor | None = None
    """``[spec tokens]``"""
    non_spec_token_index: Tensor | None = None
    """``[non-spec tokens]``"""
    num_accepted_tokens: Tensor | None = None
    """``[spec rows]``, at least 1"""

    def __post_init__(self) -> None:
        args = Arguments("GatedDeltaNetBatch")
        rows, spec = self.num_decodes + self.num_prefills, self.num_spec_decodes
        for name, count in vars(self).items():
            if name.startswith("num_") and isinstance(count, int):
                args.whole(name, count, least=0)
        if self.num_decode_tokens != self.num_decodes:
            must = f"num_decodes={self.num_decodes}, a token each"
            raise OptionError(args.where, "num_decode_tokens", self.num_decode_tokens, must)
        if spec and self.num_decodes:
            must = "0 beside speculative rows, where rows of one token count as prefills"
            raise OptionError(args.where, "num_decodes", self.num_decodes, must)
        total = self.num_row_tokens
        if total > self.num_actual_tokens:
            must = f"at least {total}, the tokens of all rows"
            raise OptionError(args.where, "num_actual_tokens", self.num_actual_tokens, must)
        args.bind("rows", rows, "num_decodes + num_prefills")
        args.bind("spec", spec, "num_spec_decodes")
        args.bind("P", total - self.num_spec_decode_tokens, "the counts of tokens")
        args.bind("S", self.num_spec_decode_tokens, "num_spec_decode_tokens")
        for needed, shapes in (
            (rows, {"non_spec_query_start_loc": "rows+1", "non_spec_state_indices": "rows"}),
            (spec, {"spec_query_start_loc": "spec+1", "spec_state_indices": "spec *", "num_accepted_tokens": "spec"}),
            (spec and rows, {"non_spec_token_index": "P", "spec_token_index": "S"}),
        ):
            for name, shape in shapes.items() if needed else ():
                args.tensor(name, getattr(self, name), shape, INDICES, any_stride=True)
        if rows:
            known = self.has_initial_state
            args.tensor("has_initial_state", known, "rows", (torch.bool,), optional=True, any_stride=True)

    @property
    def num_row_tokens(self) -> int:
        """Tokens that belong to rows."""
        return self.num_decode_tokens + self.num_prefill_tokens + self.num_spec_decode_tokens

    def judge_slots(self, pool: Tensor, null_slot: int | None) -> None:
        """In checked mode: the slots of all rows, before the first is written, and that decodes have a history: a
        one-token row that starts a sequence is a prefill, for the one-token operator reads whatever the slot holds.
        """
        where = "GatedDeltaNetAttention"
        for name in ("non_spec_state_indices", "spec_state_indices"):
            data.slots(where, name, getattr(self, name), pool, slot_number(null_slot), written=True)
        if self.has_initial_state is not None and not bool(self.has_initial_state[: self.num_decodes].all()):
            must = "True for every decode (a fresh row is a prefill, of one token too)"
            raise DataError(where, "has_initial_state", "False for a decode", must)

    @classmethod
    def build(
        cls, rows: Sequence[Row | SpecRow], *, num_spec: int = 0, device: torch.device | str = "cpu"
    ) -> "GatedDeltaNetBatch":
        """Describe ``rows`` whose tokens stand in this order.

        Raises:
            OptionError: a row without tokens, a decode behind a prefill, a speculative row that does not fit
                ``num_spec`` or its own slots.
        """
        plain = [row for row in rows if isinstance(row, Row)]
        spec = [row for row in rows if isinstance(row, SpecRow)]
        _check_rows(rows, num_spec)
        if spec and not num_spec:
            raise OptionError("GatedDeltaNetBatch.build", "num_spec", 0, "at least 1 with speculative rows")
        decodes = 0 if spec else sum(_is_decode(row) for row in plain)
        if any(map(_is_decode, plain[decodes:])) and not spec:
            raise OptionError("GatedDeltaNetBatch.build", "rows", "with a decode behind a prefill", "decodes first")

        def tensor(values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        index: dict[bool, list[int]] = {False: [], True: []}
        for row, end in zip(rows, accumulate(row.tokens for row in rows), strict=True):
            index[isinstance(row, SpecRow)] += range(end - row.tokens, end)
        padded = [[*row.slots, *[-1] * (num_spec + 1 - len(row.slots))] for row in spec]
        return cls(
            num_prefills=len(plain) - decodes, num_prefill_tokens=len(index[False]) - decodes,
            num_decodes=decodes, num_decode_tokens=decodes,
            num_spec_decodes=len(spec), num_spec_decode_tokens=len(index[True]),
            num_actual_tokens=len(index[False]) + len(index[True]),
            has_initial_state=tensor([not row.fresh for row in plain], torch.bool),
            non_spec_query_start_loc=tensor([*accumulate((row.tokens for row in plain), initial=0)]),
            non_spec_state_indices=tensor([row.slot for row in plain]),
            spec_query_start_loc=tensor([*accumulate((row.tokens for row in spec), initial=0)]) if spec else None,
            spec_state_indices=tensor(padded) if spec else None,
            spec_token_index=tensor(index[True]) if spec else None,
            non_spec_token_index=tensor(index[False]) if spec else None,
            num_accepted_tokens=tensor([row.accepted for row in spec]) if spec else None,
        )  # fmt: skip


def _is_decode(row: Row) -> bool:
    return row.tokens == 1 and not row.fresh


def _check_rows(rows: Sequence[Row | SpecRow], num_spec: int) -> None:
    where = "GatedDeltaNetBatch.build"
    Arguments(where).whole("num_spec", num_spec, least=0)
    for i, row in enumerate(rows):
        name = f"rows[{i}]"
        if row.tokens < 1:
            raise OptionError(where, name, f"of {row.tokens} tokens", "of at least 1 token")
        if isinstance(row, SpecRow):
            if not row.tokens <= len(row.slots) <= num_spec + 1:
                was = f"of {row.tokens} tokens and {len(row.slots)} slots"
                raise OptionError(where, name, was, f"of a slot a token, at most num_spec + 1 = {num_spec + 1}")
            if not 1 <= row.accepted <= len(row.slots):
                must = f"in [1, {len(row.slots)}], one of its slots"
                raise OptionError(where, f"{name}.accepted", row.accepted, must)
