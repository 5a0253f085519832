"""Tensor parallelism: the heads that a rank has, its part of every weight, and how it gets that from a checkpoint.

A rank has every ``size``-th part of the key heads and the value heads that belong to them. Weights whose rows are
blocks (q, k, v, z side by side) are cut block by block; one whose rows are grouped by key head is cut between groups.
The output projection is cut along its inputs, so the ranks' outputs are summed: one all-reduce a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import GradientError, OptionError, ShapeError

if TYPE_CHECKING:
    from gated_delta.layer import GatedDeltaNetAttention

WHERE = "load_weights"


class Parallel(NamedTuple):
    """Place of this process among those that share a layer's heads."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """What sums the outputs. Without one a layer returns its own share, and the caller adds the others'."""

    @staticmethod
    def of(group: dist.ProcessGroup | None = None) -> Parallel:
        """The caller's place in ``group``, or in all that torch.distributed was started with.

        Raises:
            OptionError: torch.distributed was not started, or the caller is not in ``group``.
        """
        group = group or dist.group.WORLD
        rank = dist.get_rank(group) if group else -1
        if rank < 0:
            was = "None, and torch.distributed was not started" if group is None else "one without this process"
            raise OptionError("Parallel.of", "group", was, "a process group that has this process in it")
        return Parallel(rank, dist.get_world_size(group), group)

    def total(self, output: Tensor) -> Tensor:
        """The sum of what all ranks give, in place.

        Raises:
            GradientError: ``output`` is part of a graph, through which no gradient would find the other ranks.
        """
        if self.size == 1 or self.group is None:
            return output
        if output.requires_grad:
            must = "computed under torch.no_grad(): a layer that ranks share has no gradient"
            raise GradientError("GatedDeltaNetAttention", "output", "a tensor that requires grad", must)
        dist.all_reduce(output, group=self.group)
        return output

    def gathered(self, x: Tensor) -> Tensor:
        """What all ranks give, ``[size, ...]``: contiguous, and of one shape."""
        every = x.new_empty(self.size, *x.shape)
        dist.all_gather([*every], x, group=self.group)
        return every


class Home(NamedTuple):
    """Where a checkpoint may keep something: rows from ``first`` on, of ``total``, of this weight."""

    name: str
    first: int
    total: int


class Part(NamedTuple):
    """So many rows of a weight (of the whole model's), cut evenly among the ranks."""

    rows: int
    homes: tuple[Home, ...]


def load_weights(
    layer: GatedDeltaNetAttention, source: Mapping[str, Tensor] | str | Path | Sequence[str | Path], prefix: str = ""
) -> None:
    """Fill a layer with its part of a checkpoint, of which no more than that is read.

    Names are those of Qwen3-Next, Qwen3.5 or OLMo-hybrid; a "merged" layer takes the weights of a "flat" one. Modules
    that were put in a projection's place are left alone.

    Args:
        layer: on any device, in any dtype.
        source: tensors by name, or safetensors files.
        prefix: what stands before every name, such as ``"model.layers.0.linear_attn."``.

    Raises:
        OptionError: a weight is missing, or safetensors is needed and not installed.
        ShapeError: a weight has another shape than the whole model's. Nothing has been loaded then.
    """
    all_parts, own = _parts(layer.whole_config), layer.parallel
    with ExitStack() as stack:
        weights = _opened(source, stack)
        copies = []
        for name, weight in layer.named_parameters():
            dim, at = int(name == "out_proj.weight"), 0
            for part in all_parts.get(name, []):
                home = _find(part, weights, weight, dim, prefix)
                share, rank = (part.rows, 0) if name == "norm.weight" else (part.rows // own.size, own.rank)
                first = home.first + rank * share
                copies.append((weight.detach().narrow(dim, at, share), prefix + home.name, dim, first, first + share))
                at += share
        for target, name, dim, first, last in copies:
            target.copy_(weights[name][first:last] if dim == 0 else weights[name][:, first:last])


def _parts(c: GatedDeltaNetConfig) -> dict[str, list[Part]]:
    """What each weight consists of, in order."""
    heads = c.num_v_heads

    def joined(whole: str, apart: str) -> list[Part]:
        blocks = ("q", 0, c.key_dim), ("k", c.key_dim, c.key_dim), ("v", 2 * c.key_dim, c.value_dim)
        return [
            Part(rows, (Home(whole, first, c.conv_dim), Home(apart.format(name), 0, rows)))
            for name, first, rows in blocks
        ]

    def alone(rows: int, *names: str) -> list[Part]:
        return [Part(rows, tuple(Home(name, 0, rows) for name in names))]

    qkv = joined("in_proj_qkv.weight", "{}_proj.weight")
    z = alone(c.value_dim, "in_proj_z.weight", "g_proj.weight")
    b, a = (alone(heads, f"in_proj_{x}.weight", f"{x}_proj.weight") for x in "ba")
    layouts = {
        "interleaved": {
            "in_proj_qkvz.weight": alone(c.conv_dim + c.value_dim, "in_proj_qkvz.weight"),
            "in_proj_ba.weight": alone(2 * heads, "in_proj_ba.weight"),
        },
        "flat": {"in_proj_qkv.weight": qkv, "in_proj_z.weight": z, "in_proj_b.weight": b, "in_proj_a.weight": a},
        "merged": {"in_proj_qkvz.weight": qkv + z, "in_proj_ba.weight": b + a},
    }  # fmt: skip
    return {
        **layouts[c.projection],
        "conv1d.weight": joined("conv1d.weight", "{}_conv1d.weight"),
        "A_log": alone(heads, "A_log"),
        "dt_bias": alone(heads, "dt_bias"),
        "norm.weight": alone(c.head_v_dim, "norm.weight", "o_norm.weight"),
        "out_proj.weight": alone(c.value_dim, "out_proj.weight", "o_proj.weight"),
    }


def _find(part: Part, weights: Mapping[str, Any], weight: Tensor, dim: int, prefix: str) -> Home:
    for home in part.homes:
        found = weights.get(prefix + home.name)
        if found is not None:
            shape = tuple(found.shape if isinstance(found, Tensor) else found.get_shape())
            wanted = (*weight.shape[:dim], home.total, *weight.shape[dim + 1 :])
            if shape != wanted:
                raise ShapeError(WHERE, prefix + home.name, f"of shape {list(shape)}", f"of shape {list(wanted)}")
            return home
    names = " or ".join(prefix + home.name for home in part.homes)
    raise OptionError(WHERE, names, "missing", "in the checkpoint")


def _opened(source: Mapping[str, Tensor] | str | Path | Sequence[str | Path], stack: ExitStack) -> Mapping[str, Any]:
    """Tensors, or slices of files that are read when they are indexed."""
    if isinstance(source, Mapping):
        return source
    weights: dict[str, Any] = {}
    for path in [source] if isinstance(source, (str, Path)) else source:
        file = stack.enter_context(opened_file(WHERE, "source", path))
        weights |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return weights


def opened_file(where: str, argument: str, path: str | Path) -> Any:
    """A safetensors file, open.

    Raises:
        OptionError: safetensors is not installed, or ``path`` is no safetensors file.
    """
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise OptionError(where, "safetensors", "not installed", 'installed: pip install "gated-delta[cli]"') from error
    if not Path(path).is_file():
        raise OptionError(where, argument, str(path), "an existing safetensors file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OptionError(where, argument, f"{path} ({error})", "a safetensors file") from error
