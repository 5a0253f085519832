"""Contenders: us, and every other implementation that is installed.

Each has an adapter, a function of ``(case, x)``: it translates one set of inputs ``x`` to the peer's conventions, which
is not timed, and gives what is timed (a :class:`Bound`), or None for a case that the peer can't do. It imports the peer
when it is called.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

from gated_delta.bench.cases import Case
from gated_delta.bench.inputs import Inputs
from gated_delta.errors import OptionError
from gated_delta.testing.oracle import Results

OURS, SEPARATE = "gated-delta", "separate"


class Peer(NamedTuple):
    """One contender."""

    adapter: str
    """Module of this package, and the function there."""
    package: str
    """Looked for, to say whether the peer is there."""
    distribution: str
    """Whose version is recorded."""
    devices: tuple[str, ...]


PEERS = {
    OURS: Peer("ours.bind", "gated_delta", "gated-delta", ("cpu", "cuda")),
    SEPARATE: Peer("ours.separate", "gated_delta", "gated-delta", ("cuda",)),
    "flashinfer": Peer("ours.flashinfer", "flashinfer", "flashinfer-python", ("cuda",)),
    "flashqla": Peer("fla.flashqla", "flash_qla", "flash-qla", ("cuda",)),
    "fla": Peer("fla.bind", "fla", "fla-core", ("cpu", "cuda")),
    "transformers": Peer("fla.transformers", "transformers", "transformers", ("cpu",)),
}
OTHERS = tuple(PEERS)[2:]


class Bound(NamedTuple):
    """A contender with one set of inputs in its own conventions."""

    call: Callable[[], object]
    results: Callable[[], Results]
    """What the last call wrote, where the case asks for it."""


def returning(call: Callable[[], Any], read: Callable[..., Results]) -> Bound:
    """A call that returns one result or a tuple of them; they are let go when the next call has returned."""
    last: list[Any] = []

    def run() -> None:
        returned = call()
        last[:] = returned if isinstance(returned, tuple) else (returned,)

    return Bound(run, lambda: read(*last))


def bind(name: str, case: Case, x: Inputs) -> Bound | None:
    """The contender ``name`` with the inputs ``x`` of a case, None if it can't do the case."""
    module, function = PEERS[name].adapter.split(".")
    return getattr(import_module(f"{__name__}.{module}"), function)(case, x)


def choose(words: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Contenders on ``device`` for the words after ``--peers``, and why others that are known are absent.

    Raises:
        OptionError: an unknown name, or a peer asked for by name that can't run here.
    """
    named = [word for word in words if word not in ("auto", "none")]
    chosen, absent = [name for name in (OURS, SEPARATE) if device in PEERS[name].devices], {}
    for name in dict.fromkeys((*named, *(OTHERS if "auto" in words else ()))):
        if name not in OTHERS:
            absent[name] = "there is no such adapter"
        elif find_spec(PEERS[name].package) is None:
            absent[name] = "it is not installed"
        elif device not in PEERS[name].devices:
            absent[name] = f"it does not run on {device}"
        else:
            chosen.append(name)
        if name in named and name in absent:
            raise OptionError("bench", "--peers", repr(name), f"auto, none, or of {', '.join(OTHERS)}: {absent[name]}")
    return chosen, absent


def version_of(name: str) -> str:
    """The installed version of a contender, "" if it has none."""
    try:
        return version(PEERS[name].distribution)
    except PackageNotFoundError:
        return ""
