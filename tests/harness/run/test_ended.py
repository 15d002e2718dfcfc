"""A run that is ended from outside, or meets another on its folder, loses no record, and the next one resumes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.records import record
from harness.records.record import Outcome

ROOT = Path(__file__).parents[3]
BASE = {
    "model": "tiny-llama",
    "engine": "plain",
    "world_size": 2,
    "seqlen": 64,
    "gate": False,
    "warmup": 0,
    "steps": 1,
}
YAML = f"""
question: Which?
source: here
base: {json.dumps(BASE)}
sweeps:
  - axes:
      method: [{{name: alst, sp: 2}}]
      seed: [0, 1, 2, 3]
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment of four cells."""
    path = tmp_path / "four.yaml"
    path.write_text(YAML)
    return path


def started(experiment: Path, results: Path) -> subprocess.Popen[str]:
    """A process that runs `experiment`."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "run", str(experiment), "--results", str(results)],
        cwd=experiment.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(results: Path) -> dict[Path, bytes]:
    """The records that are there."""
    return {path: path.read_bytes() for path in results.rglob("cells/*/*.json")}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_loses_no_record(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    """What is measured stays as it is, no rank is left, and the next run measures the rest."""
    results = tmp_path / "results"
    run = started(experiment, results)
    while not records(results):
        assert run.poll() is None
        select.select([], [], [], 0.02)
    run.send_signal(end)
    _, err = run.communicate(timeout=30)
    kept = records(results)
    assert run.returncode in (-end, 130)
    assert "Traceback" not in err
    for path in kept:
        assert record.read(path).outcome is Outcome.OK

    monkeypatch.setattr(sys, "argv", ["alst", "run", str(experiment), "--results", str(results)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    now = records(results)
    assert len(now) == 4
    assert all(now[path] == text for path, text in kept.items())
    assert all(record.read(path).outcome is Outcome.OK for path in now)
    assert not list(results.rglob(".*.json.*"))


def test_two_runs_on_one_folder_leave_whole_records(experiment: Path, tmp_path: Path) -> None:
    """Each cell has one, whichever run wrote it."""
    results = tmp_path / "results"
    both = [started(experiment, results) for _ in range(2)]
    for run in both:
        _, err = run.communicate(timeout=100)
        assert run.returncode == 0, err
    found = records(results)
    assert len(found) == 4
    assert all(record.read(path).outcome is Outcome.OK for path in found)
    assert not list(results.rglob(".*.json.*"))
