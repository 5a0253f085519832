"""A pool of per-sequence states: slots that requests hold while they run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import PoolError
from gated_delta.validation.arguments import FLOATS, Arguments, describe_dtypes


class LayerState(NamedTuple):
    """One layer's part of a pool, as the operators take it."""

    conv: Tensor
    """``[slots, conv_dim, W-1+num_spec]``, a view of either storage layout."""
    recurrent: Tensor
    """``[slots, HV, V, K]``"""
    null_slot: int | None
    tickets: Tensor | None = None
    """``[slots, Hk]`` int32 zeros, in which the fused step counts (gated_delta_net_step)."""


class StatePool:
    """The conv and recurrent states of ``layers`` layers in ``slots`` slots, allocated once.

    A slot is handed out as it is, not cleared: the batch says that a row is fresh instead (``has_initial_state``).

    Args:
        config: shape of every layer.
        layers: how many layers share the slots.
        slots: how many slots.
        num_spec: draft tokens a step; widens the convolution window. A speculating sequence holds ``num_spec + 1``
            slots.
        conv_dtype, state_dtype: storage of the two states, bf16, fp16 or fp32 each.
        conv_layout: "SD" stores ``[slot, column, channel]``, "DS" ``[slot, channel, column]``.
        reserve_null: keep slot 0 out of circulation and treat it as padding.

    Raises:
        OptionError: a count below its least value, or an unknown dtype or layout.
    """

    def __init__(
        self, config: GatedDeltaNetConfig, *, layers: int, slots: int, num_spec: int = 0,
        conv_dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32, conv_layout: str = "SD",
        reserve_null: bool = False, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        args = Arguments("StatePool")
        args.whole("layers", layers, least=1)
        args.whole("slots", slots, least=1 + reserve_null)
        args.whole("num_spec", num_spec, least=0)
        args.word("conv_dtype", conv_dtype, FLOATS, describe_dtypes(FLOATS))
        args.word("state_dtype", state_dtype, FLOATS, describe_dtypes(FLOATS))
        args.word("conv_layout", conv_layout, ("SD", "DS"), '"SD" or "DS"')
        columns = config.conv_width - 1 + num_spec
        stored = (columns, config.conv_dim) if conv_layout == "SD" else (config.conv_dim, columns)
        conv = torch.zeros(layers, slots, *stored, dtype=conv_dtype, device=device)
        self._conv = conv.transpose(-1, -2) if conv_layout == "SD" else conv
        shape = (layers, slots, config.num_v_heads, config.head_v_dim, config.head_k_dim)
        self._recurrent = torch.zeros(shape, dtype=state_dtype, device=device)
        self._tickets = torch.zeros(layers, slots, config.num_k_heads, dtype=torch.int32, device=device)
        self.null_slot = 0 if reserve_null else None
        self.slots, self.num_spec = slots, num_spec
        self._free = list(range(slots - 1, 0 if reserve_null else -1, -1))
        self._held: set[int] = set()

    def layer(self, index: int) -> LayerState:
        """The states of one layer."""
        return LayerState(self._conv[index], self._recurrent[index], self.null_slot, self._tickets[index])

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def bytes_per_slot(self) -> int:
        """Over all layers, both states."""
        return self._conv[:, 0].nbytes + self._recurrent[:, 0].nbytes

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` slots, or none at all.

        Raises:
            PoolError: fewer are free.
        """
        if not 0 <= count <= len(self._free):
            raise PoolError("StatePool.allocate", "count", count, f"in [0, {len(self._free)}], the slots that are free")
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back, all of them or (on an error) none.

        Raises:
            PoolError: a slot is not held, or named twice.
        """
        for slot in slots:
            if slot not in self._held or list(slots).count(slot) > 1:
                raise PoolError("StatePool.free", "slots", list(slots), f"held slots, each once: {slot} is not")
        self._held.difference_update(slots)
        self._free.extend(reversed(slots))
