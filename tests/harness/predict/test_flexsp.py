"""FlexSP's published cost model and batches: constants, lengths, and how planners compare on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alst_impl.planners.base import Group, Plan
from alst_impl.planners.flexsp import bucketed
from harness.predict.flexsp import MODELS, published_cluster, published_cost
from harness.predict.replay import CASES, batches, longest, replayed
from harness.records import replays
from harness.records.published import look_up, rows
from harness.records.replays import Replayed

ROOT = Path(__file__).parents[3]
BATCHES = 12


def fact(item: str) -> float:
    return look_up("flexsp_facts", {"item": item}, "value").value


def test_cost_is_the_published_formula() -> None:
    """Two documents of 7B on 8 GPUs, in milliseconds and MiB as its authors count."""
    lengths = [10_000, 4_096]
    work = sum(5.128e-6 * n**2 + 183.9576e-3 * n for n in lengths) / 8
    exchange = 4 * 2 * 32 * 4096 * sum(lengths) * 2 / 2**20 / 8 / 96.5
    plan = Plan(((Group(8, (0, 1)),),))
    seconds = plan.seconds(lengths, published_cost("GPT-7B"))
    assert seconds == pytest.approx((work + exchange + 629.3563) / 1e3)


def test_one_gpu_exchanges_nothing() -> None:
    cost, tokens = published_cost("GPT-13B"), np.array([1_000])
    assert cost.seconds(tokens, 1) == pytest.approx(cost.work(tokens.astype(float)))


@pytest.mark.parametrize("model", MODELS)
def test_the_longest_documents_need_all_gpus(model: str) -> None:
    """At 384K, as published; at 192K half of them do."""
    degrees = [published_cluster(model, k).least(longest(k)) for k in (192, 384)]
    assert degrees == [32, fact("deepspeed_sp_at_384k")]


def test_lengths_are_those_of_wikipedia() -> None:
    """All documents are counted, and as many are short as published."""
    counts = {
        int(row["length_rounded_up_tokens"]): int(row["documents"])
        for row in rows("flexsp_wikipedia_lengths")
    }
    total = sum(counts.values())
    assert total == fact("wikipedia_documents")
    short = sum(documents for length, documents in counts.items() if length <= 8_192)
    assert 100 * short / total >= fact("wikipedia_share_below_8k")
    assert all(length % 128 == 0 for length in counts)


def test_batches_are_drawn_from_documents_that_the_context_lets_in() -> None:
    """The same again each time, with the mean of all documents."""
    drawn = batches(192)
    assert drawn == batches(192)
    assert {len(batch) for batch in drawn} == {512}
    assert max(map(max, drawn)) <= 191_872
    assert np.mean(drawn) == pytest.approx(1_075, rel=0.1)


def test_buckets_raise_wikipedias_lengths_about_as_little_as_published() -> None:
    """Of micro-batches of a whole cluster's tokens; buckets of equal width raise them many times as much."""
    raised, even, tokens = 0, 0, 0
    for batch in batches(192, BATCHES):
        lengths = np.sort(np.array(batch))[::-1]
        for half in np.split(lengths, [int(np.searchsorted(lengths.cumsum(), lengths.sum() / 2))]):
            edges, counts = bucketed(half, int(fact("default_buckets_q")), 10**9)
            width = half.max() / len(edges)
            raised += int((edges * counts).sum())
            even += int((np.ceil(half / width) * width).sum())
            tokens += int(half.sum())
    ours, plain = (100 * (total / tokens - 1) for total in (raised, even))
    assert ours <= fact("dp_bucketing_error_wikipedia")
    assert plain > 5 * ours


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Replayed]]:
    """Plans of the first batches of 7B by planner."""
    found: dict[str, list[Replayed]] = {}
    for each, _ in replayed("GPT-7B", 192, BATCHES):
        found.setdefault(each.planner, []).append(each)
    return found


def test_flexsp_is_a_tenth_faster_than_the_best_single_degree(
    planned: dict[str, list[Replayed]],
) -> None:
    """On 12 batches together, and never slower on one of them."""
    flexible, single = ([e.seconds for e in planned[name]] for name in ("flexsp", "single"))
    assert len(flexible) == BATCHES
    assert all(one <= other for one, other in zip(flexible, single, strict=True))
    assert sum(single) / sum(flexible) >= 1.10


def test_the_committed_replay_is_what_the_planners_do(planned: dict[str, list[Replayed]]) -> None:
    """A release of scipy may find plans of nearly the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        committed = replays.committed()
    assert {(each.model, each.context_k) for each in committed} == {*CASES}
    kept = {
        (each.planner, each.batch): each.seconds
        for each in committed
        if (each.model, each.context_k) == ("GPT-7B", 192)
    }
    for name, found in planned.items():
        own = [kept[name, each.batch] for each in found]
        assert [each.seconds for each in found] == pytest.approx(own, rel=0.02)
