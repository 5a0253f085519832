"""Models at work. Ours: text by plain decoding or with drafts looked up in the text so far; bits per byte of a text,
decoded token by token so that every token rounds the stored state. A Hugging Face checkpoint: text; Transformers runs
it, our operators its Gated Delta Net layers.
"""

import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gated_delta.errors import OptionError
from gated_delta.interop import untested
from gated_delta.interop.transformers import FAMILIES, TESTED, patch
from gated_delta.model.network import HybridLM, Session
from gated_delta.validation.arguments import Arguments

LONGEST_MATCH, SHORTEST_MATCH = 12, 3
ROWS = 64
"""Windows scored in step."""
UNCOUNTED = -1
_ARGUMENTS = Arguments("generate")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate. ``temperature`` 0 is greedy; ``drafts`` is the most tokens guessed a step, 0 for none."""

    tokens: int = 200
    drafts: int = 0
    temperature: float = 0.0
    seed: int = 0
    state_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _ARGUMENTS.whole("tokens", self.tokens, least=1)
        _ARGUMENTS.whole("drafts", self.drafts, least=0)
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise OptionError("generate", "temperature", self.temperature, "0 (greedy), or in [0.01, 100]")


@dataclass
class Summary:
    """What a generation took. ``tokens`` counts all new ones; the first comes out of the prefill."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    decode_seconds: float = 0.0
    state_bytes: int = 0
    """GDN state of the sequence, at any length."""
    kv_bytes: int = 0
    """KV cache of the attention layers at the present length."""
    replaced_kv_bytes: int = 0
    """KV cache that the GDN layers would need at this length if they were attention layers like the others."""

    def add(self, tokens: int, drafted: int, seconds: float) -> None:
        """Count a step: the first is the prefill."""
        if self.tokens:
            self.steps += 1
            self.drafted += drafted
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        self.tokens += tokens

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        return (self.tokens - 1) / max(self.decode_seconds, 1e-9)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept: every step adds one token of its own."""
        return self.tokens - 1 - self.steps

    @property
    def tokens_per_step(self) -> float:
        return (self.tokens - 1) / max(1, self.steps)


def look_up(context: bytes, count: int) -> bytes:
    """Guess the next ``count`` bytes: what followed the latest earlier occurrence of the longest matching ending."""
    for size in range(min(LONGEST_MATCH, len(context) - 1), SHORTEST_MATCH - 1, -1):
        found = context.rfind(context[-size:], 0, len(context) - 1)
        if found >= 0:
            return context[found + size : found + size + count]
    return b""


class Sampler:
    """Picks tokens from logits, and judges drafted ones so that speculation leaves the distribution as it is."""

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def __call__(self, logits: Tensor, drafts: bytes) -> bytes:
        """Logits ``[1 + len(drafts), 256]`` -> the accepted drafts and one more token.

        A draft from a deterministic guess is kept with the probability that the model gives it; the token that
        replaces a rejected one is drawn from the rest (Leviathan, Kalman, Matias 2023, with a one-point draft).
        """
        kept = b""
        for row, draft in zip(logits, drafts, strict=False):
            probabilities = self._probabilities(row)
            if torch.rand((), generator=self._generator, device=row.device) >= probabilities[draft]:
                probabilities[draft] = 0
                return kept + bytes([self._draw(probabilities)])
            kept += bytes([draft])
        return kept + bytes([self.token(logits[len(drafts)])])

    def token(self, row: Tensor) -> int:
        """One token from logits ``[vocabulary]``."""
        return self._draw(self._probabilities(row))

    def _probabilities(self, row: Tensor) -> Tensor:
        """Greedy is certain of the largest."""
        if self.temperature == 0:
            return torch.zeros_like(row).index_fill_(0, row.argmax(), 1)
        return torch.softmax(row / self.temperature, dim=-1)

    def _draw(self, probabilities: Tensor) -> int:
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def check_context(prompt: int, unit: str, tokens: int, most: int) -> None:
    """A prompt of ``prompt`` units and ``tokens`` new tokens must fit the ``most`` positions that a model knows.

    Raises:
        OptionError: the prompt is empty, or they do not.
    """
    if not prompt:
        raise OptionError("generate", "prompt", "empty", f"at least one {unit} long")
    if prompt + tokens > most:
        was = f"{prompt} {unit}s of prompt and {tokens} new tokens"
        raise OptionError("generate", "the context", was, f"at most {most} long, the positions that the model knows")


def generate(model: HybridLM, prompt: bytes, options: Options, summary: Summary) -> Iterator[bytes]:
    """Yield new bytes as they come (the prompt is not repeated); ``summary`` is filled in on the way.

    Raises:
        OptionError: as :func:`check_context`.
    """
    check_context(len(prompt), "byte", options.tokens, model.config.max_positions)
    device = model.embedding.weight.device
    session = Session(model.config, drafts=options.drafts, state_dtype=options.state_dtype, device=device)
    sampler = Sampler(options.temperature, options.seed, device)
    summary.prompt_tokens, summary.state_bytes = len(prompt), session.state_bytes
    text, fed = prompt, prompt
    while summary.tokens < options.tokens:
        started = time.perf_counter()
        room = min(options.drafts, options.tokens - summary.tokens - 1) if summary.tokens else 0
        drafts = look_up(text, room) if room else b""
        logits = model(torch.tensor([list(fed + drafts)], device=device), session)
        new = sampler(logits[0, -1 - len(drafts) :], drafts)
        session.keep(len(new) if summary.tokens else len(prompt))
        text, fed = text + new, new[-1:]
        summary.add(len(new), len(drafts), time.perf_counter() - started)
        summary.kv_bytes, summary.replaced_kv_bytes = session.kv_bytes()
        yield new


def generate_checkpoint(folder: Path, prompt: str, options: Options, summary: Summary, device: str) -> Iterator[bytes]:
    """Yield new text as it comes, up to a stop token of the checkpoint; ``summary`` is filled in on the way.

    Transformers is patched until the end.

    Raises:
        OptionError: Transformers is not installed, or of a version that is not served; ``folder`` holds no checkpoint
            of :data:`FAMILIES`, or a damaged one; drafts or a state in another dtype than fp32 are asked for; or as
            :func:`check_context`.
    """
    _ARGUMENTS.excluded("--speculative", options.drafts > 0, "Transformers cannot take a recurrent state back")
    because = "Transformers keeps the recurrent state in fp32"
    _ARGUMENTS.excluded("--state-dtype bf16", options.state_dtype != torch.float32, because)
    model, tokenizer = _load(folder)
    from tokenizers.decoders import DecodeStream  # noqa: PLC0415 (comes with an extra)

    model, text, cache = model.to(device).eval(), DecodeStream(skip_special_tokens=True), None
    sampler = Sampler(options.temperature, options.seed, model.device)
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    fed: list[int] = tokenizer.encode(prompt).ids
    check_context(len(fed), "token", options.tokens, model.config.max_position_embeddings)
    summary.prompt_tokens = len(fed)
    with patch():
        while summary.tokens < options.tokens and not (summary.tokens and fed[0] in stops):
            started = time.perf_counter()
            with torch.inference_mode():
                step = torch.tensor([fed], device=model.device)
                done = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                fed, cache = [sampler.token(done.logits[0, -1].float())], done.past_key_values
            summary.add(1, 0, time.perf_counter() - started)
            _measure(cache, summary)
            yield (text.step(tokenizer, fed[0]) or "").encode()


def _load(folder: Path) -> tuple[Any, Any]:
    """The text model, in the dtype of its weights, and its tokenizer."""
    if importlib.util.find_spec("transformers") is None:
        raise OptionError("generate", "transformers", "not installed", 'installed: pip install "gated-delta[hf]"')
    version = importlib.metadata.version("transformers")
    if tested := untested(version, *TESTED):
        raise OptionError("generate", "transformers", version, f"{tested}, which it was tested with")
    import transformers  # noqa: PLC0415 (an extra)
    from tokenizers import Tokenizer  # noqa: PLC0415 (comes with it)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
        if str(kind).removesuffix("_text") not in FAMILIES:
            raise ValueError(f"model_type {kind}")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(loaded[1]["missing_keys"]):
            raise ValueError(f"without {missing[0]}")
    except Exception as error:  # what damaged files raise is as many things as there are files
        was, must = f"{folder} ({type(error).__name__}: {error})", "a whole Hugging Face checkpoint of "
        raise OptionError("generate", "--model", was, must + ", ".join(FAMILIES)) from error
    return loaded[0], tokenizer


def _measure(cache: Any, summary: Summary) -> None:
    delta = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    attention = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer not in delta]
    states = (x for layer in delta for x in (*layer.conv_states.values(), *layer.recurrent_states.values()))
    summary.state_bytes = sum(x.nbytes for x in states if x is not None)
    summary.kv_bytes = sum(attention)
    summary.replaced_kv_bytes = len(delta) * max(attention, default=0)


def score(
    model: HybridLM, text: bytes, *, state_dtype: torch.dtype = torch.float32,
    track: Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]] = iter,
) -> float:  # fmt: skip
    """Bits per byte of ``text`` under ``model``, in windows of the model's positions that each start from nothing.

    ``track`` goes through the list of all steps (first window, token), and may show how far it has come.

    Raises:
        OptionError: the text has fewer than 2 bytes.
    """
    device, window, predictions = model.embedding.weight.device, model.config.max_positions, len(text) - 1
    if predictions < 1:
        raise OptionError("score", "the text", f"{len(text)} bytes long", "at least 2 bytes long")
    short = -predictions % window  # the last window is filled up with targets that do not count
    inputs = torch.tensor([*text[:-1], *[0] * short], device=device).view(-1, window)
    targets = torch.tensor([*text[1:], *[UNCOUNTED] * short], device=device).view(-1, window)
    first_rows = range(0, len(inputs), ROWS)
    steps = [(first, t) for first in first_rows for t in range(min(window, predictions - first * window))]
    nats = 0.0
    for first, together in groupby(track(steps), key=itemgetter(0)):
        given, wanted = inputs[first : first + ROWS], targets[first : first + ROWS]
        session = Session(model.config, rows=len(given), state_dtype=state_dtype, device=device)
        for _, t in together:
            logits = model(given[:, t : t + 1], session)[:, 0].double()
            session.keep(1)
            nats += F.cross_entropy(logits, wanted[:, t], reduction="sum", ignore_index=UNCOUNTED).item()
    return nats / predictions / math.log(2)
