"""The house rules that a machine can check: sizes, and blocks that stand twice."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]
BLOCK = 12
"""Lines that make a repeated block."""


def functions(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(name, lines, is a kernel) of every function, its docstring included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield node.name, lines, any("jit" in ast.unparse(d) for d in node.decorator_list)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) without blank lines, comments, imports and lone punctuation."""
    kept = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = " ".join(line.split())
        if re.search(r"\w", text) and not text.startswith(("#", "import ", "from ")):
            kept.append((number, text))
    return kept


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_or_file_is_too_long(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
    long = {name: lines for name, lines, kernel in functions(path) if lines > (150 if kernel else 60)}
    assert not long


@pytest.mark.xfail(reason="The alarm rings. What is known to be left is features: the gates operator, two warm-ups")
def test_the_package_is_small() -> None:
    assert lines_of_the_package() < 10_000


def test_the_package_grows_no_further() -> None:
    """Until it is small again, and this test goes."""
    assert lines_of_the_package() < 10_140


def lines_of_the_package() -> int:
    return sum(path.read_text().count("\n") for path in SOURCES)


def test_few_blocks_stand_twice() -> None:
    places = defaultdict(list)
    total = 0
    for path in SOURCES:
        lines = code_lines(path)
        total += len(lines)
        for i in range(len(lines) - BLOCK + 1):
            places[tuple(text for _, text in lines[i : i + BLOCK])].append((path.name, lines[i][0]))
    repeated = {
        (name, number + offset)
        for found in places.values()
        if len(found) > 1
        for name, number in found
        for offset in range(BLOCK)
    }
    assert len(repeated) < 0.05 * total, sorted(repeated)[:20]


def test_every_test_file_is_named_for_what_it_tests() -> None:
    helpers = {"helpers.py", "layer_helpers.py", "interpreter.py", "compile_kernels.py", "conftest.py"}
    helpers |= {f"gluon_{name}.py" for name in ("emulator", "block", "copies", "shared", "values")}
    helpers |= {"prefill_helpers.py"}
    assert all(p.name.startswith("test_") or p.name in helpers for p in (ROOT / "tests").glob("*.py"))
