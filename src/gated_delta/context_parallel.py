"""Context parallelism: a rank has a contiguous part of one sequence, and the ranks exchange maps of states.

A part takes the state S ``[V, K]`` before it to ``S A + B`` after it, and the output of a token is what it is from a
state of zero, plus ``S r``, with r the output from the unit matrix without values. Neither needs another rank. One
collective then brings every rank all A and B, and a matrix product adds ``S r`` (docs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from gated_delta.parallel import Parallel
from gated_delta.prefill import chunk_gated_delta_rule
from gated_delta.validation.arguments import FLOATS, Arguments

CHUNK, LEAST = 64, 512
"""What the cuts are multiples of, and the least tokens of a piece of a part."""
FILLED = 132
"""States that fill a GPU: a part with fewer is worked on in pieces, side by side."""


def partition(tokens: int, ranks: int, state_heads: int = 32) -> list[int]:
    """The first token of every rank's part, and one past the last token: multiples of 64 such that ranks end together,
    by what H200s take (docs/parallel.md). Rank 0 starts from the true state, so its part is longer.

    Raises:
        OptionError: a count below its least value.
    """
    args = Arguments("partition")
    for name, count, least in (("tokens", tokens, 0), ("ranks", ranks, 1), ("state_heads", state_heads, 1)):
        args.whole(name, count, least=least)
    first = max(1.0, state_heads / (17 + state_heads / 3))
    cuts = (int(tokens * (first + r) / (first + ranks - 1)) for r in range(ranks - 1))
    return [0, *(cut // CHUNK * CHUNK for cut in cuts), tokens]


def context_parallel_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None, *, g_space: str = "linear", group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`gated_delta.chunk_gated_delta_rule` of one sequence, of which each rank of ``group`` has the next tokens.
    All ranks call it, with any number of tokens (none, too), the same heads and the same options.

    Args:
        q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, output, g_space, backend: as there, of this rank's L tokens.
        initial_state: ``[1, HS, V, K]`` before the whole sequence, zeros when None; rank 0's counts.
        group: all ranks when None. With one rank the result has the same bits as there.

    Returns:
        The output ``[L, HS, V]`` of this rank's tokens, or with ``output_final_state`` the pair (output, state after
        the whole sequence ``[1, HS, V, K]``, on every rank, in ``initial_state``'s dtype, fp32 without one).

    Raises:
        ArgumentError: it names the argument, what it is and what it must be (``group``: there is none). This rank has
            exchanged nothing then, so others whose arguments were right wait until the group's timeout.
    """
    own, args = Parallel.of(group), Arguments("context_parallel_gated_delta_rule")
    for name, x, spec in (("q", q, "L HQ K"), ("k", k, "L HK K"), ("v", v, "L HV V")):
        args.tensor(name, x, spec, FLOATS)
    length, head_k, heads = len(q), k.shape[2], max(q.shape[1], v.shape[1], 1)
    args.bind("HS", heads, "max(HQ, HV)")
    args.tensor("initial_state", initial_state, "1 HS V K", FLOATS, optional=True)
    output = q.new_empty(length, heads, v.shape[2]) if output is None else output
    pieces = max(min(FILLED // heads, length // LEAST), 1) if own.rank else 1
    size = CHUNK * max(-(-length // (CHUNK * pieces)), 1)
    rule = partial(
        chunk_gated_delta_rule, q, k, g=g, beta=beta, scale=scale, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=(torch.arange(pieces + 1, dtype=torch.int32, device=q.device) * size).clamp_(max=length),
        g_space=g_space, backend=backend,
    )  # fmt: skip
    maps = q.new_zeros(pieces, heads, head_k + v.shape[2], head_k, dtype=torch.float32)  # A over B
    rule(v=v, initial_state=None if own.rank else initial_state, output=output, output_state=maps[:, :, head_k:])
    reads = _reads(rule, maps, output, v) if own.rank else output
    parts = own.gathered(maps[-1])
    states = [*accumulate(parts[1:], _applied, initial=parts[0, :, head_k:])]
    if own.rank:
        before = states[own.rank - 1]
        for i, state in enumerate((before, *_applied(before, maps[:-1]))):
            tokens = slice(i * size, (i + 1) * size)
            output[tokens].transpose(0, 1).baddbmm_(reads[tokens].transpose(0, 1), state.mT.to(output.dtype))
    if not output_final_state:
        return output
    return output, states[-1][None].to(torch.float32 if initial_state is None else initial_state.dtype)


def _reads(rule: Callable[..., object], maps: Tensor, output: Tensor, v: Tensor) -> Tensor:
    """The r ``[L, HS, K]`` of all tokens, counted from the beginning of their piece. ``maps [pieces, HS, K + V, K]``, A
    over B with B filled in, become those from the beginning of the part to the end of every piece.
    """
    pieces, heads, _, head_k = maps.shape
    nothing = v.new_zeros(len(v), 1, head_k).expand(-1, v.shape[1], -1)
    unit = torch.eye(head_k, device=v.device).expand(pieces, heads, head_k, head_k)
    reads, ends = output.new_empty(len(v), heads, head_k), maps.new_empty(unit.shape)
    rule(v=nothing, initial_state=unit, output=reads, output_state=ends)
    maps[0, :, :head_k] = ends[0]
    for before, after, end in zip(maps, maps[1:], ends[1:], strict=False):
        after.baddbmm_(before, end)
    return reads


def _applied(state: Tensor, maps: Tensor) -> Tensor:
    """``S A + B``."""
    a, b = maps.tensor_split([maps.shape[-1]], dim=-2)
    return state @ a + b
