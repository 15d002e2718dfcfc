"""Which changes of the code make a record stale."""

from __future__ import annotations

import pytest
from phantoms import NEEDED, cell, measured

from harness.records.sources import without_words
from harness.run.measure import stale

CODE = '''"""A module."""

LIMIT = 3
"""Of something."""


def double(x: int) -> int:
    """Twice x."""
    text = "# not a comment"  # a comment
    # of two
    return 2 * x
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [("Twice x.", "Double of x:\n\n    2 x."), ("    # of two\n", ""), ("\n\n\n", "\n")],
)
def test_words_decide_nothing(old: str, new: str) -> None:
    """Docstrings, comments and blank lines."""
    assert without_words(CODE) == without_words(CODE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"), [("2 * x", "3 * x"), ("# not a", "# no"), ("LIMIT = 3", "LIMIT = 4")]
)
def test_code_does(old: str, new: str) -> None:
    """Also what a string says."""
    assert without_words(CODE) != without_words(CODE.replace(old, new))


@NEEDED[0]
@NEEDED[1]
def test_a_forecast_of_this_code_is_not_stale() -> None:
    """Though phantom devices have a build of PyTorch of their own."""
    assert not stale(measured(cell(method="baseline", engine="plain", seqlen=256)))
