"""FlexSP: groups of several degrees side by side (arXiv:2412.01523).

Micro-batches and buckets are the published ones. The published integer program has an unknown for each group that there
might be. Ours counts the groups of each degree, which are alike, for one limit of time after another. Imports no torch.

Legend: Q buckets of a micro-batch, D degrees.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from alst_impl.extras import require
from alst_impl.planners.base import (
    Blasted,
    Cluster,
    Documents,
    Groups,
    Lengths,
    Plan,
    Request,
    Seconds,
    cuts,
    slowest,
    spread,
)
from alst_impl.planners.single import evened


class FlexSP(Blasted):
    """Documents of similar length meet in a micro-batch, whose groups get the degrees that suit them."""

    buckets: int = Field(default=16, ge=1)
    """Least number of buckets of similar lengths in a micro-batch (section 4.1.3)."""
    tolerance: float = Field(default=0.01, gt=0)
    """The search of a micro-batch ends when its least time is known this well."""

    def require(self) -> None:
        require("planner 'flexsp'", "flexsp", "scipy")

    def choose(self, request: Request) -> Plan:
        self.require()
        return super().choose(request)

    def assigned(self, micro_batches: list[Documents], request: Request) -> list[Plan]:
        mixed = [self.mixed(documents, request) for documents in micro_batches]
        return [*evened(micro_batches, request), Plan(tuple(mixed))]

    def mixed(self, documents: Documents, request: Request) -> Groups:
        """The fastest groups found for a micro-batch, by bisection of its time."""

        def seconds(groups: Groups) -> float:
            return slowest(groups, request.added)

        alike = [plan.micro_batches[0] for plan in evened([documents], request)]
        best = min(alike, key=seconds)
        cluster = request.cluster
        room = cluster.devices * cluster.tokens
        edges, counts = bucketed(request.lengths[documents], self.buckets, room)
        work = np.stack([request.cost.seconds(edges, d) for d in cluster.degrees], axis=1)
        busy = (counts[:, None] * work * cluster.degrees).min(axis=1).sum() / cluster.devices
        low, high = max(work.min(axis=1).max(), busy), seconds(best)
        while high > low * (1 + self.tolerance):
            limit = math.sqrt(low * high)
            numbers = group_numbers(edges, counts, work, limit, cluster)
            if numbers is None:
                low = limit
                continue
            high = limit
            pairs = zip(reversed(cluster.degrees), reversed(numbers), strict=True)
            found = spread(documents, [d for d, n in pairs for _ in range(n)], request)
            if found and seconds(found) < seconds(best):
                best = found
        return best


def bucketed(lengths: Lengths, least: int, room: int) -> tuple[Lengths, Lengths]:
    """Longest length and number of documents of each bucket, by exact dynamic programming: [K] -> [Q], [Q].

    `lengths` descend. Buckets are runs of them, so that all lengths are raised to their bucket's longest by as few tokens
    as can be. There are at least `least` of them, and as many as it takes until the raised lengths use up at most half of
    what the lengths leave of `room` (arXiv:2412.01523, section 4.1.3, and its authors' code).
    """
    size = np.arange(len(lengths) + 1)
    through = np.concatenate([[0], np.cumsum(lengths)])
    raised = np.append(lengths, 0)[:, None] * (size[None] - size[:, None])
    waste = raised - (through[None] - through[:, None])
    most = (through[-1] + room) / 2
    for borders in cuts(waste.astype(float)):
        edges, counts = lengths[borders[:-1]], np.diff(borders)
        enough = len(counts) >= least and (edges * counts).sum() <= most
        if enough or len(counts) == len(lengths):
            break
    return edges, counts


def group_numbers(
    edges: Lengths, counts: Lengths, work: Seconds, limit: float, cluster: Cluster
) -> list[int] | None:
    """Numbers of groups of each degree that do all documents within `limit` seconds; None if there are none.

    A degree's groups do and hold documents as one: its documents may be split among them anywhere. `work` [Q, D] is of a
    document of `edges` [Q], of which there are `counts` [Q].
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    degrees = np.asarray(cluster.degrees)
    share: NDArray[np.float64] = edges[:, None] / degrees
    q, d = work.shape
    free = (share <= cluster.tokens) & (work <= limit)
    # Unknowns: groups [D], then documents [Q, D].
    of_degree = np.tile(np.eye(d), q)  # [D, Q D]: the documents of a degree
    within = [
        np.hstack([-bound * np.eye(d), of_degree * each.ravel()])
        for each, bound in ((work, limit), (share, float(cluster.tokens)))
    ]
    devices = np.hstack([degrees, np.zeros(q * d)])[None]
    all_done = np.hstack([np.zeros((q, d)), np.kron(np.eye(q), np.ones(d))])
    most = np.concatenate([cluster.devices // degrees, (free * counts[:, None]).ravel()])
    # With dense matrices scipy makes every warning of the process an error for a moment, and another thread may train.
    limited, all_done = csr_array(np.vstack([*within, devices])), csr_array(all_done)
    found = milp(
        np.zeros(d + q * d),
        constraints=[
            LinearConstraint(limited, ub=[0] * 2 * d + [cluster.devices]),
            LinearConstraint(all_done, counts, counts),
        ],
        bounds=Bounds(0, most),
        integrality=np.repeat([1, 0], [d, q * d]),
    )
    return None if found.x is None else np.rint(found.x[:d]).astype(int).tolist()
