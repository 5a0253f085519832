"""Requests for serve_sim.py: random ones, or those of a file."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import NamedTuple

from gated_delta.errors import OptionError

SIGMA = 0.7
"""Of log-normal lengths."""


class Request(NamedTuple):
    """Comes before step ``arrival`` with ``prompt`` tokens, and goes with its ``output``-th new one."""

    arrival: float
    prompt: int
    output: int


def random_trace(count: int, rate: float, prompt: int, output: int, seed: int) -> list[Request]:
    """Poisson arrivals, ``rate`` a step; log-normal lengths with these medians."""
    choice, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += choice.expovariate(rate)
        lengths = (max(1, round(choice.lognormvariate(math.log(median), SIGMA))) for median in (prompt, output))
        found.append(Request(now, *lengths))
    return found


def read_trace(path: Path) -> list[Request]:
    """Of a CSV with the columns arrival, prompt, output.

    Raises:
        OptionError: no such file, or a value that is none; its row and column are named.
    """
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except (OSError, ValueError) as error:
        raise OptionError("serve-sim", "--trace", f"{path} ({error})", "a CSV file") from error
    found = []
    for number, row in enumerate(rows, 1):
        values = []
        for name, kind, least in (("arrival", float, 0), ("prompt", int, 1), ("output", int, 1)):
            try:
                values.append(kind(row.get(name) or ""))
            except ValueError:
                values.append(math.nan)
            if not least <= values[-1] < math.inf:
                must = f"a {'whole ' if kind is int else ''}number of at least {least}"
                raise OptionError("serve-sim", f"{path.name}, row {number}, column {name}", repr(row.get(name)), must)
        found.append(Request(*values))
    return sorted(found)
