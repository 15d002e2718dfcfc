"""The page of planners: published times beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.present.pages.base import Committed
from harness.present.pages.planners import by_case, page, ratios, times
from harness.records.record import write_text
from harness.records.replays import PATH, Replayed, committed, text_of


def made(planner: str, *seconds: float) -> list[Replayed]:
    """Batches of 7B, whose published times are 4.9 s (FlexSP), 6.2 s (BatchAda) and 8.3 s (static)."""
    return [
        Replayed(
            model="GPT-7B", context_k=192, planner=planner, batch=k, micro_batches=2, seconds=each
        )
        for k, each in enumerate(seconds)
    ]


REPLAY = [
    *made("flexsp", 4.0, 6.0),
    *made("megatron", 5.0, 6.0),
    *made("single", 5.0, 7.0),
    *made("best_fit", 6.0, 6.0),
    *made("static", 9.0, 11.0),
]


def test_times_are_means_beside_published_ones() -> None:
    """A row for each planner with a published system, with the error."""
    rows = {row[3]: row[4:] for row in times(by_case(REPLAY)).rows}
    assert rows == {
        "flexsp": ["4.9", "5.0", "+2.0%"],
        "best_fit": ["6.2", "6.0", "-3.2%"],
        "static": ["8.3", "10.0", "+20%"],
    }


def test_ratios_are_over_flexsp_with_published_ones_in_brackets() -> None:
    (row,) = ratios(by_case(REPLAY)).rows
    assert row[2:] == ["1.10x", "1.20x", "1.20x (1.27x)", "2.00x (1.69x)"]


def test_page_counts_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of all published times, with the median and the worst error."""
    monkeypatch.chdir(tmp_path)
    assert "Of the 72 published times 0 can be predicted" in page(Committed([]))
    write_text(PATH, text_of(REPLAY))
    assert committed() == REPLAY
    found = page(Committed([]))
    assert (
        "Of the 72 published times 3 can be predicted; the median error is 3%, the worst 20%"
        in found
    )
