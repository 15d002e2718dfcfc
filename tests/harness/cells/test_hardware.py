"""Hardware rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cells.hardware import ROWS, load_hardware


def test_rows_are_found_by_name() -> None:
    """The rows that experiments use exist, each with its source."""
    assert set(ROWS) >= {"cpu", "a100-80gb", "h100-80gb", "h200-141gb", "b200-192gb"}
    assert all(row.name == name and row.source for name, row in ROWS.items())


def test_own_row_comes_from_a_file(tmp_path: Path) -> None:
    """A user's row can be a YAML file."""
    path = tmp_path / "mine.yaml"
    path.write_text("{name: mine, memory_bytes: 24_000_000_000, devices_per_node: 2, source: me}")
    assert load_hardware(str(path)).memory_bytes == 24_000_000_000


@pytest.mark.parametrize("text", ["{name: mine}", "- 1", "{name: ["])
def test_bad_row_names_the_file(tmp_path: Path, text: str) -> None:
    """A malformed row fails with its file."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_hardware(str(path))
