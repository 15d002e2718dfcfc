"""Groups of one degree, packed as the baselines of FlexSP are (arXiv:2412.01523, and its authors' code).

They even out the last micro-batch at degree 16 and more; here it is evened out at every degree.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from alst_impl.planners.base import Documents, Group, Plan, Planner, Request, spread

FILLED = 0.9
"""Share of a group's room that documents are packed into."""


class BestFit(Planner):
    """Packs by room and not by time: "BatchAda", where each global batch has a degree of its own, or a static system."""

    degree: int | None = Field(default=None, ge=1)
    """Degree of all groups. None: the fastest for each global batch."""

    def choose(self, request: Request) -> Plan:
        if self.degree is not None:
            cluster = replace(request.cluster, degrees=(self.degree,))
            request = replace(request, cluster=cluster)
        least = request.cluster.least(int(request.lengths.max()))
        degrees = [degree for degree in request.cluster.degrees if degree >= least]
        return request.fastest(packed(degree, request) for degree in degrees)


def packed(degree: int, request: Request) -> Plan:
    """Groups of `degree`: the longest documents first, each in the fullest group that has room for it."""
    most = max(FILLED * degree * request.cluster.tokens, request.lengths.max())
    members: list[Documents] = []
    held: list[int] = []
    for k in request.longest_first:
        tokens = int(request.lengths[k])
        roomy = [g for g in range(len(held)) if held[g] + tokens <= most]
        g = max(roomy, key=held.__getitem__, default=len(held))
        if g == len(held):
            members.append([])
            held.append(0)
        members[g].append(k)
        held[g] += tokens
    groups = [Group(degree, tuple(documents)) for documents in members]
    beside = request.cluster.devices // degree
    *full, last = [tuple(groups[at : at + beside]) for at in range(0, len(groups), beside)]
    rest = {k for group in last for k in group.documents}
    in_order = [k for k in request.longest_first if k in rest]
    return Plan((*full, spread(in_order, [degree] * beside, request) or last))
