"""Plans FlexSP's published batches with every planner: their lengths, sampled, under its authors' cost model."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from alst_impl.planners.base import Cluster, Planner
from alst_impl.planners.best_fit import BestFit
from alst_impl.planners.flexsp import FlexSP
from alst_impl.planners.megatron import Megatron
from alst_impl.planners.single import Single
from harness.predict.flexsp import MODELS, published_cluster, published_cost
from harness.records.published import rows
from harness.records.replays import Replayed

CONTEXTS_K = (192, 384)
CASES = [(model, context_k) for model in MODELS for context_k in CONTEXTS_K]
DOCUMENTS = 512
"""Of a global batch."""
BATCHES = 30
"""As many as the authors' script plans."""
SEED = 0


def longest(context_k: int) -> int:
    """Tokens of the longest document that a context lets in; longer ones are left out, not cut."""
    return context_k * 1000 - 128


def batches(context_k: int, number: int = BATCHES) -> list[list[int]]:
    """Global batches of Wikipedia: lengths drawn from those of a million documents, rounded up to 128 tokens as published."""
    table = rows("flexsp_wikipedia_lengths")
    lengths = np.array([int(row["length_rounded_up_tokens"]) for row in table])
    documents = np.array([int(row["documents"]) for row in table]) * (lengths <= longest(context_k))
    drawn = np.random.default_rng(SEED).choice(
        lengths, size=(number, DOCUMENTS), p=documents / documents.sum()
    )
    return [[int(length) for length in each] for each in drawn]


def planners(cluster: Cluster, context_k: int) -> dict[str, Planner]:
    """By name. "static" has the least degree that holds the longest document of the context."""
    return {
        "flexsp": FlexSP(),
        "megatron": Megatron(),
        "single": Single(),
        "best_fit": BestFit(),
        "static": BestFit(degree=cluster.least(longest(context_k))),
    }


def replayed(model: str, context_k: int, number: int = BATCHES) -> Iterator[tuple[Replayed, float]]:
    """Every planner's plan of each batch, and the processor seconds that planning took."""
    cost, cluster = published_cost(model), published_cluster(model, context_k)
    for batch, lengths in enumerate(batches(context_k, number)):
        for name, planner in planners(cluster, context_k).items():
            begin = time.process_time()
            plan = planner.plan(lengths, cluster, cost)
            took = time.process_time() - begin
            yield (
                Replayed(
                    model=model,
                    context_k=context_k,
                    planner=name,
                    batch=batch,
                    micro_batches=len(plan.micro_batches),
                    seconds=round(plan.seconds(lengths, cost), 4),
                ),
                took,
            )
