"""What planners share: the request, the plan, and ways to cut and to spread documents. Imports no torch.

Legend: K documents of a global batch, N devices. A document is named by its place in `lengths`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from alst_impl.config import Frozen, Spec
from alst_impl.plugin import load

Lengths = NDArray[np.int64]
Seconds = NDArray[np.float64]
Documents = list[int]
Added = dict[int, list[float]]
"""Degree of a group -> seconds that each document of the global batch adds to it."""


class Cost(Protocol):
    """Time of a group: a fixed part, and a part that each of its documents adds."""

    @property
    def fixed(self) -> float:
        """Seconds of a group beside those of its documents."""

    def seconds(self, lengths: Lengths, degree: int) -> Seconds:
        """Seconds that each document adds to a group of `degree` devices: [K] -> [K]."""


@dataclass(frozen=True)
class Cluster:
    """The devices. Raises `ValueError` for settings that cannot work."""

    devices: int
    """N."""
    tokens: int
    """Tokens that a device holds."""
    degrees: tuple[int, ...] = ()
    """Numbers of devices that a group may have, ascending. Empty: the powers of two up to N."""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.tokens < 1:
            raise ValueError(
                f"a plan needs devices that hold tokens, but there are {self.devices} devices for {self.tokens} "
                "tokens each; use 1 or more of both"
            )
        if not self.degrees:
            powers = tuple(2**k for k in range(self.devices.bit_length()))
            object.__setattr__(self, "degrees", powers)
        within = self.degrees[0] >= 1 and self.degrees[-1] <= self.devices
        if not within or any(one >= other for one, other in pairwise(self.degrees)):
            raise ValueError(
                f"degrees {self.degrees} must ascend from 1 or more to at most {self.devices}, the number of devices"
            )

    @property
    def longest(self) -> int:
        """Tokens that a group of the largest degree holds."""
        return self.degrees[-1] * self.tokens

    def least(self, length: int) -> int:
        """The least degree whose groups hold a document of `length`."""
        return next(degree for degree in self.degrees if length <= degree * self.tokens)


@dataclass(frozen=True)
class Group:
    """Devices that share documents: each device holds a part of every one."""

    degree: int
    """Number of devices."""
    documents: tuple[int, ...]


Groups = tuple[Group, ...]
"""The groups of a micro-batch, side by side. They descend in degree, so that powers of two start at multiples of
themselves. Devices beyond them are idle."""


@dataclass(frozen=True)
class Plan:
    """The groups of each micro-batch. Micro-batches run one after another."""

    micro_batches: tuple[Groups, ...]

    def seconds(self, lengths: Sequence[int], cost: Cost) -> float:
        """Seconds of all micro-batches."""
        every = np.asarray(lengths, dtype=np.int64)
        degrees = {group.degree for groups in self.micro_batches for group in groups}
        added = {degree: cost.seconds(every, degree).tolist() for degree in degrees}
        return sum(cost.fixed + slowest(groups, added) for groups in self.micro_batches)


def slowest(groups: Groups, added: Added) -> float:
    """Seconds that its documents add to the slowest group of a micro-batch."""
    return max(sum(added[group.degree][k] for k in group.documents) for group in groups)


@dataclass(frozen=True)
class Request:
    """A global batch to plan. Raises `ValueError` for lengths that no plan can hold."""

    lengths: Lengths
    """[K]."""
    cluster: Cluster
    cost: Cost

    def __post_init__(self) -> None:
        if not len(self.lengths):
            raise ValueError("a global batch has no documents; a plan needs one or more")
        if self.lengths.min() < 1:
            raise ValueError(
                f"a document has {self.lengths.min()} tokens, but needs one or more; leave it out"
            )
        if self.lengths.max() > self.cluster.longest:
            c = self.cluster
            raise ValueError(
                f"a document has {self.lengths.max()} tokens, but the largest group holds {c.longest} "
                f"({c.degrees[-1]} devices x {c.tokens} tokens); leave it out, or use larger groups"
            )

    @cached_property
    def added(self) -> Added:
        """Seconds that each document adds to a group, by the group's degree."""
        degrees = self.cluster.degrees
        return {degree: self.cost.seconds(self.lengths, degree).tolist() for degree in degrees}

    def fastest(self, plans: Iterable[Plan]) -> Plan:
        """The plan that takes the fewest seconds."""
        return min(plans, key=lambda plan: plan.seconds(self.lengths.tolist(), self.cost))

    @cached_property
    def longest_first(self) -> Documents:
        """All documents, in descending length."""
        return [int(k) for k in np.argsort(-self.lengths, kind="stable")]


