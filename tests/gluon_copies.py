"""Copies of a Gluon kernel on a CPU that run beside the partition that asks for them, by threads or the engine.

What they do to shared memory is an agent's of their own (gluon_block.py), so that whatever nothing orders with it is a
race.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gluon_block import Agent, Barrier, Partition, Shared, here
from gluon_values import Pointer, Tiled


def copy_to_shared(smem: Shared, pointer: Pointer, mask: Any = True) -> None:
    copier = here.partition.copier()
    smem.memory.use(smem.data, copier, write=True)
    here.partition.copies.append((smem, pointer.load(mask).data.expand(smem.shape), copier))
    smem.data.fill_(math.nan)


def copy_tile(tensor: Tiled, place: Sequence[Any], barrier: Barrier, smem: Shared) -> None:
    """By the copy engine, which writes zeros for what lies outside of the tensor."""
    copier = here.partition.copier()
    smem.memory.use(smem.data, copier, write=True, fenced=True)
    copier.fenced[copier.name] = copier.seen[copier.name]  # as products read it
    data = torch.zeros(smem.shape, dtype=smem.data.dtype)
    inside = tensor.tile(place, smem.shape)
    data[tuple(map(slice, inside.shape))] = inside
    smem.data.fill_(math.nan)

    def land() -> None:
        smem.data.copy_(data)
        barrier.receive(copier, data.nbytes)

    here.partition.block.landing.append(land)


def store_tile(tensor: Tiled, place: Sequence[Any], smem: Shared) -> None:
    """By the copy engine, which reads while the partition goes on, and leaves out what lies outside of the tensor."""
    copier = here.partition.copier()
    smem.memory.use(smem.data, copier, write=False, fenced=True)
    target = tensor.tile(place, smem.shape).fill_(math.nan)
    here.partition.stores.append((target, smem, copier))


def store_wait(pendings: int) -> None:
    stores = here.partition.stores
    while len(stores) > pendings:
        target, smem, copier = stores.popleft()
        target.copy_(smem.data[tuple(map(slice, target.shape))])
        here.partition.agent.learn(copier)


def copies_arrive(barrier: Barrier, increment_count: bool = True) -> None:
    partition: Partition = here.partition
    threads, copies, partition.copies = 32 * partition.warps, partition.copies, []
    arrival = Agent(f"copies of {partition.agent.name}")
    if increment_count:
        barrier.pending += threads

    def land() -> None:
        for smem, data, copier in copies:
            smem.data.copy_(data)
            arrival.learn(copier)
        barrier.arrive(arrival, threads)

    partition.block.landing.append(land)
