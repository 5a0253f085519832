"""Train the bundled language model on the text that build_corpus.py wrote.

    python scripts/train_model.py corpus OUT.safetensors        about 6 minutes on one H200

Keeps the weights with the best bits per byte on valid.txt, reports test.txt once at the end, and stores bf16 (A_log
in fp32, as the layer keeps it). Initial weights and batches come from --seed; sums over tokens on a GPU use atomics,
so two runs agree closely but not bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from gated_delta.model.network import HybridLM


def read(path: Path, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def bits_per_byte(model: HybridLM, text: Tensor, length: int, batch: int) -> float:
    """Mean over non-overlapping windows, each scored from an empty context."""
    rows = text[: (len(text) - 1) // length * length + 1]
    inputs, targets = rows[:-1].view(-1, length).long(), rows[1:].view(-1, length).long()
    total = 0.0
    for i in range(0, len(inputs), batch):
        with autocast(text.device):
            logits = model(inputs[i : i + batch])
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[i : i + batch].flatten(), reduction="sum")
        total += loss.item()
    return total / inputs.numel() / math.log(2)


def optimizer_for(model: HybridLM, rate: float) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def stored(model: HybridLM) -> dict[str, Tensor]:
    """A copy of the weights in the dtypes of the file."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith("A_log") else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    text, valid, test = (read(args.corpus / f"{kind}.txt", device) for kind in ("train", "valid", "test"))
    model = HybridLM().to(device)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("out_proj.weight", "out.weight", "down.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * model.config.layers) if residual else 1))
    optimizer = optimizer_for(model, args.rate)
    window = torch.arange(args.length + 1, device=device)
    best, kept, kept_step, started = math.inf, {}, 0, time.monotonic()
    note_column = TextColumn("{task.fields[note]}")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), note_column)
    with Progress(*columns, refresh_per_second=0.2) as progress:
        task = progress.add_task("training", total=args.steps, note="")
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps, args.warmup)
            starts = torch.randint(len(text) - args.length - 1, (args.batch, 1), device=device)
            rows = text[starts + window].long()
            with autocast(device):
                logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.advance(task)
            if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
                bits = bits_per_byte(model, valid, args.length, args.batch)
                if bits < best:
                    best, kept, kept_step = bits, stored(model), step + 1
                note = f"train {loss.item() / math.log(2):.3f} valid {bits:.3f} bits/byte"
                progress.update(task, note=note)
                print(f"step {step + 1} {note} {time.monotonic() - started:.0f} s", flush=True)
    model.load_state_dict(kept)
    score = bits_per_byte(model, test, args.length, args.batch)
    facts = {
        "bits_per_byte_test": f"{score:.4f}",
        "bits_per_byte_valid": f"{best:.4f}",
        "trained_on": f"step {kept_step} of {args.steps} steps of {args.batch} x {args.length} bytes, seed {args.seed}",
        "text": "King James Bible, Jargon File 4.4.7, SQLite documentation (all public domain, from Debian)",
    }
    save_file(kept, args.out, metadata=facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())
