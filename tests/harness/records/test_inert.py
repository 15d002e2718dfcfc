"""Text of records in a spreadsheet."""

from __future__ import annotations

import csv
import io

import pytest

from harness.present.grids.base import Grid
from harness.records.inert import inert


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        '=HYPERLINK("http://x")',
        "+1+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        " =1",
        "\t=1",
        "\r=1",
        "\n=1",
    ],
)
def test_what_a_spreadsheet_would_compute_is_text(text: str) -> None:
    """An apostrophe in front makes it so, in the tables of the report, too."""
    ((_, _), (_, read)) = csv.reader(io.StringIO(Grid(["a", "b"], [["x", text]]).csv()))
    assert read == inert(text)
    assert read.startswith("'")
    assert read.endswith(text.strip())


def test_a_break_begins_no_other_row() -> None:
    """Nor another cell."""
    assert inert("fine\r\n=1+1\t=2") == "fine =1+1 =2"


@pytest.mark.parametrize("value", ["-1.5%", "+3", "-1,024 B", "-2e-5", "ok", "", "–", -3, None])
def test_numbers_and_words_stay(value: object) -> None:
    """With their signs and units."""
    assert inert(value) == value
