"""Text of records in a spreadsheet."""

from __future__ import annotations

import csv
import io

import pytest

from harness.present.grids.base import Grid
from harness.records.inert import inert


@pytest.mark.parametrize(
    "text",
    ["=1+1", '=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"],
)
def test_what_a_spreadsheet_would_compute_is_text(text: str) -> None:
    """An apostrophe in front makes it so, in the tables of the report, too."""
    assert inert(text) == f"'{text}"
    ((_, _), (_, read)) = csv.reader(io.StringIO(Grid(["a", "b"], [["x", text]]).csv()))
    assert read.replace("\n", "\r") == f"'{text}"


@pytest.mark.parametrize("value", ["-1.5%", "+3", "-1,024 B", "-2e-5", "ok", "", "–", -3, None])
def test_numbers_and_words_stay(value: object) -> None:
    """With their signs and units."""
    assert inert(value) == value
