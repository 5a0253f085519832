"""Text from a Hugging Face checkpoint: Transformers runs the model, our operators its Gated Delta Net layers."""

import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gated_delta.errors import OptionError
from gated_delta.interop import untested
from gated_delta.interop.transformers import FAMILIES, TESTED, patch
from gated_delta.model.generation import Options, Sampler, Summary, check_context
from gated_delta.validation.arguments import Arguments

_ARGUMENTS = Arguments("generate")


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
