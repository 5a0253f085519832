"""The command line: what it prints, and that bad input is one sentence and exit status 2; the model's errors too."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from gated_delta import cli, dispatch
from gated_delta.errors import OptionError
from gated_delta.model.generation import Options, Summary, generate, score
from gated_delta.model.network import HybridConfig, HybridLM, Session, load_model
from gated_delta.testing.budget import Verdict
from gated_delta.testing.selftest import CASES, Case
from test_validation import assert_fault

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and " * 2
SMALL = HybridConfig(max_positions=8)


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Standard output with every run of white space and table rules made one space."""
        return " ".join(self.out.translate(dict.fromkeys(map(ord, "│┃|"), " ")).split())


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command in this process; the status is 0 when it returns.

    On one thread: the model is small, and threads that wait for a busy machine's other core make it many times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def command(*argv: str) -> Result:
        monkeypatch.setattr(cli, "console", Console(width=200))
        monkeypatch.setattr(sys, "argv", ["gated-delta", *argv])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            status = stop.code or 0
        printed = capsys.readouterr()
        return Result(status, printed.out, printed.err)

    yield command
    torch.set_num_threads(threads)


def generated(result: Result, prompt: str) -> str:
    """The new text alone."""
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(prompt)
    return result.out[len(prompt) :].split("\n\n")[0]


def test_generate(run: Run) -> None:
    prompt = "In the beginning God created"
    result = run("generate", "--prompt", prompt, "--tokens", "5", "--device", "cpu")
    tokens = torch.tensor([list(prompt.encode())])
    model = load_model()
    for _ in range(5):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert generated(result, prompt) == bytes(tokens[0, -5:].tolist()).decode()
    assert f"prefill {len(prompt)} tokens, " in result.words
    assert "decode 4 tokens, " in result.words
    assert " in 4 steps" in result.words
    assert "bytes of GDN state at any length; the KV cache of these layers would take" in result.words
    assert "bytes of KV cache for the attention layers that the model keeps" in result.words
    assert "speculation" not in result.words


def test_speculation_generates_the_same_in_fewer_steps(run: Run) -> None:
    prompt = "one two three four five six. " * 3 + "one two three"
    argv = ("generate", "--prompt", prompt, "--tokens", "12", "--device", "cpu")
    plain, guessed = run(*argv), run(*argv, "--speculative", "4")
    assert generated(guessed, prompt) == generated(plain, prompt)
    assert " in 11 steps" in plain.words
    assert " in 11 steps" not in guessed.words
    assert "speculation" in guessed.words
    assert "tokens a step" in guessed.words
    assert "drafted" in guessed.words


def test_sampling_follows_its_seed(run: Run) -> None:
    argv = ("generate", "--prompt", "And ", "--tokens", "12", "--temperature", "1.5", "--state-dtype", "bf16")
    first, again, other = (generated(run(*argv, "--seed", seed), "And ") for seed in "334")
    assert first == again
    assert first != other


def test_a_prompt_with_markup_is_text(run: Run) -> None:
    generated(run("generate", "--prompt", "[bold]x[/] $$ [1, 2]", "--tokens", "1"), "[bold]x[/] $$ [1, 2]")


def test_score(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "sample.txt"
    file.write_text(TEXT)
    result = run("score", str(file), "--device", "cpu")
    assert (result.status, result.err) == (0, "")
    assert f"sample.txt: {len(TEXT)} bytes on cpu" in result.words
    tokens = torch.tensor([list(TEXT.encode())])
    nats = F.cross_entropy(load_model()(tokens[:, :-1])[0].double(), tokens[0, 1:])
    rows = {line.split()[1]: line.split()[3:6:2] for line in result.out.splitlines() if line.startswith("│")}
    assert set(rows) == {"fp32", "bf16"}
    assert float(rows["fp32"][0]) == pytest.approx(nats.item() / torch.tensor(2.0).log().item(), abs=1e-3)
    assert rows["fp32"][1] == "+0.000000"
    difference = float(rows["bf16"][0]) - float(rows["fp32"][0])
    assert float(rows["bf16"][1]) == pytest.approx(difference, abs=1.01e-4)
    assert 0 < abs(difference) < 0.05


def test_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list({case.operator: case for case in CASES}.values())
    monkeypatch.setattr(cli, "CASES", cases)
    result = run("check", "--device", "cpu")
    assert (result.status, result.err) == (0, "")
    assert "results are within their budgets" in result.words
    for case in cases:
        assert f"{case.operator} {case.name}" in result.words
    assert " over " not in result.words


def test_check_fails_when_a_case_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("output", 3e-3, 1e-3), Verdict("state", 1e-4, 1e-3)]
    monkeypatch.setattr(cli, "CASES", [Case("rms_norm_gated", "made to fail", lambda device: verdicts)])
    result = run("check", "--device", "cpu")
    assert result.status == 1
    assert "rms_norm_gated made to fail output 3.0e-03 1.0e-03 over" in result.words
    assert "rms_norm_gated made to fail state 1.0e-04 1.0e-03 ok" in result.words
    assert "1 results are over their budget" in result.words
    assert "within" not in result.words


def test_info(run: Run) -> None:
    result = run("info")
    assert (result.status, result.err) == (0, "")
    assert f"torch {torch.__version__}" in result.words
    assert f"python {platform.python_version()}" in result.words
    assert "model bits_per_byte_test" in result.words
    for operator in dispatch.OPERATORS:
        sizes = ", K=128, V=128" if operator in dispatch.RULES else ""
        assert f"{operator}, cpu, bfloat16{sizes} -> cpu" in result.words


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in ("generate", "score", "check", "info"))])
def test_help(run: Run, argv: list[str]) -> None:
    result = run(*argv)
    assert (result.status, result.err) == (0, "")
    assert "Usage:" in result.words
    assert f"{argv[0]} [OPTIONS]" in result.words or argv == ["--help"]


