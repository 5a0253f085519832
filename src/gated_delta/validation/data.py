"""Checked mode: what only the values on the device can tell. Every check waits for the device."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from gated_delta.errors import DataError
from gated_delta.library import CausalConv1d, CausalConv1dUpdate, GatedDeltaNetStep, Prefill, Recurrent, is_live

CHECKED: ContextVar[bool] = ContextVar("gated_delta_checked", default=os.environ.get("GATED_DELTA_CHECK", "0") == "1")


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within this context every operator also checks the values of its tensors: slots in range and not written
    twice, ``cu_seqlens`` rising from 0, gates in their range. It synchronises with the device, so it is for finding
    faults, not for serving. ``GATED_DELTA_CHECK=1`` in the environment turns it on for the whole process; traced
    code (torch.compile) is never checked.

    Raises :class:`gated_delta.errors.DataError` from the operator that finds a fault.
    """
    token = CHECKED.set(enabled)
    try:
        yield
    finally:
        CHECKED.reset(token)


def is_checked() -> bool:
    return not torch.compiler.is_compiling() and CHECKED.get()


def prefill(call: Prefill, max_seqlen: int | None) -> None:
    """``chunk_gated_delta_rule``."""
    where, last = "chunk_gated_delta_rule", int(call.cu_seqlens[-1])  # what stands behind it is padding
    cu_seqlens(where, call.cu_seqlens, call.q.shape[0], max_seqlen)
    if call.g is not None and last:
        low, high = float(call.g[:last].min()), float(call.g[:last].max())
        if not call.log_gates and not (low >= 0 and high <= 1):
            must = 'in [0, 1] with g_space="linear" (if these are logarithms, pass g_space="log")'
            raise DataError(where, "g", f"between {low:g} and {high:g}", must)
        if call.log_gates:
            _logarithms(where, "g", high, 'with g_space="log" (if this is alpha itself, pass g_space="linear")')
    if call.beta is not None and not bool(call.beta[:last].isfinite().all()):
        raise DataError(where, "beta", "not finite somewhere", "finite")
    slots(where, "state_indices", call.state_indices, call.source, call.null_slot)
    slots(where, "state_indices", call.state_indices, call.final_state, call.null_slot, written=True)
    if call.checkpoints is None or call.checkpoint_starts is None:
        return
    rows, needed = len(call.checkpoints), call.cu_seqlens.diff().div(call.checkpoint_every, rounding_mode="floor")
    bounds = itertools.pairwise(call.checkpoint_starts.tolist())
    for i, ((first, behind), count) in enumerate(zip(bounds, needed.tolist(), strict=True)):
        if first < 0 or first + count > min(behind, rows):
            must = f"room for {count} checkpoints of sequence {i} within {rows} rows"
            raise DataError(where, f"checkpoint_cu_starts[{i}:{i + 2}]", f"{first} to {behind}", must)


def _logarithms(where: str, name: str, high: float, because: str) -> None:
    if not high <= 0:
        raise DataError(where, name, f"as high as {high:g}", f"at most 0 {because}")


def recurrent(where: str, call: Recurrent) -> None:
    """Decode and several tokens. Rows of padding write nothing, whatever their other indices say."""
    live = slice(None) if call.read_slots is None else is_live(call.read_slots, call.null_slot)
    if call.A_log is None and call.a[live].numel():
        _logarithms(where, "a", float(call.a[live].max()), "without A_log (log alpha)")
    if call.read_slots is None:
        return
    slots(where, "initial_state_indices", call.read_slots, call.state, call.null_slot)
    named = {"output_state_indices": call.write_slots, "ssm_state_indices": call.token_slots}
    if call.update_state and call.write_slots is None:
        named["initial_state_indices"] = call.read_slots
    columns = []
    for name, indices in named.items():
        if indices is not None:
            slots(where, name, indices[live], call.state, call.null_slot, written=True)
            columns.append(indices[live] if indices.dim() == 2 else indices[live, None])
    if columns:
        _races(where, call.read_slots[live].tolist(), torch.cat(columns, dim=1).tolist(), call.null_slot)


