"""Committed records keep their names when cells gain fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.records import record

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "results" / "reference").glob("*/*/*.json"))


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECORDS}), ids=lambda p: p.name)
def test_a_committed_record_still_has_the_key_of_its_cell(folder: Path) -> None:
    """A new field at its default is not part of an old cell's key."""
    for path in folder.glob("*.json"):
        assert record.read(path).cell.key == path.stem
