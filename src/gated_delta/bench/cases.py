"""What is measured: the head layouts of real models, batches and sequences that engines see, and forms of operators."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from gated_delta.validation.arguments import HEAD_SIZES

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = ("none", "weak", "mix", "model")
STEPS = ("decode", "verify", "step")
"""Operations on a batch of rows with a state each."""
RULES = ("prefill", *STEPS)
"""Operations that apply the gated delta rule."""

OPERATORS = {
    "prefill": "chunk_gated_delta_rule", "decode": "gated_delta_rule_decode_pretranspose",
    "decode K-major": "gated_delta_rule_decode", "verify": "gated_delta_rule_mtp", "step": "gated_delta_net_step",
    "conv": "causal_conv1d_update", "conv prefill": "causal_conv1d", "norm": "rms_norm_gated",
}  # fmt: skip
"""Ours, by operation, or operation and form."""


class Heads(NamedTuple):
    """``h`` heads of q and k (size ``k``) and ``hv`` of v (size ``v``)."""

    h: int
    hv: int
    k: int = 128
    v: int = 128

    def __str__(self) -> str:
        sizes = "" if (self.k, self.v) == (128, 128) else f"@{self.k}/{self.v}"
        return f"{self.h}/{self.hv}{sizes}"

    @property
    def conv_dim(self) -> int:
        return 2 * self.h * self.k + self.hv * self.v


MODELS: dict[Heads, tuple[str, int]] = {
    Heads(2, 8): ("Qwen3.5 397B on 8 GPUs", 4096),
    Heads(4, 16): ("Qwen3.5 397B on 4 GPUs", 4096),
    Heads(8, 32): ("Qwen3.5 397B on 2 GPUs", 4096),
    Heads(16, 16): ("Qwen3.5 2B", 2048),
    Heads(16, 32): ("Qwen3-Next 80B, Qwen3.5 35B", 2048),
    Heads(8, 24): ("Qwen3.5 27B on 2 GPUs", 5120),
    Heads(16, 48): ("Qwen3.5 27B", 5120),
    Heads(16, 64): ("Qwen3.5 397B", 4096),
    Heads(30, 30, 96, 192): ("OLMo-hybrid 7B", 3840),
}
"""Where a layout comes from, and the width of the hidden states there."""
NO_MODEL = "", 256

RAGGED = {
    "ragged-chat": (17, 3400, 260, 1203, 88, 5900, 640, 31, 2048, 777, 450, 1570),
    "ragged-mixed": (16000, 513, 1, 64, 9000, 127, 65, 2300, 1, 310, 4000, 387),
}
"""Serving mixes: prompts of very different lengths prefilled together."""
_WORDS = "1x2048 1x8192 1x32768 1x131072 28672+4096 2048x4 1024x8 4096x8 8192x16 256x64 64x256"
SEQUENCES = (*_WORDS.split(), "1x4096", "1x16384", "1x65536", *RAGGED)
"""With ``--seqs all``."""


def parse_sequences(word: str) -> tuple[int, ...]:
    """Lengths of ``1x8192`` (one of 8192), ``2048x4`` (four of 2048; the length stands first unless the sequence is
    alone), ``28672+4096`` or a name of :data:`RAGGED`. Raises ValueError with what the word must be.
    """
    lengths: tuple[int, ...] = RAGGED.get(word, ())
    if re.fullmatch(r"\d+x\d+", word):
        length, count = map(int, word.split("x"))
        lengths = (count,) if length == 1 else (length,) * count
    elif re.fullmatch(r"\d+(\+\d+)*", word):
        lengths = tuple(map(int, word.split("+")))
    if min(lengths, default=0) < 1:
        raise ValueError(f"like 1x8192 (one of 8192), 2048x4 (four of 2048), 28672+4096, or one of {', '.join(RAGGED)}")
    return lengths


def parse_heads(word: str) -> Heads:
    """``16/32``, or ``16/32@64/128`` with head sizes, else a model's. Raises ValueError with what it must be."""
    match = re.fullmatch(r"(\d+)/(\d+)(?:@(\d+)/(\d+))?", word)
    heads = Heads(*(int(x) for x in match.groups() if x)) if match else Heads(0, 0)
    if heads.h < 1 or heads.hv < 1 or heads.hv % heads.h or not {heads.k, heads.v} <= {*HEAD_SIZES}:
        sizes = ", ".join(map(str, HEAD_SIZES))
        raise ValueError(f"like 16/32 (q and k heads / v heads, a multiple), or 16/32@64/128 with sizes among {sizes}")
    return heads if "@" in word else next((known for known in MODELS if known[:2] == heads[:2]), heads)


@dataclass(frozen=True)
class Case:
    """One call of one operator, as everybody has to do it."""

    group: str
    """What it is shown under; "host" measures the time of a call on the host instead of on the device."""
    operation: str
    """"prefill", "decode", "verify", "step", "conv", "norm" or "layer"."""
    heads: Heads
    form: str = ""
    """How: see :data:`PLAN`."""
    sequences: str = ""
    """Lengths as :func:`parse_sequences` reads them; "" for a step of ``batch`` rows."""
    batch: int = 0
    tokens: int = 1
    """Tokens a row of a step."""
    state: str = "fp32"
    gates: str = "model"

    @property
    def operator(self) -> str:
        """The name of ours that does it."""
        return OPERATORS.get(f"{self.operation} {self.form}") or OPERATORS[self.operation]

    @property
    def lengths(self) -> tuple[int, ...]:
        return parse_sequences(self.sequences) if self.sequences else (self.tokens,) * self.batch

    @property
    def size(self) -> str:
        """The part of the name that says how much."""
        tokens = f"T={self.tokens} " if self.operation == "verify" else ""
        return self.sequences or f"{tokens}B={self.batch}"

    @property
    def name(self) -> str:
        operation = self.operation if self.group in ("host", "layer") and self.operation != "layer" else ""
        state = self.state if self.operation in STEPS else ""
        return " ".join(filter(None, (operation, str(self.heads), self.form, state, self.size)))


