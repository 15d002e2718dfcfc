"""Groups of one degree for a whole global batch: the fastest degree, or a given one."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from alst_impl.planners.base import Blasted, Documents, Groups, Plan, Request, spread


class Single(Blasted):
    """Micro-batches of similar lengths, each spread over groups of one degree."""

    degree: int | None = Field(default=None, ge=1)
    """Degree of all groups. None: the fastest for each global batch."""

    def choose(self, request: Request) -> Plan:
        if self.degree is not None:
            cluster = replace(request.cluster, degrees=(self.degree,))
            request = replace(request, cluster=cluster)
        return super().choose(request)

    def assigned(self, micro_batches: list[Documents], request: Request) -> list[Plan]:
        return evened(micro_batches, request)


def evened(micro_batches: list[Documents], request: Request) -> list[Plan]:
    """A plan for each degree whose groups hold the micro-batches: as many groups as there are devices for."""
    devices, plans = request.cluster.devices, list[Plan]()
    for degree in request.cluster.degrees:
        groups = [spread(each, [degree] * (devices // degree), request) for each in micro_batches]
        held: list[Groups] = [each for each in groups if each is not None]
        if len(held) == len(groups):
            plans.append(Plan(tuple(held)))
    return plans