def _races(where: str, reads: list[int], writes: list[list[int]], null_slot: int) -> None:
    """A slot that one row writes and another row writes too, or reads."""
    writer: dict[int, int] = {}
    for row, own in enumerate(writes):
        for slot in own:
            if slot >= 0 and slot != null_slot and writer.setdefault(slot, row) != row:
                must = "written by one row only"
                raise DataError(where, "a slot", f"{slot}, written by rows {writer[slot]} and {row}", must)
    for row, slot in enumerate(reads):
        if writer.get(slot, row) != row:
            was = f"{slot}, read by row {row} and written by row {writer[slot]}"
            raise DataError(where, "a slot", was, "written by no other row than the one that reads it")


def cu_seqlens(where: str, starts: Tensor, total: int, max_seqlen: int | None = None) -> None:
    values = starts.tolist()
    if values[0] != 0:
        raise DataError(where, "cu_seqlens[0]", values[0], "0")
    for i, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise DataError(where, f"cu_seqlens[{i + 1}]", end, f"at least cu_seqlens[{i}] = {start}")
        if max_seqlen is not None and end - start > max_seqlen:
            raise DataError(where, "max_seqlen", max_seqlen, f"at least {end - start}, the length of sequence {i}")
    if values[-1] > total:
        raise DataError(where, f"cu_seqlens[{len(values) - 1}]", values[-1], f"at most the {total} packed tokens")


def slots(
    where: str, name: str, indices: Tensor | None, pool: Tensor | None, null_slot: int, *, written: bool = False
) -> None:
    """Slots to read or write: in range, and if written none named twice (two rows that write one slot race)."""
    if indices is None or pool is None:
        return
    beyond = indices[(indices >= pool.shape[0]) & (indices != null_slot)]
    if beyond.numel():
        raise DataError(where, name, f"{int(beyond[0])} somewhere", f"below {pool.shape[0]}, the slots of the pool")
    values, counts = indices[is_live(indices, null_slot)].unique(return_counts=True)
    if written and (counts > 1).any():
        slot = int(values[counts > 1][0])
        raise DataError(where, name, f"{slot} more than once", "different for every row that writes")


def conv(where: str, call: CausalConv1d | CausalConv1dUpdate) -> None:
    """``causal_conv1d`` and ``causal_conv1d_update``."""
    if call.cu_seqlens is not None:
        cu_seqlens(where, call.cu_seqlens, call.x.shape[0])
    slots(where, "state_indices", call.state_indices, call.conv_states, call.null_slot, written=True)
    if isinstance(call, CausalConv1dUpdate):
        accepted(where, call, call.conv_states.shape[-1], call.weight.shape[1], call.state_indices)


def step(call: GatedDeltaNetStep) -> None:
    """``gated_delta_net_step``."""
    where, width, indices = "gated_delta_net_step", call.conv_weight.shape[1], call.state_indices
    slots(where, "state_indices", indices, call.state, call.null_slot, written=True)
    if call.cu_seqlens is not None:
        cu_seqlens(where, call.cu_seqlens, len(call.q))
        accepted(where, call, min(call.conv_states.shape[-1], width + indices.shape[1] - 2), width, indices[:, 0])


def accepted(
    where: str, call: CausalConv1dUpdate | GatedDeltaNetStep, columns: int, width: int, state_indices: Tensor | None
) -> None:
    """``num_accepted_tokens`` and ragged lengths against the columns of a speculative convolution window."""
    counts, lengths = call.num_accepted_tokens, None if call.cu_seqlens is None else call.cu_seqlens.diff()
    if counts is None:
        return
    most = columns - width + 2
    if state_indices is not None:
        live = is_live(state_indices, call.null_slot)
        counts, lengths = counts[live], None if lengths is None else lengths[live]
    if counts.numel():
        low, high = int(counts.min()), int(counts.max())
        if low < 1 or high > most:
            must = f"in [1, {most}] for a window of {columns} columns and a width of {width}"
            raise DataError(where, "num_accepted_tokens", f"between {low} and {high}", must)
        if lengths is not None and int(lengths.max()) > most:
            must = f"such that no row has more than {most} tokens (a window of {columns} columns)"
            raise DataError(where, "cu_seqlens", f"a row of {int(lengths.max())} tokens", must)
