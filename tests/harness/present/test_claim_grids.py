"""Published numbers beside ours, in tables and in words."""

from __future__ import annotations

from samples import claim

from harness.present.grids.claims import (
    claim_summary,
    count_grid,
    errors_text,
    length_grid,
    miss_grid,
    misses,
    of_authors,
)

SLOPE, BUBBLE = "Not the slope", "Not the bubble"
FOUND = [
    claim(-0.29, "a", "device_bytes", ruled_out=SLOPE),
    claim(0.12, "b", "tokens_per_second", ruled_out=BUBBLE),
    claim(-0.4, "c", "device_bytes", ruled_out=SLOPE),
    claim(0.3, "d"),
    claim(0.04, "e", "device_bytes", ruled_out=SLOPE),
    claim(0.5, "f", method="alst"),
    claim(-0.3, "g", "step_seconds", fitted=True, ruled_out=BUBBLE),
]


def test_each_reason_stands_once_with_the_claims_that_it_is_about() -> None:
    """The most frequent first, claims without one last; what holds, is fitted or is ours is left out."""
    assert {reason: [e.id for e in found] for reason, found in misses(FOUND).items()} == {
        SLOPE: ["a-device_bytes", "c-device_bytes"],
        BUBBLE: ["b-tokens_per_second"],
        "": ["d-longest_tokens"],
    }
    assert list(misses(FOUND)) == [SLOPE, BUBBLE, ""]
    assert miss_grid(FOUND).rows == [
        [SLOPE, "device_bytes of a -29%, c -40%"],
        [BUBBLE, "tokens_per_second of b +12%"],
        ["nothing yet", "longest_tokens of d +30%"],
    ]


def test_no_miss_is_no_row() -> None:
    """A table of misses may be empty."""
    assert miss_grid([claim(0.01)]).rows == []
    assert errors_text([]) == ""


def test_our_own_method_reproduces_nothing() -> None:
    """Its lengths are counted apart, as what they are over the published ones."""
    text = claim_summary([claim(0.02), claim(0.5, method="alst"), claim(-0.1, method="alst")])
    assert text == (
        "Of 1 published numbers: 1 within 3%, 1 within 5%, 1 within 10% (reproduced), 0 longer, 0 refuted. "
        "Our alst beside 2 published lengths of ALST: 0.90x to 1.50x."
    )


def test_numbers_are_counted_by_experiment_and_together() -> None:
    """One experiment is its own total."""
    both = count_grid({"one": of_authors(FOUND), "two": [claim(0.029), claim(None)]})
    assert both.rows == [
        ["one", "5", "0", "1", "1", "1", "3", "0", "1"],
        ["two", "1", "1", "1", "1", "0", "0", "1", "0"],
        ["all", "6", "1", "2", "2", "1", "3", "1", "1"],
    ]
    assert len(count_grid({"one": FOUND}).rows) == 1
    assert count_grid({}).rows == []


def test_a_length_stands_in_one_row_with_ours() -> None:
    """The prediction for the authors' run and that for our method are of one published number."""
    theirs = claim(0.05, "row6-released", method="released").model_copy(update={"place": "row 6"})
    ours = claim(0.5, "row6-alst", method="alst").model_copy(update={"place": "row 6"})
    assert [row[:6] for row in length_grid([ours, theirs]).rows] == [
        ["row6", "100", "105", "+5.0%", "–", "150"]
    ]
    (alone,) = length_grid([ours]).rows
    assert alone[:6] == ["row6", "100", "–", "–", "–", "150"]
