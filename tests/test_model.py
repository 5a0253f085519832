"""The small model: sessions in steps, drafts, sampling, generated text and bits per byte."""

from __future__ import annotations

import copy
import math
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gated_delta.config import GatedDeltaNetConfig
from gated_delta.errors import OptionError
from gated_delta.layer import GatedDeltaNetAttention
from gated_delta.model.generation import (
    LONGEST_MATCH,
    ROWS,
    SHORTEST_MATCH,
    Options,
    Sampler,
    Summary,
    generate,
    look_up,
    score,
)
from gated_delta.model.network import Block, HybridConfig, HybridLM, Session, load_model
from gated_delta.testing.budget import assert_within_budget, judge
from layer_helpers import normal

TINY = HybridConfig(
    hidden_size=32, layers=4, attention_every=2, attention_heads=2, mlp_size=48, max_positions=64,
    delta_net=GatedDeltaNetConfig(hidden_size=32, num_k_heads=1, num_v_heads=2, head_k_dim=32, head_v_dim=32),
)  # fmt: skip

bundled = cache(load_model)


@cache
def tiny() -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(TINY).requires_grad_(False)


def walk(model: HybridLM, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits with every Gated Delta Net layer token by token in ``dtype``."""
    model = copy.deepcopy(model).to(dtype)
    x = model.embedding(tokens)
    for block in model.blocks:
        assert isinstance(block, Block)
        hidden, mixer = block.mixer_norm(x), block.mixer
        if isinstance(mixer, GatedDeltaNetAttention):
            x = x + mixer.evaluate(hidden, token_by_token=True, dtype=dtype)
        else:
            x = x + mixer(hidden)
        x = x + block.mlp(block.mlp_norm(x))
    return F.linear(model.norm(x), model.embedding.weight)


# --- sessions ---------------------------------------------------------------------------------------------------------

PLANS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "one prefill": (0, [(50, 50)]),
    "prefill and decodes": (0, [(20, 20), *[(1, 1)] * 10]),
    "pieces and decodes": (0, [(7, 7), (33, 33), (1, 1), (2, 2), (1, 1)]),
    "all drafts right": (3, [(9, 9), *[(4, 4)] * 6]),
    "all drafts wrong": (3, [(9, 9), *[(4, 1)] * 8]),
    "every count after every other": (
        3,
        [(1, 1), *((4, n) for n in (1, 1, 2, 1, 3, 1, 4, 2, 2, 3, 2, 4, 3, 3, 4, 4, 1))],
    ),
    "ragged": (4, [(2, 2), (1, 1), (5, 3), (2, 1), (1, 1), (4, 4), (3, 2), (5, 5), (2, 2), (1, 1), (5, 1)]),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_steps_of_a_session_are_the_whole_sequence(name: str, rows: int) -> None:
    drafts, plan = PLANS[name]
    model, generator = tiny(), torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (rows, sum(kept for _, kept in plan)), generator=generator)
    session, outputs = Session(TINY, rows=rows, drafts=drafts), []
    for step, kept in plan:
        done = session.length
        wrong = torch.randint(256, (rows, step - kept), generator=generator)
        logits = model(torch.cat((tokens[:, done : done + kept], wrong), 1), session)
        assert logits.shape == (rows, step, 256)
        session.keep(kept)
        outputs.append(logits[:, :kept])
    plain, exact = (walk(model, tokens, dtype) for dtype in (torch.float32, torch.float64))
    assert_within_budget("steps", torch.cat(outputs, 1), plain, exact)
    assert_within_budget("whole", model(tokens), plain, exact)


def test_forgotten_rollback_would_show() -> None:
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    plain, exact = (walk(tiny(), tokens, dtype) for dtype in (torch.float32, torch.float64))
    for forgotten in (False, True):
        session, outputs = Session(TINY, drafts=3), []
        for done, step, kept in ((0, 8, 8), (8, 4, 2), (10, 4, 4), (14, 2, 2)):
            own = tokens[:, done : done + step].clone()
            own[:, kept:] = 7
            outputs.append(tiny()(own, session)[:, :kept])
            session.keep(kept)
            if forgotten:
                session._accepted = step if done else 1
        assert judge("logits", torch.cat(outputs, 1), plain, exact).within != forgotten


def test_a_session_refuses_what_it_cannot_undo() -> None:
    session = Session(TINY, drafts=3)
    for tokens, refused in ((5, (4, 6, 0)), (4, (5, 0))):
        session.begin(tokens)
        for count in refused:
            with pytest.raises(OptionError, match=r"Session\.keep: tokens is "):
                session.keep(count)
        session.keep(tokens)
    whole = Session(TINY)
    whole.begin(9)
    whole.keep(9)
    with pytest.raises(OptionError, match="at most 64, the model's positions"):
        whole.begin(56)
    whole.begin(55)


# --- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "count", "guess"),
    [
        (b"abcdef abc", 3, b"def"),
        (b"abcX abcY abc", 1, b"Y"),  # the latest
        (b"1abc2 9abc8 1abc", 1, b"2"),  # the longest
        (b"Zabcdefghijkl1 abcdefghijkl2 Zabcdefghijkl", 1, b"2"),  # longer matches than 12 are not looked for
        (b"aaaa", 3, b"a"),  # it may overlap the ending
        (b"abcabc", 9, b"abc"),  # no more than there is
        (b"abcabc", 0, b""),
        (b"xab yab", 3, b""),  # shorter than the shortest match
        (b"abcdef", 3, b""),
        (b"abc", 3, b""),
        (b"", 3, b""),
    ],
)
def test_look_up(context: bytes, count: int, guess: bytes) -> None:
    assert look_up(context, count) == guess


@given(st.text("ab ", max_size=40), st.integers(0, 5))
@settings(derandomize=True, deadline=None, max_examples=200, database=None)
def test_look_up_by_its_definition(text: str, count: int) -> None:
    context = text.encode()
    matches = [
        (size, end)
        for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1)
        for end in range(size, len(context))
        if context[end - size : end] == context[-size:]
    ]
    expected = context[max(matches)[1] :][:count] if matches else b""
    assert look_up(context, count) == expected


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafts", "tokens"), [(b"", b"\5"), (b"\5\6", b"\5\6\7"), (b"\5\1", b"\5\6"), (b"\1\6", b"\5"), (b"\5", b"\5\6")]
)
def test_greedy(drafts: bytes, tokens: bytes) -> None:
    logits = F.one_hot(torch.tensor([5, 6, 7][: len(drafts) + 1]), 256).float()
    assert Sampler(0.0, 0, torch.device("cpu"))(logits, drafts) == tokens


SYMBOLS, DRAWN, TEMPERATURE = 4, 10_000, 0.5


class DrawsFromAll(Sampler):
    """The known fault: what replaces a rejected draft is drawn as if nothing had been rejected."""

    def __call__(self, logits: Tensor, drafts: bytes) -> bytes:
        kept = super().__call__(logits, drafts)
        rejected = len(kept) <= len(drafts) and kept[-1] != drafts[len(kept) - 1]
        return kept[:-1] + super().__call__(logits[len(kept) - 1 : len(kept)], b"") if rejected else kept


def chi_squared(sampler: Sampler, drafted: int) -> float:
    """Three tokens at a time from a chain of four symbols, speculatively, against their exact probabilities."""
    table = torch.full((SYMBOLS, 256), -math.inf)
    table[:, :SYMBOLS] = normal(SYMBOLS, SYMBOLS, seed=0) * 0.5
    chances = torch.softmax(table[:, :SYMBOLS].double() / TEMPERATURE, -1)
    counts: Counter[bytes] = Counter()
    for _ in range(DRAWN):
        text = b"\0"
        while len(text) < 4:
            room = min(drafted, 3 - len(text))
            drafts = bytes((text[-1] + 1 + i) % SYMBOLS for i in range(room))
            text += sampler(table[[text[-1], *drafts]], drafts)
        counts[text] += 1
    total = 0.0
    for a, b, c in product(range(SYMBOLS), repeat=3):
        expected = DRAWN * (chances[0, a] * chances[a, b] * chances[b, c]).item()
        total += (counts[bytes([0, a, b, c])] - expected) ** 2 / expected
    assert counts.total() == DRAWN
    return total


@pytest.mark.parametrize("drafted", [0, 2])
def test_speculation_leaves_the_distribution_as_it_is(drafted: int) -> None:
    """63 degrees of freedom: beyond 132 once in a million."""
    assert chi_squared(Sampler(TEMPERATURE, 0, torch.device("cpu")), drafted) < 132


def test_a_forgotten_residual_distribution_would_show() -> None:
    assert chi_squared(DrawsFromAll(TEMPERATURE, 0, torch.device("cpu")), 2) > 500


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [
    b"And it came to pass in those days, that the king ", b"In the beginning ", b"The children of Israel ",
    b"Blessed is the man that ", b"And the LORD said unto Moses, ", b"Woe unto them that ", b"The words of the wise ",
    b"Now when he had spoken these things, ", b"hacker: n. A person who ", b"In the early days of computing, ",
    b"The programmer said that the machine ", b"This word is used among ", b"bogus: adj. ", b"The SQLite library ",
    b"A SELECT statement ", b"If the index is not ", b"The second argument to the function ",
    b"When a transaction is rolled back, ", b"The database file ", b"To open a file, first ",
]  # fmt: skip
TOKENS, DRAFTS = 100, 4


@cache
def run(prompt: bytes, drafts: int) -> tuple[Sequence[bytes], Summary]:
    """The pieces as they came, and the summary."""
    summary = Summary()
    return list(generate(bundled(), prompt, Options(tokens=TOKENS, drafts=drafts), summary)), summary


@pytest.mark.parametrize("prompt", PROMPTS)
def test_speculation_changes_no_greedy_text(prompt: bytes) -> None:
    plain, guessed = (b"".join(run(prompt, drafts)[0]) for drafts in (0, DRAFTS))
    assert len(plain) == TOKENS
    assert plain == guessed


def test_text_is_words() -> None:
    for prompt in PROMPTS:
        text = b"".join(run(prompt, 0)[0]).decode("ascii")
        assert set(text) <= set(string.printable)
        assert sum(c.isalpha() or c.isspace() for c in text) > 0.85 * len(text), text


def test_summary() -> None:
    kept_per_step = []
    for prompt, drafts in product(PROMPTS, (0, DRAFTS)):
        pieces, s = run(prompt, drafts)
        assert (s.prompt_tokens, s.tokens, s.steps) == (len(prompt), TOKENS, len(pieces) - 1)
        assert len(pieces[0]) == 1
        assert s.accepted == sum(len(piece) - 1 for piece in pieces) == TOKENS - 1 - s.steps
        assert s.accepted <= s.drafted <= drafts * s.steps
        assert s.tokens_per_step == 99 / s.steps
        assert s.prefill_rate == len(prompt) / s.prefill_seconds
        assert s.decode_rate == 99 / s.decode_seconds
        cached = len(prompt) + TOKENS - 1  # the last token is not fed back
        assert (s.kv_bytes, s.replaced_kv_bytes) == (2 * 2 * 256 * 4 * cached, 6 * 2 * 256 * 4 * cached)
        if drafts:
            kept_per_step.append(s.tokens_per_step)
        else:
            assert (s.drafted, s.state_bytes) == (0, 6 * 4 * (4 * 64 * 64 + 3 * 512))
    assert sum(kept_per_step) / len(PROMPTS) > 1.1


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
@pytest.mark.parametrize("drafts", [0, 4])
def test_number_of_tokens_is_exact(tokens: int, drafts: int) -> None:
    prompt = b"abcdefgh " * 5 + b"abc"
    assert len(b"".join(generate(bundled(), prompt, Options(tokens=tokens, drafts=drafts), Summary()))) == tokens


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_an_accepted_draft_is_not_one_too_many(tokens: int) -> None:
    """A model that says 0 whatever it reads, so that every draft is right."""
    model, summary = HybridLM(TINY).requires_grad_(False), Summary()
    model.embedding.weight.zero_()
    assert b"".join(generate(model, bytes(5), Options(tokens=tokens, drafts=4), summary)) == bytes(tokens)
    assert summary.accepted == summary.drafted == (tokens - 1) // 2


@pytest.mark.parametrize("drafts", [0, 4])
def test_prompt_and_text_may_fill_the_positions(drafts: int) -> None:
    prompt, summary = b"ab " * 19, Summary()
    assert len(b"".join(generate(tiny(), prompt, Options(tokens=7, drafts=drafts), summary))) == 7
    with pytest.raises(OptionError, match="at most 64 long"):
        next(generate(tiny(), prompt, Options(tokens=8, drafts=drafts), summary))


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_seed_names_a_text(drafts: int) -> None:
    first, again, other = (
        b"".join(generate(bundled(), PROMPTS[0], Options(tokens=30, drafts=drafts, temperature=0.8, seed=s), Summary()))
        for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


# --- bits per byte ----------------------------------------------------------------------------------------------------

KINGS = b"""\
And in the seventh year the waters rose in the valley, and the elders of the city went up to the house of the king, and
spake before him, saying, Behold, thy servants have neither bread nor seed. Then the king answered them, Open ye the
storehouses which my father built, and give to every man according to the number of his children.
"""
MANUAL = b"""\
Each page of the file begins with a short header, and the rest of it holds the cells of one tree. If a lookup cannot be
served from the index, the engine scans the whole table, which may be slow. Closing the handle releases every lock that
it holds, and changes that were not committed by then are undone the next time the file is opened.
"""


@cache
def windowed(window: int) -> HybridLM:
    """The bundled weights in a model of so many positions."""
    model = HybridLM(replace(bundled().config, max_positions=window))
    model.load_state_dict(bundled().state_dict())
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("window", "length"), [(64, 2), (64, 40), (64, 65), (64, 66), (64, 200), (8, 8 * ROWS + 1), (8, 8 * ROWS + 20)]
)
def test_score_is_bits_per_byte_of_the_windows(window: int, length: int) -> None:
    text, model = ((KINGS + MANUAL) * 2)[:length], windowed(window)
    nats = 0.0
    for first in range(0, length - 1, window):
        own = torch.tensor([list(text[first : first + window + 1])])
        nats += F.cross_entropy(model(own[:, :-1])[0].double(), own[0, 1:], reduction="sum").item()
    assert abs(score(model, text) - nats / (length - 1) / math.log(2)) < 1e-3


def test_steps_of_a_score_can_be_followed() -> None:
    seen: list[tuple[int, int]] = []
    score(windowed(8), bytes(8 * ROWS + 4), track=lambda steps: (seen.append(step) or step for step in steps))
    assert seen == [*((0, t) for t in range(8)), *((ROWS, t) for t in range(3))]


def test_score_uses_the_state_dtype() -> None:
    exact, rounded = (score(windowed(64), KINGS, state_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < abs(exact - rounded) < 0.02


@pytest.mark.parametrize("text", [KINGS, MANUAL], ids=["kings", "manual"])
def test_the_model_knows_english(text: bytes) -> None:
    assert score(bundled(), text) <= 2.2
