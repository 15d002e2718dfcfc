"""Schedules of slices have no deadlock, the published number of live units, and the derived bubbles."""

from __future__ import annotations

import itertools

import pytest

from alst_impl.ops.pipeline.schedule import (
    Unit,
    bubble,
    equal_flops,
    equal_lengths,
    makespan,
    orders,
    peak_live,
    play,
    seq1f1b,
)

GRID = list(itertools.product([1, 2, 3, 4, 8], [1, 2, 4, 7], [1, 2, 3, 4]))
"""(stages, micro-batches, slices)."""


def seconds(_: int, unit: Unit) -> float:
    """A backward takes twice as long as a forward."""
    return 2.0 if unit.backward else 1.0


@pytest.mark.parametrize(("stages", "micro_batches", "parts"), GRID)
def test_every_unit_runs_once_on_every_stage_in_an_order_without_deadlock(
    stages: int, micro_batches: int, parts: int
) -> None:
    """Neighbours send and receive in the same order, so messages need no names."""
    made = orders(stages, micro_batches, parts)
    everything = {
        Unit(backward, m, i)
        for backward in (False, True)
        for m in range(micro_batches)
        for i in range(parts)
    }
    for order in made:
        assert len(order) == len(everything)
        assert set(order) == everything
        for backward in (False, True):
            of_kind = [unit for unit in order if unit.backward is backward]
            assert of_kind == [unit for unit in made[0] if unit.backward is backward]
    play(made, seconds)


@pytest.mark.parametrize(("stages", "micro_batches", "parts"), GRID)
def test_live_units_are_as_published(stages: int, micro_batches: int, parts: int) -> None:
    """P - stage - 1 + k slices of 1/k micro-batch each, limited by the number of slices."""
    for stage, order in enumerate(orders(stages, micro_batches, parts)):
        live = peak_live(order, [1.0] * parts)
        assert live == min(stages - stage - 1 + parts, micro_batches * parts)


@pytest.mark.parametrize(("stages", "micro_batches", "parts"), [g for g in GRID if g[1] >= g[0]])
def test_the_bubble_shrinks_with_the_number_of_slices(
    stages: int, micro_batches: int, parts: int
) -> None:
    """The bubble is (P - 1)(F + B) / k, with F and B of a full micro-batch, if slices take equal time."""
    played = play(orders(stages, micro_batches, parts), lambda s, u: seconds(s, u) / parts)
    wait = (stages - 1) * 3 / parts
    assert makespan(played) == pytest.approx(3 * micro_batches + wait)
    assert bubble(played) == pytest.approx(wait / (3 * micro_batches + wait))


def test_one_slice_is_1f1b() -> None:
    """Stage 0 of three runs two warm-up forwards, then alternates forward and backward."""
    order = seq1f1b(3, 4, 1, 0)
    text = [f"{'B' if unit.backward else 'F'}{unit.micro_batch}" for unit in order]
    assert text == ["F0", "F1", "F2", "B0", "F3", "B1", "B2", "B3"]


def test_slices_of_the_last_stage_go_back_from_the_end() -> None:
    """The last slice's backward follows its forward at once."""
    order = seq1f1b(2, 2, 2, 1)
    text = [f"{'B' if u.backward else 'F'}{u.micro_batch}{u.part}" for u in order]
    assert text == ["F00", "F01", "B01", "F10", "B00", "F11", "B11", "B10"]


def test_a_deadlock_is_named() -> None:
    """The first slice's backward is before the second's, but needs gradients of its keys from it."""
    wrong = [Unit(False, 0, 0), Unit(False, 0, 1), Unit(True, 0, 0), Unit(True, 0, 1)]
    with pytest.raises(ValueError, match="stage 0 at backward of slice 0 of micro-batch 0"):
        play([wrong], seconds)


