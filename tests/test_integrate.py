"""The compatibility table of docs/integrate: from what the plug-ins themselves say that they serve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gated_delta.interop import fla, sglang, transformers, vllm, vllm_conv

PAGES = Path(__file__).parents[1] / "docs" / "integrate"


def versions(first: str, last: str) -> str:
    return " to ".join(dict.fromkeys((first, last)))


def of(pattern: str, text: str | None) -> str:
    found = re.search(pattern + r" (\d[\w.]*\w)", text or "")
    assert found, pattern
    return found[1]


def table() -> str:
    infer = of("Compared with FlashInfer", (PAGES / "flashinfer.md").read_text())
    rows = [
        ("Transformers", "transformers.md", versions(*transformers.TESTED), "left as it is, with a warning"),
        ("vLLM", "vllm.md", versions(*vllm.TESTED), "left as it is, with a warning"),
        ("SGLang", "sglang.md", versions(*sglang.TESTED), "left as it is, with a warning"),
        ("flash-linear-attention", "fla.md", of("flash-linear-attention", fla.__doc__), "not looked at"),
        ("causal-conv1d", "fla.md", of("causal-conv1d", (PAGES / "fla.md").read_text()), "not looked at"),
        ("vLLM's convolution", "vllm.md", of("vLLM", vllm_conv.__doc__), "not looked at"),
        ("FlashInfer", "flashinfer.md", infer, "not looked at"),
    ]
    lines = ["| from | versions | any other version |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| [{name}]({page}) | {number} | {other} |" for name, page, number, other in rows)])


def test_the_table_is_what_the_plug_ins_say() -> None:
    page = (PAGES / "README.md").read_text()
    assert table() in page, f"docs/integrate/README.md must have\n{table()}"


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md") if path.name != "README.md"))
def test_every_page_is_in_it_and_answers_the_same_questions(page: str) -> None:
    assert f"]({page})" in table()
    text = (PAGES / page).read_text()
    assert all(f"**{question}**" in text for question in ("Install", "Switch on", "See that it is on"))
