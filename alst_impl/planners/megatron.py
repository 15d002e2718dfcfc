"""Megatron Core's dynamic context parallelism: each document in a group of the least degree that holds it.

The rules are those of NVIDIA/Megatron-LM, megatron/core/datasets/data_schedule_utils.py, `next_hdp_group`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pydantic import Field

from alst_impl.planners.base import Cluster, Documents, Group, Groups, Plan, Planner, Request


class Megatron(Planner):
    """A greedy way that knows no cost: the work of a document is its tokens squared over the devices of its group."""

    slack: float = Field(default=0.05, ge=0)
    """A micro-batch is full when the work of its devices differs by no more than this part of the largest.
    It is not looked at before documents need fewer devices than the first."""

    def choose(self, request: Request) -> Plan:
        left = request.longest_first
        micro_batches: list[Groups] = []
        while left:
            filling = Filling(request.cluster)
            left = self.fill(filling, left, request)
            filling.widen()
            micro_batches.append(filling.closed())
        return Plan(tuple(micro_batches))

    def fill(self, filling: Filling, documents: Documents, request: Request) -> Documents:
        """Place `documents` in a micro-batch, the longest first, until it is full; returns those that are left."""
        lengths = {k: int(request.lengths[k]) for k in documents}
        degrees = {k: request.cluster.least(lengths[k]) for k in documents}
        work = {k: lengths[k] ** 2 / degrees[k] for k in documents}
        sections = even_sections(work, len({*degrees.values()}))
        while any(sections):
            heads = [section for section in sections if section]
            section = next((s for s in heads if filling.takes(degrees[s[0]])), None)
            if section is None:
                break
            k = section[0]
            group = filling.place(degrees[k], lengths[k])
            if group is None:
                break
            section.popleft()
            group.documents.append(k)
            group.tokens += lengths[k]
            group.work += work[k]
            if filling.shrunk and filling.is_even(self.slack):
                break
        return [k for section in sections for k in section]


def even_sections(work: dict[int, float], number: int) -> list[deque[int]]:
    """Documents in their order, in about `number` sections of about equal work."""
    most = 1.1 * sum(work.values()) / number
    sections, done = [deque[int]()], 0.0
    for k, own in work.items():
        if sections[-1] and done + own > most:
            sections.append(deque())
            done = 0.0
        sections[-1].append(k)
        done += own
    return sections


@dataclass
class Open:
    """A group that still takes documents."""

    degree: int
    tokens: int = 0
    work: float = 0.0
    documents: Documents = field(default_factory=list)


@dataclass
class Filling:
    """A micro-batch that still takes documents."""

    cluster: Cluster
    groups: list[Open] = field(default_factory=list)

    @property
    def idle(self) -> int:
        """Devices without a group."""
        return self.cluster.devices - sum(group.degree for group in self.groups)

    @property
    def shrunk(self) -> bool:
        """Whether a group has fewer devices than the first."""
        return any(group.degree < self.groups[0].degree for group in self.groups)

    def takes(self, degree: int) -> bool:
        """Whether there is a group of `degree`, full or not, or may be one more."""
        return degree <= self.idle or any(group.degree == degree for group in self.groups)

    def place(self, degree: int, tokens: int) -> Open | None:
        """A new group if enough devices are idle, else the one with the least work that has room; None if none has."""
        if degree <= self.idle:
            self.groups.append(Open(degree))
            return self.groups[-1]
        most = degree * self.cluster.tokens - tokens
        free = [group for group in self.groups if group.degree == degree and group.tokens <= most]
        return min(free, key=lambda group: group.work, default=None)

    def is_even(self, slack: float) -> bool:
        """Whether the work of all devices is the same but for `slack`, a part of the largest."""
        work = [group.work for group in self.groups] + [0.0] * (self.idle > 0)
        return max(work) - min(work) <= slack * max(work)

    def widen(self) -> None:
        """Give idle devices to the smallest group, which takes the next degree, as long as there are enough."""
        degrees = self.cluster.degrees
        while True:
            group = min(self.groups, key=lambda group: group.degree)
            wider = min((d for d in degrees if d > group.degree), default=None)
            if wider is None or wider - group.degree > self.idle:
                return
            group.degree = wider

    def closed(self) -> Groups:
        """The groups, the widest first."""
        widest_first = sorted(self.groups, key=lambda group: -group.degree)
        return tuple(Group(group.degree, tuple(group.documents)) for group in widest_first)
