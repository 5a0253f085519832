"""What the README promises: its main job, its example, its names, its links."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import gated_delta

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)[number]


def test_the_main_job_generates_words() -> None:
    install, job = block("sh").strip().rsplit(" && ", 1)
    assert "-c constraints.txt" in install and '".[cli]"' in install
    program, *arguments = shlex.split(job)
    assert program == ".venv/bin/gated-delta"
    started = time.monotonic()
    command = [sys.executable, "-m", "gated_delta.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 30
    prompt = arguments[arguments.index("--prompt") + 1]
    text, summary = done.stdout.split("\n\nprefill")
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 200
    common = {"the", "and", "of", "to", "that", "said", "unto", "in", "was", "is", "lord", "shall", "me"}
    words = re.findall(r"[a-z]+", text.lower())
    assert sum(word in common for word in words) > 0.3 * len(words)
    for part in ("tokens/s", "tokens a step", "bytes of GDN state", "KV cache"):
        assert part in " ".join(summary.split())


def test_the_example_runs() -> None:
    done = subprocess.run([sys.executable, "-c", block("python")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("chunk_gated_delta_rule, cpu, bfloat16, K=64, V=64 -> cpu")


def test_the_operators_are_those_of_the_package() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert named == {name for name in gated_delta.__all__ if name not in ("checked", "explain", "warmup")}


def test_the_test_command_is_what_ci_runs() -> None:
    command = block("sh", 2).strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
