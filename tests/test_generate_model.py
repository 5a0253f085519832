"""``gated-delta generate --model``: checkpoints through Transformers, and what is no checkpoint for us."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gated_delta.interop.transformers import FAMILIES, patched
from gated_delta.model.generation import Options, Summary, generate_checkpoint
from test_cli import Run, generated, run  # noqa: F401 (a fixture)
from test_interop_transformers import COMMON, CONFIGS, Served, transformers

tokenizers = pytest.importorskip("tokenizers", reason="comes with Transformers")
pytestmark = pytest.mark.filterwarnings("default:::transformers")

VOCABULARY = {chr(0x4E00 + i): i for i in range(COMMON["vocab_size"])}
"""One letter a token, so that text and ids are each other's image; token 0 is a special one."""
PROMPT = "".join(list(VOCABULARY)[20:33])
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
PLAIN = "abcdefghijklm"
NEW = 12


def save_tokenizer(folder: Path, letters: dict[str, int], decoder: Any) -> None:
    special = next(iter(letters))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=special))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Split("", "isolated"), decoder
    made.add_special_tokens([special])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen3_5 with a vision tower"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A checkpoint with random weights in fp32, and what Transformers generates from it by itself."""
    folder = save(tmp_path_factory.mktemp("checkpoint"), *request.param.split(" ", 1))
    return folder, stock(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    folder = save(tmp_path_factory.mktemp("checkpoint"), "qwen3_5")
    return folder, stock(folder)


def save(folder: Path, family: str, tower: str = "") -> Path:
    kind, own = CONFIGS[family]
    torch.manual_seed(3)
    if tower:
        text = {**COMMON, **own}
        config = transformers.Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=False)
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    else:
        config = transformers.AutoConfig.for_model(kind, **{**COMMON, **own})
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY, tokenizers.decoders.Fuse())
    return folder


def stock(folder: Path) -> list[int]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[VOCABULARY[letter] for letter in PROMPT]])
    done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return done[0, len(PROMPT) :].tolist()


def command(folder: Path, *options: str) -> tuple[str, ...]:
    return ("generate", "--model", str(folder), "--prompt", PROMPT, "--tokens", str(NEW), "--device", "cpu", *options)


def test_greedy_text_is_that_of_stock(run: Run, saved: tuple[Path, list[int]]) -> None:  # noqa: F811
    folder, ids = saved
    assert len(set(ids)) > 3  # a model that says one thing would prove nothing
    with Served() as served:
        result = run(*command(folder))
    text = generated(result, PROMPT)
    assert [VOCABULARY[letter] for letter in text] == ids
    assert served.calls["prefill"] == 2
    assert served.calls["recurrent"] + served.calls["gated_delta_net_step"] == 2 * (NEW - 1)
    assert not patched()
    assert f"prefill {len(PROMPT)} tokens, " in result.words
    assert f"decode {NEW - 1} tokens, " in result.words
    assert f" in {NEW - 1} steps" in result.words
    assert "speculation" not in result.words
    kv = 2 * 2 * 32 * 4 * (len(PROMPT) + NEW - 1)  # keys and values of 2 heads of 32 in fp32, in one of three layers
    assert f"would take {2 * kv:,} at {len(PROMPT) + NEW - 1} tokens" in result.words
    assert f"{kv:,} bytes of KV cache for the attention layers" in result.words
    olmo = "olmo" in (folder / "config.json").read_text()
    state, conv = (32 * 64, 2 * 64 + 4 * 64) if olmo else (32 * 32, 2 * 64 + 4 * 32)
    assert f"state {2 * 4 * (4 * state + 4 * conv):,} bytes of GDN state" in result.words


def test_sampling_follows_its_seed(run: Run, qwen: tuple[Path, list[int]]) -> None:  # noqa: F811
    argv = command(qwen[0], "--temperature", "1.5")
    first, again, other = (generated(run(*argv, "--seed", seed), PROMPT) for seed in "334")
    assert first == again
    assert first != other


def test_weights_keep_their_dtype(run: Run, copied: Path) -> None:  # noqa: F811
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(copied)
    model.to(torch.bfloat16).save_pretrained(copied)
    kv = 2 * 2 * 32 * 2 * (len(PROMPT) + NEW - 1)
    assert f"{kv:,} bytes of KV cache for the attention layers" in run(*command(copied)).words