class Line(NamedTuple):
    """Cases of a group. What the command line does not name is taken from here, written "in full|quick|on a CPU" where
    these differ; what is left out is as the one before.
    """

    group: str
    operation: str
    forms: tuple[str, ...]
    heads: str
    sizes: str
    """Sequences if they have an x, batches otherwise."""
    tokens: str = "1"


_ONE = "16/32||2/4"
_MANY = "16/32 2/8 4/16 16/48 16/64|16/32 2/8|2/4"
PLAN = (
    Line("prefill", "prefill", ("",), _MANY, f"{_WORDS}|1x2048 1x8192 4096x8 64x256|1x128 1x512 64x4"),
    Line("decode", "decode", ("V-major", "pool", "K-major"), _MANY, "1 4 8 16 32 64 128 256 512|1 8 64 256|1 4"),
    Line("verify", "verify", ("outputs", "final", "snapshots", "slots"), _ONE, "1 8 64 256|1 64|1 4", "2 4 8|4"),
    Line("step", "step", ("",), _ONE, "1 8 64||1 4"),
    Line("conv", "conv", ("prefill",), _ONE, "1x8192 64x256||1x512"),
    Line("conv", "conv", ("update W", "update D"), _ONE, "1 64 512||1 4"),
    Line("norm", "norm", ("",), _ONE, "1 64 512 8192||64"),
    Line("host", "decode", ("V-major", "pool", "K-major"), "2/8||2/4", "1"),
    Line("host", "verify", ("outputs", "snapshots"), "2/8||2/4", "1", "4"),
    Line("host", "prefill", ("",), "2/8||2/4", "1x64"),
    Line("host", "conv", ("update W",), "2/8||2/4", "8"),
    Line("host", "norm", ("",), "2/8||2/4", "8"),
    *(
        Line("layer", operation, forms, heads, sizes)
        for operation, forms in (("layer", ("prefill", "prefill core")), ("prefill", ("",)))
        for heads, sizes in (("16/64||2/4", "1x32768||1x256"), (_ONE, "1x2048 1x8192||1x256"))
    ),
    Line("layer", "layer", ("decode", "decode core"), _ONE, "1 8 64 256||1 4"),
    Line("layer", "decode", ("V-major",), _ONE, "1 8 64 256||1 4"),
)
"""Forms of decode: one fp32 state a row ``[V, K]``, 16-bit ones in a pool, one state a row ``[K, V]``. verify: what is
kept beside the outputs (nothing, the final state, the state after every token in a buffer, the same in pool slots).
conv: packed sequences, or one token a row with the state's window (W) or channels (D) contiguous. layer: whole, without
its projections (core), and the rule alone."""
GROUPS = tuple(dict.fromkeys(line.group for line in PLAN))
DEFAULT_GROUPS = GROUPS[:-1]
_ONLY = {"V-major": ("fp32",), "pool": ("bf16", "fp16")}
"""States of forms that do not go with all."""


def select(
    groups: Sequence[str] = DEFAULT_GROUPS, *, heads: Sequence[Heads] = (), sequences: Sequence[str] = (),
    batches: Sequence[int] = (), tokens: Sequence[int] = (), states: Sequence[str] = ("fp32", "bf16"),
    gates: Sequence[str] = ("model",), quick: bool = False, small: bool = False,
) -> list[Case]:  # fmt: skip
    """The cases asked for, group by group; what is empty is taken from :data:`PLAN`, ``small`` for a CPU."""

    def default(text: str) -> list[str]:
        columns = text.split("|")[: 3 if small else 2 if quick else 1]
        return next(words for words in reversed(columns) if words).split()

    def wanted(case: Case) -> bool:
        """Leaves out what cannot be, and, where it is not named, what says nothing new."""
        if case.state not in _ONLY.get(case.form, (case.state,)) or (case.form == "slots" and case.tokens < 2):
            return False
        if case.group == "decode" and not batches and not small:
            return case.heads == (16, 32, 128, 128) or case.batch in (1, 8, 64)
        return case.group != "prefill" or bool(sequences) or case.heads.hv <= 32 or sum(case.lengths) <= 32768

    cases: list[Case] = []
    for line in (line for group in groups for line in PLAN if line.group == group):
        rule, packed = line.operation in RULES, "x" in line.sizes
        every = product(
            heads or [parse_heads(word) for word in default(line.heads)],
            (tokens if line.operation == "verify" else ()) or [int(word) for word in default(line.tokens)],
            line.forms,
            states if line.operation in STEPS else ("fp32" if rule else "",),
            (sequences or default(line.sizes)) if packed else ("",),
            (0,) if packed else batches or [int(word) for word in default(line.sizes)],
            ("",) if not rule else gates[:1] if line.group == "host" else gates,
        )
        for layout, count, form, state, word, batch, decay in every:
            cases.append(Case(line.group, line.operation, layout, form, word, batch, count, state, decay))
    return list(dict.fromkeys(case for case in cases if wanted(case)))