_TOO_LONG = "it must be at most 1024 long, the positions that the model knows"
_POSITIONS = "it must be at most 8, the model's positions"
_DEVICES = '"auto", "cpu" or "cuda"'
BAD: list[tuple[list[str], str]] = [
    (["generate", "--prompt", ""], "generate: prompt is empty; it must be at least one byte long"),
    (["generate", "--prompt", "x", "--tokens", "0"], "Invalid value for '--tokens':"),
    (["generate", "--prompt", "x", "--tokens", "-4"], "Invalid value for '--tokens':"),
    (["generate", "--prompt", "x", "--tokens", "abc"], "Invalid value for '--tokens':"),
    (["generate", "--prompt", "x", "--speculative", "65"], "Invalid value for '--speculative':"),
    (["generate", "--prompt", "x", "--seed", "-1"], "Invalid value for '--seed':"),
    (["generate"], "Missing option '--prompt'."),
    (["nonsense"], "No such command 'nonsense'."),
    (["generate", "--prompt", "x", "--temperature", "-0.5"],
     "generate: temperature is -0.5; it must be 0 (greedy), or in [0.01, 100]"),
    (["generate", "--prompt", "x", "--temperature", "nan"],
     "generate: temperature is nan; it must be 0 (greedy), or in [0.01, 100]"),
    (["generate", "--prompt", "x", "--tokens", "1024"],
     f"generate: the context is 1 bytes of prompt and 1024 new tokens; {_TOO_LONG}"),
    (["generate", "--prompt", "x" * 1024, "--tokens", "1"],
     f"generate: the context is 1024 bytes of prompt and 1 new tokens; {_TOO_LONG}"),
    (["generate", "--prompt", "x", "--state-dtype", "fp8"],
     "generate: --state-dtype is 'fp8'; it must be fp32 or bf16"),
    *(([command, *rest, "--device", "tpu"], f"command line: --device is 'tpu'; it must be {_DEVICES}")
      for command, *rest in (["generate", "--prompt", "x"], ["check"], ["score", __file__])),
    (["check", "--device", "cuda"], 'command line: --device is "cuda"; it must be "cpu": torch sees no GPU here'),
    *((["score", file], "Invalid value for 'FILE':") for file in ("no-such-file.txt", ".")),
    (["score", os.devnull], "score: the text is 0 bytes long; it must be at least 2 bytes long"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), [pytest.param(*row, id=" ".join(row[0])[:50]) for row in BAD])
def test_bad_input(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*argv)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    if message.endswith(":"):  # what stands behind it is typer's
        assert result.err.startswith(f"gated-delta: {message} ")
    else:
        assert result.err == f"gated-delta: {message}\n"


@pytest.mark.parametrize("size", [0, 1])
def test_too_little_to_score(run: Run, tmp_path: Path, size: int) -> None:
    (tmp_path / "short").write_bytes(b"x" * size)
    result = run("score", str(tmp_path / "short"), "--device", "cpu")
    message = f"gated-delta: score: the text is {size} bytes long; it must be at least 2 bytes long\n"
    assert (result.status, result.err) == (2, message)


def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "gated_delta.cli", "generate", "--prompt", "x", "--tokens", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gated-delta: Invalid value for '--tokens': ") and done.stderr.count("\n") == 1


def begun(tokens: int, drafts: int = 0) -> Session:
    """A session that has kept 2 tokens and is in a step of ``tokens``."""
    session = Session(SMALL, drafts=drafts)
    session.begin(2)
    session.keep(2)
    session.begin(tokens)
    return session


def short_model() -> HybridLM:
    return HybridLM(SMALL).eval()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Session(SMALL).begin(9), f"Session: the context is 9 tokens long; {_POSITIONS}"),
        (lambda: begun(3).begin(7), f"Session: the context is 9 tokens long; {_POSITIONS}"),
        (lambda: begun(3).keep(2), "Session.keep: tokens is 2; it must be in [3, 3]"),
        (lambda: begun(3).keep(4), "Session.keep: tokens is 4; it must be in [3, 3]"),
        (lambda: begun(3, drafts=2).keep(0), "Session.keep: tokens is 0; it must be in [1, 3]"),
        (lambda: begun(3, drafts=2).keep(4), "Session.keep: tokens is 4; it must be in [1, 3]"),
        (lambda: Options(drafts=-1), "generate: drafts is -1; it must be at least 0"),
        (lambda: next(generate(short_model(), b"four", Options(tokens=5), Summary())),
         "generate: the context is 4 bytes of prompt and 5 new tokens; it must be at most 8 long, the positions that "
         "the model knows"),
        (lambda: next(generate(short_model(), b"", Options(tokens=1), Summary())),
         "generate: prompt is empty; it must be at least one byte long"),
        (lambda: score(short_model(), b"x"), "score: the text is 1 bytes long; it must be at least 2 bytes long"),
        (lambda: load_model(path=Path("no.safetensors")),
         "load_model: path is no.safetensors; it must be an existing safetensors file"),
    ],
)  # fmt: skip
def test_model_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert_fault(caught.value, OptionError, message)


def test_weights_need_safetensors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    result = run("generate", "--prompt", "x", "--device", "cpu")
    must = 'it must be installed: pip install "gated-delta[cli]"'
    assert (result.status, result.out) == (2, "")
    assert result.err == f"gated-delta: load_model: safetensors is not installed; {must}\n"
