"""Other libraries' signatures on our operators: argument translation, and nothing else."""

import re
import warnings


def untested(version: str, first: str, last: str) -> str:
    """The range in words if ``version`` is not from ``first`` to ``last``, by as many numbers as those have."""
    count = first.count(".") + 1
    own, low, high = (tuple(map(int, re.findall(r"\d+", text)[:count])) for text in (version, first, last))
    return "" if low <= own <= high else " to ".join(dict.fromkeys((first, last)))


def is_tested(package: str, version: str, first: str, last: str) -> bool:
    """Whether ``version`` is in the range, or else a warning."""
    if known := untested(version, first, last):
        message = f"gated_delta leaves {package} {version} as it is: it was tested with {known}"
        warnings.warn(message, stacklevel=3)
    return not known