@pytest.mark.parametrize("form", ["number", "list"])
def test_it_ends_at_a_stop_token(run: Run, copied: Path, qwen: tuple[Path, list[int]], form: str) -> None:  # noqa: F811
    ids = qwen[1]
    end = next(i for i in range(2, NEW) if ids[i] not in ids[:i])
    stop = ids[end] if form == "number" else [0, ids[end]]
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    result = run(*command(copied))
    assert [VOCABULARY[letter] for letter in generated(result, PROMPT)] == ids[: end + 1]
    assert f"decode {end} tokens, " in result.words


def test_letters_of_several_tokens_come_whole(copied: Path, qwen: tuple[Path, list[int]]) -> None:
    """A vocabulary of bytes in which the same tokens spell two letters of two and three bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spelled = dict(zip(qwen[1], "\u00c3\u00a9\u00e2\u0124\u00ac", strict=False)) | dict(
        zip(range(20, 33), PLAIN, strict=True)
    )
    assert len(spelled) == 5 + 13
    rest = (letter for letter in alphabet if letter not in spelled.values())
    letters = {spelled.get(i) or next(rest): i for i in range(COMMON["vocab_size"])}
    save_tokenizer(copied, letters, tokenizers.decoders.ByteLevel())
    chunks = list(generate_checkpoint(copied, PLAIN, Options(tokens=5), Summary(), "cpu"))
    assert chunks == [b"", "\u00e9".encode(), b"", b"", "\u20ac".encode()]


@pytest.fixture
def copied(qwen: tuple[Path, list[int]], tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(qwen[0], tmp_path / "model")


# --- what is no checkpoint for us -------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewritten(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def without_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.linear_attn.A_log"]
    save_file(weights, path, {"format": "pt"})


BAD: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "FileNotFoundError: [Errno 2] No such file or directory: 'MODEL/config.json'"),
    (without("config.json"), "FileNotFoundError: [Errno 2] No such file or directory: 'MODEL/config.json'"),
    (without("model.safetensors"), "OSError: "),
    (without("tokenizer.json"), "Exception: No such file or directory"),
    (rewritten("config.json", b"{}"), "KeyError: 'model_type'"),
    (rewritten("config.json", b"\xff"), "UnicodeDecodeError: "),
    (rewritten("config.json", b'{"model_type": "llama"}'), "ValueError: model_type llama)"),
    (without_a_weight, "ValueError: without model.layers.2.linear_attn.A_log)"),
    (rewritten("model.safetensors", b"x" * 99), "SafetensorError: "),
    (rewritten("tokenizer.json", b"{}"), "Exception: "),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_checkpoints(run: Run, copied: Path, spoil: Callable[[Path], object], reason: str) -> None:  # noqa: F811
    """One sentence, with what the library said that could not read a file."""
    spoil(copied)
    result = run(*command(copied))
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"gated-delta: generate: --model is {copied} ({reason.replace('MODEL', str(copied))}")
    assert result.err.endswith(f"); it must be a whole Hugging Face checkpoint of {', '.join(FAMILIES)}\n")


ROLLBACK = "--speculative is given; it must be left out: Transformers cannot take a recurrent state back"
KEPT = "--state-dtype bf16 is given; it must be left out: Transformers keeps the recurrent state in fp32"
LONG = "it must be at most 256 long, the positions that the model knows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speculative", "4"), ROLLBACK),
        (("--state-dtype", "bf16"), KEPT),
        (("--prompt", ""), "prompt is empty; it must be at least one token long"),
        (("--tokens", "244"), f"the context is 13 tokens of prompt and 244 new tokens; {LONG}"),
        (("--temperature", "-1"), "temperature is -1.0; it must be 0 (greedy), or in [0.01, 100]"),
    ],
)  # fmt: skip
def test_bad_options(run: Run, qwen: tuple[Path, list[int]], options: tuple[str, ...], message: str) -> None:  # noqa: F811
    result = run(*command(qwen[0], *options))
    assert (result.status, result.out, result.err) == (2, "", f"gated-delta: generate: {message}\n")


def test_without_transformers(run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "transformers", None)
    must = 'it must be installed: pip install "gated-delta[hf]"'
    assert run(*command(copied)) == (2, "", f"gated-delta: generate: transformers is not installed; {must}\n")


def test_an_untested_version(run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.24.0")
    must = "it must be 5.16 to 5.23, which it was tested with"
    assert run(*command(copied)) == (2, "", f"gated-delta: generate: transformers is 5.24.0; {must}\n")
