"""Records on disk."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from harness.cells.cell import make_cell
from harness.records import record
from harness.records.provenance import provenance
from harness.records.record import Measurement, Outcome

MEASUREMENT = Measurement(
    cell=make_cell(
        {"model": "tiny-llama", "method": {"name": "alst", "sp": 2}, "world_size": 2, "seqlen": 64}
    ),
    outcome=Outcome.KILLED,
    detail="rank 1: SIGKILL",
    readings=None,
    provenance=provenance(1.5),
)


def test_record_reads_back_equal(tmp_path: Path) -> None:
    """Writing and reading changes nothing."""
    path = tmp_path / "deep" / "record.json"
    record.write(path, MEASUREMENT)
    assert record.read(path) == MEASUREMENT


def test_failed_write_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is interrupted leaves the previous file and nothing beside it."""
    path = tmp_path / "record.json"
    record.write(path, MEASUREMENT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.write(path, MEASUREMENT.model_copy(update={"detail": "other"}))
    assert record.read(path) == MEASUREMENT
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_record(tmp_path: Path) -> None:
    """Here a limit of 100 bytes for a file."""
    path = tmp_path / "record.json"
    record.write(path, MEASUREMENT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            record.write(path, MEASUREMENT.model_copy(update={"detail": "other"}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert record.read(path) == MEASUREMENT
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    """A file that is not a record of this version fails with its name."""
    path = tmp_path / "record.json"
    path.write_text(
        MEASUREMENT.model_dump_json().replace('"schema_version":1', '"schema_version":99')
    )
    with pytest.raises(ValueError, match=r"record\.json is not a record: schema_version"):
        record.read(path)


def test_provenance_names_libraries_and_machine() -> None:
    """A record says which libraries and which processor made it."""
    found = MEASUREMENT.provenance
    assert {"torch", "transformers", "deepspeed"} <= found.versions.keys()
    assert found.cores >= 1
    assert found.device
