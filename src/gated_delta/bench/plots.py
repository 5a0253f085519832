"""Pictures of a CSV, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from gated_delta.bench.records import Row

MISSING = 'matplotlib is not installed (pip install "gated-delta[bench]")'


def missing() -> bool:
    return find_spec("matplotlib") is None


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    return []
