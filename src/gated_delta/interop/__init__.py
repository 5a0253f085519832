"""Other libraries' signatures on our operators: argument translation, and nothing else."""

import re
import warnings


def is_tested(package: str, version: str, first: str, last: str) -> bool:
    """Whether ``version`` is from ``first`` to ``last``, by as many numbers as those have; if not, a warning."""
    count = first.count(".") + 1
    own, low, high = (tuple(map(int, re.findall(r"\d+", text)[:count])) for text in (version, first, last))
    if not low <= own <= high:
        known = " to ".join(dict.fromkeys((first, last)))
        message = f"gated_delta leaves {package} {version} as it is: it was tested with {known}"
        warnings.warn(message, stacklevel=3)
    return low <= own <= high
