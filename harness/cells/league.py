"""The league: stacks of others, each a folder of `experiments/peers/`, and what is asked of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from alst_impl.config import Frozen, Tokens
from alst_impl.plugin import explain
from harness.cells import paths
from harness.cells.units import length_text
from harness.cells.yamls import read_yaml

States = Literal["device", "host"]
What = Literal["bytes", "longest", "gate"]
Data = TypeVar("Data", bound=Frozen)
OURS = ("alst", "chunked", "layerwise")
"""Rows of this project's own methods, which are run as those of others are."""


class Published(Frozen):
    """A number that a peer's authors published, and the run that it is of."""

    table: str
    """A file of `experiments/published/`, without `.csv`."""
    row: dict[str, Any]
    """Column -> value. Selects exactly one row of the table."""
    columns: dict[Literal["device_bytes", "allocated_bytes", "longest_tokens"], str]
    """Quantity -> the column with its value."""
    model: str
    gpus: int
    states: States
    seqlen: Tokens | None = None
    """Tokens of the run; None for a longest sequence."""


class Fault(Frozen):
    """An error that is known of a peer."""

    case: str
    """The case of the gate that shows it, or a short name."""
    what: str
    source: str


class Peer(Frozen):
    """`peer.yaml`: what a peer is, and what it can do."""

    title: str
    package: str
    """Distribution whose version is recorded."""
    url: str
    """Where its authors document the recipe."""
    recipe: str
    """What the script does."""
    idea: str
    """By what it saves memory."""
    differs: str | None
    """What it computes or places in another way than the other rows."""
    sequence_parallel: bool
    """Whether all ranks share one sample. Otherwise each has its own."""
    gpus: list[int]
    states: list[States]
    models: list[str]
    gate: list[str]
    """Cases that run under the gate."""
    gate_ranks: int | None = Field(default=None, gt=0)
    """CPU ranks under the gate, where they are not the league's."""
    cannot: dict[str, str] = {}
    """Case, or `gate` or `bytes` for all of them -> why it does not run."""
    patches: str | None
    faults: list[Fault] = []
    published: list[Published] = []


class Gating(Frozen):
    """What runs under the gate."""

    cell: dict[str, Any]
    """Settings of a cell, whose model, samples and truth are used."""
    ranks: int = Field(gt=0)
    """Of a peer whose ranks share samples; others run as one."""
    cases: dict[str, dict[str, Any]]
    """Name -> settings besides those of `cell`."""


class League(Frozen):
    """`league.yaml`: what every peer runs, where it can."""

    question: str
    hardware: str
    models: list[str]
    seqlens: list[Tokens]
    states: dict[int, States]
    """Number of GPUs -> where optimizer states are."""
    outside_gib: dict[int, float]
    """Number of GPUs -> GiB of a device outside PyTorch's allocator."""
    gate: Gating


class Task(Frozen):
    """One thing that one peer is asked."""

    peer: str
    what: What
    model: str = ""
    gpus: int = 0
    states: States = "device"
    seqlen: int = 0
    case: str = ""

    @property
    def key(self) -> str:
        """A readable name, usable as a file name."""
        if self.what == "gate":
            return f"{self.peer}-gate-{self.case}"
        asked = length_text(self.seqlen) if self.what == "bytes" else "longest"
        return f"{self.peer}-{self.model}-x{self.gpus}-{self.states}-{asked}"


def folder() -> Path:
    """The folder of all peers."""
    return paths.located(paths.EXPERIMENTS / "peers")


@cache
def league() -> League:
    """What is asked of every peer. Raises `ValueError` naming file and key."""
    return _read(folder() / "league.yaml", League)


@cache
def peers() -> dict[str, Peer]:
    """Every peer by the name of its folder; ours come last. Raises `ValueError` naming file and key."""
    found = {path.parent.name: _read(path, Peer) for path in sorted(folder().glob("*/peer.yaml"))}
    return dict(sorted(found.items(), key=lambda item: item[0] in OURS))


def tasks() -> dict[str, Task]:
    """Everything that is asked, by key."""
    return {task.key: task for name, peer in peers().items() for task in _tasks(name, peer)}


def _tasks(name: str, peer: Peer) -> Iterator[Task]:
    asked = league()
    for case in asked.gate.cases:
        if case in peer.gate:
            yield Task(peer=name, what="gate", case=case)
    if "bytes" in peer.cannot:
        return
    for model in (model for model in asked.models if model in peer.models):
        for gpus, states in asked.states.items():
            if gpus not in peer.gpus or states not in peer.states:
                continue
            place = Task(peer=name, what="longest", model=model, gpus=gpus, states=states)
            for seqlen in asked.seqlens:
                yield place.model_copy(update={"what": "bytes", "seqlen": seqlen})
            yield place


def _read(path: Path, kind: type[Data]) -> Data:
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ValueError(explain(error, str(path), sorted(kind.model_fields))) from None