class Planner(Frozen):
    """A way to plan; its options are its fields."""

    def require(self) -> None:
        """Raise `ValueError`, naming the extra, if a package that planning needs is not installed."""

    def plan(self, lengths: Sequence[int], cluster: Cluster, cost: Cost) -> Plan:
        """The micro-batches and groups of a global batch of documents of `lengths`.

        Raises `ValueError` for lengths that no plan can hold.
        """
        request = Request(np.asarray(lengths, dtype=np.int64), cluster, cost)
        made = self.choose(request)
        check(made, request)
        return made

    @abstractmethod
    def choose(self, request: Request) -> Plan:
        """The plan: what a planner defines."""


class Blasted(Planner):
    """Base of planners that cut a global batch into micro-batches first, and then plan these."""

    trials: int = Field(default=5, ge=1)
    """Numbers of micro-batches to try, from the least that fits (arXiv:2412.01523, section 4.2)."""

    def choose(self, request: Request) -> Plan:
        trials = islice(blasted(request), self.trials)
        return request.fastest(p for cut in trials for p in self.assigned(cut, request))

    @abstractmethod
    def assigned(self, micro_batches: list[Documents], request: Request) -> list[Plan]:
        """Plans of these micro-batches, in each of which the longest documents are first."""


def load_planner(spec: Spec) -> Planner:
    """The planner that `spec` names."""
    return load("alst_impl.planners", Planner, spec)


def check(plan: Plan, request: Request) -> None:
    """Assert that each document is in one group, that groups hold theirs, and that there are devices for all groups."""
    cluster, lengths = request.cluster, request.lengths
    placed = [k for groups in plan.micro_batches for group in groups for k in group.documents]
    assert sorted(placed) == list(range(len(lengths))), "each document once"
    for groups in plan.micro_batches:
        assert sum(group.degree for group in groups) <= cluster.devices, groups
        for group in groups:
            assert group.documents, group
            assert group.degree in cluster.degrees, group
            assert lengths[list(group.documents)].sum() <= group.degree * cluster.tokens, group


def cuts(cost: NDArray[np.float64], *, worst: bool = False) -> Iterator[list[int]]:
    """Borders 0, ..., K of the best 1, 2, ..., K runs of consecutive items, by exact dynamic programming.

    `cost` [K + 1, K + 1] is that of a run from item i up to, without, item j > i. The best runs have the least sum of
    costs, or the least `worst` cost.
    """
    combine = np.maximum if worst else np.add
    size = len(cost) - 1
    forward = np.where(np.tri(size + 1, dtype=bool), np.inf, cost)
    best = forward[0]
    before: list[NDArray[np.intp]] = []
    for runs in range(1, size + 1):
        borders = [size]
        for back in reversed(before):
            borders.append(int(back[borders[-1]]))
        yield [0, *reversed(borders)]
        if runs < size:
            through = combine(best[:, None], forward)
            before.append(through.argmin(axis=0))
            best = through.min(axis=0)


def blasted(request: Request) -> Iterator[list[Documents]]:
    """Micro-batches of documents of similar length, whose tokens are as even as can be.

    Yields them for each number of micro-batches that groups of the largest degree hold, from the least. Documents are
    sorted, the longest first, and cut so that the largest micro-batch has the fewest tokens (arXiv:2412.01523,
    section 4.2).
    """
    cluster, order = request.cluster, request.longest_first
    largest = cluster.degrees[-1]
    groups = [largest] * (cluster.devices // largest)
    through = np.concatenate([[0.0], np.cumsum(request.lengths[order])])
    for borders in cuts(through[None] - through[:, None], worst=True):
        if np.diff(through[borders]).max() <= len(groups) * cluster.longest:
            found = [order[i:j] for i, j in pairwise(borders)]
            if all(spread(documents, groups, request) for documents in found):
                yield found


def spread(documents: Documents, degrees: list[int], request: Request) -> Groups | None:
    """Each of `documents`, the longest first, to the group that has room and would be done first; None if none has room.

    `degrees` are those of the groups, descending. Groups without documents are left out.
    """
    room = [degree * request.cluster.tokens for degree in degrees]
    done = [0.0] * len(degrees)
    members: list[Documents] = [[] for _ in degrees]
    added = [request.added[degree] for degree in degrees]
    for k in documents:
        tokens = int(request.lengths[k])
        free = [(done[g] + added[g][k], g) for g in range(len(degrees)) if tokens <= room[g]]
        if not free:
            return None
        done_at, g = min(free)
        done[g] = done_at
        room[g] -= tokens
        members[g].append(k)
    pairs = zip(degrees, members, strict=True)
    return tuple(Group(degree, tuple(found)) for degree, found in pairs if found)
