"""Contenders: us, and every other implementation that is installed.

An adapter is a module with

* ``PACKAGE``: what is imported (looked for, not imported, to say whether the peer is there), None if nothing is needed;
* ``DISTRIBUTION``: whose version is recorded; ``DEVICES``: where it runs, of "cpu" and "cuda";
* ``contenders(case, device)``: the ways in which it does a case there, none if it can't.

An adapter translates our arguments to the peer's conventions when it binds a set of inputs, which is not timed; what
is timed is the call. A dotted name after ``--peers`` is an adapter of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.errors import OptionError

OURS = "gated-delta"
KNOWN = ("flashinfer", "flashqla", "fla", "transformers")
ALWAYS = ("ours", "reference")
"""Adapters of this package itself."""


class Bound(NamedTuple):
    """A contender with one set of inputs in its own conventions."""

    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    """What the last call wrote: "output" ``[..., HV, V]`` and, where the case asks for them, "state" and "kept"
    ``[..., V, K]``."""


def returning(call: Callable[[], Any], read: Callable[..., dict[str, Tensor]]) -> Bound:
    """A call that returns its results; they are let go when the next call has returned."""
    last: list[Any] = []

    def run() -> None:
        last[:] = call()

    return Bound(run, lambda: read(*last))


class Contender(NamedTuple):
    """One way to do a case."""

    name: str
    bind: Callable[[Inputs], Bound]


class Adapter(Protocol):
    PACKAGE: str | None
    DISTRIBUTION: str | None
    DEVICES: tuple[str, ...]

    def contenders(self, case: Case, device: str) -> list[Contender]: ...


def load(name: str) -> Adapter:
    """The adapter called ``name``: one of ours, or a dotted module name."""
    return cast(Adapter, import_module(name if "." in name else f"{__name__}.{name}"))


def choose(words: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Adapters to run on ``device`` for the words after ``--peers``, and why the other known ones are absent.

    Raises:
        OptionError: an unknown name, or a peer asked for by name that can't run here.
    """
    absent: dict[str, str] = {}
    always = [name for name in ALWAYS if device in load(name).DEVICES]
    if list(words) == ["none"]:
        return always, absent
    named = [word for word in words if word != "auto"]
    chosen = []
    for name in dict.fromkeys((*(KNOWN if len(named) < len(words) else ()), *named)):
        reason = _missing(name, device)
        if reason is None:
            chosen.append(name)
        elif name in named:
            raise OptionError("bench", "--peers", repr(name), f"auto, none, or of {', '.join(KNOWN)}: {reason}")
        else:
            absent[name] = reason
    return [*always, *chosen], absent


def _missing(name: str, device: str) -> str | None:
    """Why an adapter can't run, if it can't."""
    if "." not in name and name not in KNOWN:
        return "there is no such adapter"
    try:
        adapter = load(name)
    except ImportError as error:
        return f"its adapter cannot be imported ({error})"
    if adapter.PACKAGE is not None and find_spec(adapter.PACKAGE) is None:
        return "it is not installed"
    return None if device in adapter.DEVICES else f"it does not run on {device}"


def version_of(name: str) -> str:
    """The installed version of a peer, "" if it has none."""
    distribution = load(name).DISTRIBUTION
    try:
        return "" if distribution is None else version(distribution)
    except PackageNotFoundError:
        return ""
