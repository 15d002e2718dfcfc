"""Plans hold every document once, within memory and devices; FlexSP is never slower than the best single degree."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest

from alst_impl.config import Spec
from alst_impl.planners.base import (
    Cluster,
    Group,
    Lengths,
    Plan,
    Planner,
    Request,
    Seconds,
    blasted,
    check,
    cuts,
    load_planner,
)
from alst_impl.planners.best_fit import BestFit
from alst_impl.planners.flexsp import FlexSP, bucketed
from alst_impl.planners.megatron import Megatron
from alst_impl.planners.single import Single
from alst_impl.plugin import names

PLANNERS = names("alst_impl.planners")
SEEDS = range(12)


@dataclass(frozen=True)
class Wires:
    """Degrees above 4 pay for slow links, so that short documents want few devices."""

    fixed: float = 0.2

    def seconds(self, lengths: Lengths, degree: int) -> Seconds:
        """Quadratic and linear work, and an exchange."""
        tokens = lengths.astype(np.float64)
        exchange = {1: 0.0, 2: 2e-5, 4: 4e-5}.get(degree, 1e-3)
        return (1e-8 * tokens**2 + 2e-4 * tokens) / degree + exchange * tokens / degree


def batch(seed: int) -> tuple[list[int], Cluster]:
    """Documents of a long-tailed distribution, and devices for them, not always powers of two."""
    drawn = np.random.default_rng(seed)
    devices, tokens = int(drawn.choice([1, 2, 6, 8, 16])), int(drawn.choice([500, 4_000]))
    degrees = ((), (), (1, 3), (2, 4), ())[[1, 2, 6, 8, 16].index(devices)]
    cluster = Cluster(devices, tokens, degrees)
    lengths = np.exp(drawn.normal(6, 1.5, size=int(drawn.integers(1, 80)))).astype(int) + 1
    return [min(int(each), cluster.longest) for each in lengths], cluster


def planned(name: str, lengths: list[int], cluster: Cluster) -> Plan:
    return load_planner(Spec(name=name)).plan(lengths, cluster, Wires())


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_holds_every_document_once_within_memory_and_devices(name: str, seed: int) -> None:
    """Counted here from the plan alone, with lengths from one token to what the largest group holds."""
    lengths, cluster = batch(seed)
    plan = planned(name, lengths, cluster)
    placed = [k for groups in plan.micro_batches for group in groups for k in group.documents]
    assert sorted(placed) == list(range(len(lengths)))
    for groups in plan.micro_batches:
        degrees = [group.degree for group in groups]
        assert degrees == sorted(degrees, reverse=True)
        assert sum(degrees) <= cluster.devices
        for group in groups:
            assert group.degree in cluster.degrees
            assert 0 < sum(lengths[k] for k in group.documents) <= group.degree * cluster.tokens


@pytest.mark.parametrize("name", PLANNERS)
def test_a_plan_is_the_same_when_made_again(name: str) -> None:
    """All ranks may plan for themselves."""
    lengths, cluster = batch(4)
    assert planned(name, lengths, cluster) == planned(name, lengths, cluster)


@pytest.mark.parametrize("tolerance", [0.01, 100.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_flexsp_is_never_slower_than_the_best_single_degree(seed: int, tolerance: float) -> None:
    """Whose plans are among those that it chooses from, however coarse its search."""
    lengths, cluster = batch(seed)
    flexible = FlexSP(tolerance=tolerance).plan(lengths, cluster, Wires())
    single = Single().plan(lengths, cluster, Wires())
    assert flexible.seconds(lengths, Wires()) <= single.seconds(lengths, Wires())


def test_flexsp_mixes_degrees_where_one_degree_is_slow() -> None:
    """The long document needs 8 devices and their slow links; the short ones are faster on one device each."""
    lengths, cluster = [4_000] + [200] * 24, Cluster(16, 600)
    flexible = FlexSP(trials=1).plan(lengths, cluster, Wires())
    (groups,) = flexible.micro_batches
    assert [group.degree < 8 for group in groups] == [False] + [True] * (len(groups) - 1)
    single = Single(trials=1).plan(lengths, cluster, Wires())
    assert flexible.seconds(lengths, Wires()) < 0.95 * single.seconds(lengths, Wires())


def fastest_by_hand(lengths: list[int], cluster: Cluster) -> float:
    """The least seconds of one micro-batch, by trying every set of groups and every assignment."""
    best = float("inf")
    sizes = range(1, cluster.devices + 1)
    for number in sizes:
        for degrees in itertools.combinations_with_replacement(cluster.degrees, number):
            if sum(degrees) > cluster.devices:
                continue
            for owners in itertools.product(range(number), repeat=len(lengths)):
                groups = [
                    Group(degree, tuple(k for k, owner in enumerate(owners) if owner == g))
                    for g, degree in enumerate(degrees)
                ]
                plan = Plan((tuple(group for group in groups if group.documents),))
                held = [sum(lengths[k] for k in group.documents) for group in groups]
                if all(h <= d * cluster.tokens for h, d in zip(held, degrees, strict=True)):
                    best = min(best, plan.seconds(lengths, Wires()))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_flexsp_is_near_the_fastest_plan_of_small_batches(seed: int) -> None:
    """At most 8 % above it, with four devices and six documents in one micro-batch."""
    lengths = np.random.default_rng(seed).integers(50, 1_500, size=6).tolist()
    cluster = Cluster(4, -(-sum(lengths) // 4))
    plan = FlexSP(trials=1, buckets=6).plan(lengths, cluster, Wires())
    assert len(plan.micro_batches) == 1
    assert plan.seconds(lengths, Wires()) <= 1.08 * fastest_by_hand(lengths, cluster)


def every_cut(size: int, runs: int) -> list[list[int]]:
    inner = itertools.combinations(range(1, size), runs - 1)
    return [[0, *borders, size] for borders in inner]


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_the_best_of_all(seed: int, worst: bool) -> None:
    """Beside every way to cut 7 items, for any cost of a run."""
    cost = np.random.default_rng(seed).random((8, 8))

    def total(borders: list[int]) -> float:
        costs = [cost[i, j] for i, j in itertools.pairwise(borders)]
        return float(max(costs) if worst else sum(costs))

    found = list(cuts(cost, worst=worst))
    assert len(found) == 7
    for runs, borders in enumerate(found, 1):
        assert total(borders) == pytest.approx(min(map(total, every_cut(7, runs))))


def test_micro_batches_start_at_the_least_number_that_fits() -> None:
    """Similar lengths meet, and the largest micro-batch is as small as can be."""
    lengths = [300, 100, 900, 200, 800, 400]
    request = Request(np.array(lengths), Cluster(4, 250, (1, 4)), Wires())
    first, second, *_ = blasted(request)
    assert [[lengths[k] for k in each] for each in first] == [[900], [800], [400, 300, 200, 100]]
    assert max(sum(lengths[k] for k in each) for each in second) == 900


def test_micro_batches_do_not_overfill_groups_of_a_degree_below_all_devices() -> None:
    """Three documents of 60 % of a group cannot share the two groups that there are."""
    request = Request(np.array([600, 600, 600]), Cluster(4, 500, (1, 2)), Wires())
    assert len(next(blasted(request))) == 2


def test_buckets_raise_lengths_by_as_few_tokens_as_can_be() -> None:
    """Of all ways to cut descending lengths into 3 buckets."""
    lengths = np.array([90, 88, 70, 40, 38, 37, 10, 9])
    edges, counts = bucketed(lengths, 3, 10**6)
    raised = int((edges * counts).sum())
    every = [
        sum(int(lengths[i]) * (j - i) for i, j in itertools.pairwise(borders))
        for borders in every_cut(8, 3)
    ]
    assert (len(edges), counts.sum(), raised) == (3, 8, min(every))


def test_buckets_become_more_where_memory_is_short() -> None:
    """Raised lengths use up at most half of the room that is left."""
    lengths = np.arange(100, 0, -1)
    room = int(lengths.sum()) + 200
    edges, counts = bucketed(lengths, 4, room)
    assert len(edges) > 4
    assert (edges * counts).sum() <= lengths.sum() + 100


def test_megatron_takes_the_least_degree_and_widens_onto_idle_devices() -> None:
    """900 tokens need 4 devices of 250, 300 need 2; of two idle devices the smaller group takes both."""
    plan = Megatron().plan([300, 900], Cluster(8, 250), Wires())
    (groups,) = plan.micro_batches
    assert groups == (Group(4, (1,)), Group(4, (0,)))


def test_megatron_packs_documents_until_groups_are_full() -> None:
    """Two groups of one device hold five documents of 50 tokens each; the rest waits."""
    plan = Megatron().plan([50] * 12, Cluster(2, 250), Wires())
    assert [[len(g.documents) for g in groups] for groups in plan.micro_batches] == [[5, 5], [1, 1]]


def test_best_fit_packs_nine_tenths_of_a_group_and_evens_out_the_last_micro_batch() -> None:
    """Of 1,000 tokens 900 are used."""
    plan = BestFit(degree=2).plan([300] * 10, Cluster(4, 500), Wires())
    assert [[len(g.documents) for g in groups] for groups in plan.micro_batches] == [[3, 3], [2, 2]]


@pytest.mark.parametrize("planner", [Single, BestFit])
def test_a_given_degree_is_kept(planner: type[Single | BestFit]) -> None:
    """Also where another one is faster, and it has to hold the longest document."""
    lengths, cluster = [100] * 30, Cluster(8, 1_000)
    plan = planner(degree=8).plan(lengths, cluster, Wires())
    assert {group.degree for groups in plan.micro_batches for group in groups} == {8}
    fastest = planner().plan(lengths, cluster, Wires())
    assert fastest.seconds(lengths, Wires()) < plan.seconds(lengths, Wires())
    with pytest.raises(ValueError, match=r"2500 tokens, but the largest group holds 2000"):
        planner(degree=2).plan([2_500], cluster, Wires())


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "no documents"),
        ([5, 0], "a document has 0 tokens"),
        ([5, -3], "a document has -3 tokens"),
        ([5, 4_001], r"4001 tokens, but the largest group holds 4000 \(4 devices x 1000 tokens\)"),
    ],
)
def test_lengths_that_no_plan_holds_are_refused(
    name: str, lengths: list[int], message: str
) -> None:
    """In one line, whichever planner it is."""
    with pytest.raises(ValueError, match=message) as refused:
        planned(name, lengths, Cluster(4, 1_000))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 10), "0 devices"),
        ((4, 0), "0 tokens"),
        ((4, 10, (2, 8)), "at most 4"),
        ((4, 10, (2, 2)), "must ascend"),
        ((4, 10, (0, 2)), "1 or more"),
    ],
)
def test_devices_that_cannot_be_are_refused(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(*settings)


@pytest.mark.parametrize(
    "groups",
    [
        (Group(2, (0,)),),
        (Group(2, (0, 1)), Group(2, (1,))),
        (Group(4, (0,)), Group(2, (1,))),
        (Group(1, (0, 1)),),
        (Group(3, (0, 1)),),
        (Group(2, (0, 1)), Group(2, ())),
    ],
    ids=["missing", "twice", "devices", "memory", "degree", "empty"],
)
def test_a_wrong_plan_is_caught(groups: tuple[Group, ...]) -> None:
    """A planner with a bug cannot hand out its plan."""

    class Wrong(Planner):
        def choose(self, request: Request) -> Plan:
            return Plan((groups,))

    with pytest.raises(AssertionError):
        Wrong().plan([10, 10], Cluster(4, 10), Wires())
    check(Plan(((Group(2, (0, 1)),),)), Request(np.array([10, 10]), Cluster(4, 10), Wires()))


def test_an_unknown_planner_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown planner 'flex'; use one of best_fit, flexsp"):
        load_planner(Spec(name="flex"))


@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_leaves_the_warnings_of_other_threads_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters of warnings belong to the process, and a step trains while the next one is planned."""

    def changed(*_: object, **__: object) -> None:
        raise AssertionError("a planner changed the filters of warnings")

    lengths, cluster = batch(3)
    planned(name, lengths, cluster)  # what is imported on first use may
    with monkeypatch.context() as patched:
        patched.setattr(warnings.catch_warnings, "__enter__", changed)
        planned(name, lengths, cluster)
