"""What is measured: the head layouts of real models, batches and sequences that engines see, and forms of operators."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from gated_delta.errors import OptionError
from gated_delta.validation.arguments import HEAD_SIZES

STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GATES = ("none", "weak", "mix", "model")
GROUPS = ("prefill", "decode", "verify", "conv", "norm", "host", "layer")
DEFAULT_GROUPS = GROUPS[:-1]


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


class Model(NamedTuple):
    """Where a layout comes from."""

    name: str
    hidden: int
    """Width of its hidden states, for whole layers."""


MODELS: dict[Heads, Model] = {
    Heads(2, 8): Model("Qwen3.5 397B on 8 GPUs", 4096),
    Heads(4, 16): Model("Qwen3.5 397B on 4 GPUs", 4096),
    Heads(8, 32): Model("Qwen3.5 397B on 2 GPUs", 4096),
    Heads(16, 16): Model("Qwen3.5 2B", 2048),
    Heads(16, 32): Model("Qwen3-Next 80B, Qwen3.5 35B", 2048),
    Heads(8, 24): Model("Qwen3.5 27B on 2 GPUs", 5120),
    Heads(16, 48): Model("Qwen3.5 27B", 5120),
    Heads(16, 64): Model("Qwen3.5 397B", 4096),
    Heads(30, 30, 96, 192): Model("OLMo-hybrid 7B", 3840),
}

RAGGED = {
    "ragged-chat": (17, 3400, 260, 1203, 88, 5900, 640, 31, 2048, 777, 450, 1570),
    "ragged-mixed": (16000, 513, 1, 64, 9000, 127, 65, 2300, 1, 310, 4000, 387),
}
"""Serving mixes: prompts of very different lengths prefilled together."""

SEQUENCES = (
    "1x2048", "1x8192", "1x32768", "1x131072", "28672+4096", "2048x4", "1024x8", "4096x8", "8192x16", "256x64",
    "64x256",
)  # fmt: skip
MORE_SEQUENCES = ("1x4096", "1x16384", "1x65536", *RAGGED)
"""Besides :data:`SEQUENCES`, with ``--seqs all``."""


def parse_sequences(word: str) -> tuple[int, ...]:
    """Lengths of ``1x8192`` (one of 8192), ``2048x4`` (four of 2048; the length stands first unless the sequence is
    alone), ``28672+4096`` or a name of :data:`RAGGED`.
    """
    if word in RAGGED:
        return RAGGED[word]
    if match := re.fullmatch(r"1x(\d+)", word):
        lengths: tuple[int, ...] = (int(match[1]),)
    elif match := re.fullmatch(r"(\d+)x(\d+)", word):
        lengths = (int(match[1]),) * int(match[2])
    elif re.fullmatch(r"\d+(\+\d+)*", word):
        lengths = tuple(map(int, word.split("+")))
    else:
        lengths = ()
    if not lengths or min(lengths) < 1:
        must = f"like 1x8192 (one of 8192), 2048x4 (four of 2048), 28672+4096, or one of {', '.join(RAGGED)}"
        raise OptionError("bench", "--seqs", repr(word), must)
    return lengths


def parse_heads(word: str) -> Heads:
    """``16/32``, or with head sizes ``16/32@64/128``; the sizes of a known layout are those of its model."""
    match = re.fullmatch(r"(\d+)/(\d+)(?:@(\d+)/(\d+))?", word)
    heads = None if match is None else Heads(*(int(x) for x in match.groups() if x is not None))
    if match is not None and heads is not None and match[3] is None:
        heads = next((known for known in MODELS if known[:2] == heads[:2]), heads)
    bad = heads is None or heads.h < 1 or heads.hv < 1 or heads.hv % heads.h or not {heads.k, heads.v} <= {*HEAD_SIZES}
    if heads is None or bad:
        sizes = ", ".join(map(str, HEAD_SIZES))
        must = f"like 16/32 (q and k heads / v heads, a multiple), or 16/32@64/128 with head sizes among {sizes}"
        raise OptionError("bench", "--heads", repr(word), must)
    return heads


@dataclass(frozen=True)
class Case:
    """One call of one operator, as everybody has to do it."""

    group: str
    """What it is shown under; "host" measures the time of a call on the host instead of on the device."""
    operation: str
    """"prefill", "decode", "verify", "conv", "norm" or "layer"."""
    heads: Heads
    form: str = ""
    """How: see :data:`FORMS`."""
    sequences: str = ""
    """Lengths as :func:`parse_sequences` reads them; "" for a step of ``batch`` rows."""
    batch: int = 0
    tokens: int = 1
    """Tokens a row of a step."""
    state: str = "fp32"
    gates: str = "model"

    @property
    def lengths(self) -> tuple[int, ...]:
        return parse_sequences(self.sequences) if self.sequences else (self.tokens,) * self.batch

    @property
    def size(self) -> str:
        """The part of the name that says how much."""
        if self.sequences:
            return self.sequences
        return f"T={self.tokens} B={self.batch}" if self.operation == "verify" else f"B={self.batch}"

    @property
    def name(self) -> str:
        with_state = self.operation in ("decode", "verify")
        words = (str(self.heads), self.form, self.state if with_state else "", self.size)
        return " ".join(word for word in words if word)

    def dump(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(given: dict[str, Any]) -> Case:
        return Case(**{**given, "heads": Heads(*given["heads"])})


FORMS = {
    "prefill": ("",),
    "decode": ("V-major", "pool", "K-major"),
    "verify": ("outputs", "final", "snapshots", "slots"),
    "conv": ("prefill", "update W", "update D"),
    "norm": ("",),
    "layer": ("prefill", "decode"),
}
"""decode: one state a row ``[V, K]``, the same in a pool, one state a row ``[K, V]``. verify: what is kept beside the
outputs (nothing, the final state, the state after every token in a buffer, the same in pool slots). conv: packed
sequences, or one token a row with the state's window (W) or channels (D) contiguous."""


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; None is the default of each group."""

    groups: Sequence[str] = DEFAULT_GROUPS
    heads: Sequence[Heads] | None = None
    sequences: Sequence[str] | None = None
    batches: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    states: Sequence[str] = ("fp32", "bf16")
    gates: Sequence[str] = ("model",)
    quick: bool = False
    small: bool = False
    """For a CPU: fewer heads, shorter sequences, smaller batches."""


def _prefill(s: Selection) -> Iterator[Case]:
    layouts = s.heads or _layouts(s, [(2, 8), (4, 16), (16, 32), (16, 48), (16, 64)])
    sequences = s.sequences or (("1x128", "1x512", "64x4") if s.small else SEQUENCES)
    if s.quick and not s.sequences:
        sequences = ("1x128",) if s.small else ("1x2048", "1x8192", "4096x8", "64x256")
    for heads in layouts:
        for word in sequences:
            if s.sequences or heads.hv <= 32 or sum(parse_sequences(word)) <= 32768:  # the largest say nothing new
                yield Case("prefill", "prefill", heads, sequences=word)


def _layouts(s: Selection, full: list[tuple[int, int]]) -> list[Heads]:
    if s.small:
        return [Heads(2, 4)]
    return [Heads(2, 8), Heads(16, 32)] if s.quick else [Heads(*pair) for pair in full]


def _decode(s: Selection) -> Iterator[Case]:
    main = Heads(2, 4) if s.small else Heads(16, 32)
    batches = s.batches or ((1, 4) if s.small else (1, 8, 64, 256) if s.quick else (1, 4, 8, 16, 32, 64, 128, 256, 512))
    layouts = s.heads or (
        main,
        *(heads for heads in _layouts(s, [(2, 8), (4, 16), (16, 48), (16, 64)]) if heads != main),
    )
    for heads in layouts:
        for state in s.states:
            for form in ("V-major" if state == "fp32" else "pool", "K-major"):
                for batch in batches if s.batches or heads == main else [n for n in batches if n in (1, 8, 64)]:
                    yield Case("decode", "decode", heads, form, batch=batch, state=state)


def _verify(s: Selection) -> Iterator[Case]:
    layouts = s.heads or [Heads(2, 4) if s.small else Heads(16, 32)]
    batches = s.batches or ((1, 4) if s.small else (1, 64) if s.quick else (1, 8, 64, 256))
    for heads in layouts:
        for tokens in s.tokens or ((4,) if s.quick or s.small else (2, 4, 8)):
            for form in FORMS["verify"]:
                if form == "slots" and tokens < 2:
                    continue
                for state in s.states:
                    for batch in batches:
                        yield Case("verify", "verify", heads, form, batch=batch, tokens=tokens, state=state)


def _conv(s: Selection) -> Iterator[Case]:
    for heads in s.heads or [Heads(2, 4) if s.small else Heads(16, 32)]:
        for word in s.sequences or (("1x512",) if s.small else ("1x8192", "64x256")):
            yield Case("conv", "conv", heads, "prefill", sequences=word)
        for form in FORMS["conv"][1:]:
            for batch in s.batches or ((1, 4) if s.small else (1, 64, 512)):
                yield Case("conv", "conv", heads, form, batch=batch)


def _norm(s: Selection) -> Iterator[Case]:
    for heads in s.heads or [Heads(2, 4) if s.small else Heads(16, 32)]:
        for batch in s.batches or ((64,) if s.small else (1, 64, 512, 8192)):
            yield Case("norm", "norm", heads, batch=batch)


def _host(s: Selection) -> Iterator[Case]:
    for heads in s.heads or [Heads(2, 4) if s.small else Heads(2, 8)]:
        for form, state in (("V-major", "fp32"), ("V-major allocated", "fp32"), ("pool", "bf16"), ("K-major", "fp32")):
            yield Case("host", "decode", heads, form, batch=1, state=state)
        for form in ("outputs", "snapshots"):
            yield Case("host", "verify", heads, form, batch=1, tokens=4)
        yield Case("host", "prefill", heads, sequences="1x64")
        yield Case("host", "conv", heads, "update W", batch=8)
        yield Case("host", "norm", heads, batch=8)


def _layer(s: Selection) -> Iterator[Case]:
    for heads in s.heads or [Heads(2, 4) if s.small else Heads(16, 32)]:
        for word in s.sequences or (("1x256",) if s.small else ("1x2048", "1x8192")):
            yield Case("layer", "layer", heads, "prefill", sequences=word)
        for batch in s.batches or ((1, 4) if s.small else (1, 8, 64, 256)):
            yield Case("layer", "layer", heads, "decode", batch=batch)


_OF_GROUP = {
    "prefill": _prefill, "decode": _decode, "verify": _verify, "conv": _conv, "norm": _norm, "host": _host,
    "layer": _layer,
}  # fmt: skip


def select(s: Selection) -> list[Case]:
    """The cases of a selection, each once with each set of gates where gates matter."""
    cases: list[Case] = []
    for group in s.groups:
        for case in _OF_GROUP[group](s):
            gates = s.gates if case.operation in ("prefill", "decode", "verify") and group != "host" else s.gates[:1]
            cases += [Case(**{**case.__dict__, "gates": name}) for name in gates]
    return list(dict.fromkeys(cases))
