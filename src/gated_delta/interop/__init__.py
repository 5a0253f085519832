"""Other libraries' signatures on our operators: argument translation, and nothing else."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gated_delta import plans
from gated_delta.validation.arguments import FLOATS, INDICES, Arguments

_NOT_SERVED = {
    "gk": "a decay for every key channel is another rule (KDA)",
    "gv": "a decay for every value channel is another rule",
    "cp_context": "a sequence stays on one device here",
    "transpose_state_layout": "its name is state_v_first",
    "seq_idx": "packed sequences are cut by cu_seqlens, which gated_delta.causal_conv1d takes",
    "cache_seqlens": "a state is a window here, not a ring",
    **dict.fromkeys(
        ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx",
         "num_computed_tokens", "block_size_to_align"), "a row has one slot here, whatever its length",
    ),
}  # fmt: skip
"""Parameters of other libraries that must be left out, and why."""


def arguments(where: str, given: Mapping[str, object], shapes: Mapping[str, str]) -> Arguments:
    """The checks of a call with these parameters: none of :data:`_NOT_SERVED`, and tensors of any strides in these
    shapes, of which one that begins with "?" may be left out.
    """
    args = Arguments(where)
    for name, because in _NOT_SERVED.items():
        value = given.get(name)
        args.excluded(name, isinstance(value, Tensor) or bool(value), because)
    for name, shape in shapes.items():
        dtypes = INDICES if name == "cu_seqlens" else FLOATS
        args.tensor(name, given[name], shape.lstrip("?"), dtypes, optional=shape[0] == "?", any_stride=True)
    return args


def judged(where: str, given: Mapping[str, Any], shapes: Mapping[str, str]) -> None:
    """:func:`arguments`, once for all calls that look alike; the first tensor may not be left out."""
    unserved = tuple(name for name in _NOT_SERVED if given.get(name) is not None)
    options = (where, unserved, *shapes.values())
    plans.judged(options, tuple(given[name] for name in shapes), lambda: arguments(where, given, shapes))


def untested(version: str, first: str, last: str) -> str:
    """The range in words if ``version`` is not from ``first`` to ``last``, by as many numbers as those have."""
    count = first.count(".") + 1
    own, low, high = (tuple(map(int, re.findall(r"\d+", text)[:count])) for text in (version, first, last))
    return "" if low <= own <= high else " to ".join(dict.fromkeys((first, last)))


def is_tested(package: str, version: str, first: str, last: str) -> bool:
    """Whether ``version`` is in the range, or else a warning."""
    if known := untested(version, first, last):
        warnings.warn(f"gated_delta leaves {package} {version} as it is: it was tested with {known}", stacklevel=3)
    return not known