def test_too_little_warm_up_is_a_deadlock() -> None:
    """A micro-batch cannot start backward before the forward of its last slice."""
    order = seq1f1b(1, 1, 2, 0)
    assert order[1:3] == [Unit(False, 0, 1), Unit(True, 0, 1)]
    order[1:3] = reversed(order[1:3])
    with pytest.raises(ValueError, match="stage 0 at backward of slice 1 of micro-batch 0"):
        play([order], seconds)


def messages(order: list[Unit], stage: int, stages: int) -> list[tuple[str, int, int]]:
    """Messages of a stage on its links, in order: (send or receive, link, number on the link). Link
    2 p leads from stage p to p + 1, link 2 p + 1 back.
    """
    done: list[tuple[str, int, int]] = []
    for unit in order:
        arrives = 2 * stage + 1 if unit.backward else 2 * stage - 2
        leaves = 2 * stage - 1 if unit.backward else 2 * stage
        for what, link in (("receive", arrives), ("send", leaves)):
            if 0 <= link < 2 * stages - 2:
                number = sum(d[:2] == (what, link) for d in done)
                done.append((what, link, number))
    return done


@pytest.mark.parametrize(("stages", "micro_batches", "parts"), GRID)
def test_one_message_on_the_way_is_enough(stages: int, micro_batches: int, parts: int) -> None:
    """There is no deadlock even if a stage waits with a message until its previous one is received."""
    made = orders(stages, micro_batches, parts)
    left = [messages(order, stage, stages) for stage, order in enumerate(made)]
    done: set[tuple[str, int, int]] = set()
    moved = True
    while moved:
        moved = False
        for todo in left:
            while todo:
                what, link, number = todo[0]
                other = ("receive", link, number - 1) if what == "send" else ("send", link, number)
                if other not in done and not (what == "send" and number == 0):
                    break
                done.add(todo.pop(0))
                moved = True
    assert not any(left)


def test_unequal_slices_cost_time() -> None:
    """Slices of equal length wait for the last slice, whose attention is the largest."""
    work = [1.0, 3.0]  # two slices of equal length, only attention

    def uneven(_: int, unit: Unit) -> float:
        return work[unit.part] * (2 if unit.backward else 1)

    def even(_: int, unit: Unit) -> float:
        return 2.0 * (2 if unit.backward else 1)

    made = orders(4, 8, 2)
    assert makespan(play(made, even)) < makespan(play(made, uneven))


def test_a_transfer_takes_time() -> None:
    """It adds to forward and to backward between two stages."""
    made = orders(2, 1, 1)
    assert makespan(play(made, seconds, 0.25)) == makespan(play(made, seconds)) + 0.5


# -- slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [4, 67, 1000, 65_536])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("per_token", [0.0, 1.0, 5e5])
@pytest.mark.parametrize("per_pair", [0.0, 1.0])
def test_slices_cover_the_sequence(
    seqlen: int, parts: int, per_token: float, per_pair: float
) -> None:
    """Slices are in order, and none is empty."""
    if not per_token and not per_pair:
        return
    for borders in (
        equal_lengths(seqlen, parts),
        equal_flops(seqlen, parts, per_token, per_pair),
    ):
        assert (borders[0], borders[-1], len(borders)) == (0, seqlen, parts + 1)
        assert all(a < b for a, b in itertools.pairwise(borders))


def test_slices_of_equal_work() -> None:
    """Each has a quarter of the FLOPs, up to the work of one token."""
    seqlen, per_token, per_pair = 32_768, 4e5, 16.0

    def work(end: int) -> float:
        return per_token * end + per_pair * end * (end + 1) / 2

    borders = equal_flops(seqlen, 4, per_token, per_pair)
    for i, border in enumerate(borders):
        assert abs(work(border) - work(seqlen) * i / 4) <= work(seqlen) - work(seqlen - 1)


def test_without_attention_equal_work_is_equal_length() -> None:
    """With attention only, half of the work is in the first 1 / sqrt(2) of the tokens."""
    assert equal_flops(1024, 4, 1.0, 0.0) == equal_lengths(1024, 4)
    assert equal_flops(10_000, 2, 0.0, 1.0)[1] == 7071
