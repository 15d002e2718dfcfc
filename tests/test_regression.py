"""Simulated numbers stay what they are, and a planted leak is named with its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from samples import PROVENANCE

from harness import paths, record
from harness.cell import Cell, make_cell
from harness.compare import changes
from harness.defects import Defect, plant, read_defects
from harness.forecast import execute, setting
from harness.predict import predict
from harness.prediction import Prediction, Simulated
from harness.processes import Rank
from harness.record import Measurement, Outcome, settled

ROOT = Path(__file__).parent.parent
SEARCHED = ("paper_ablation/*", "longest/llama3.1-8b_layerwise-sp1_*")
QUICK = ("seq1f1b/*",)
"""Cells of these are simulated again here; `alst claims` does all of every experiment, with their searches."""
SOUND = Defect(file="__init__.py", edits=[])
LEAK = read_defects(ROOT / paths.DEFECTS)["the recomputed output stays alive"]
"""The checkpoint function holds the layer's output while the layer's backward runs."""


def references(*patterns: str) -> list[Path]:
    """Committed records, in order."""
    committed = ROOT / "results" / "reference"
    return [path for each in patterns for path in sorted(committed.glob(f"*/{each}.json"))]


PROGRAM = """
import json, sys
from pathlib import Path
from harness.forecast import execute
from harness.processes import Rank
print(json.dumps(execute(Rank(0, 1, Path("."), lambda _: None), json.load(sys.stdin))))
"""


def payload(cell: Cell) -> dict[str, Any]:
    """`cell` without its search, as `harness.forecast.execute` takes it."""
    assert cell.simulation is not None
    short = cell.simulation.model_copy(update={"search": False})
    return {"cell": cell.model_copy(update={"simulation": short}).model_dump(mode="json")}


def recorded(cell: Cell, readings: dict[str, Any]) -> Measurement:
    """A record of `cell`."""
    return settled(
        Measurement(
            cell=cell,
            outcome=Outcome.OK,
            readings=None,
            simulated=Simulated(**readings),
            provenance=PROVENANCE,
        )
    )


def simulated_by(package: Path, cell: Cell) -> Measurement:
    """A record of `cell` by the `alst_impl` in folder `package`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(payload(cell)),
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return recorded(cell, json.loads(done.stdout))


def assert_unchanged(before: Measurement, after: Measurement) -> None:
    """Fails where a byte count moved, naming operator and line of what grew."""
    moved = changes({"cell": before}, {"cell": after})
    assert not moved, "\n".join(map(str, moved))


@pytest.mark.parametrize("path", references(*SEARCHED, *QUICK), ids=lambda path: path.stem)
def test_committed_numbers_have_not_moved(path: Path, tmp_path: Path) -> None:
    """Bytes per token and peak of a reference cell; `alst reference --reason` is the way to change them."""
    before = record.read(path)
    readings = execute(Rank(0, 1, tmp_path, lambda _: None), payload(before.cell))
    assert_unchanged(before, recorded(before.cell, readings))


@pytest.mark.parametrize("path", references(*SEARCHED), ids=lambda path: path.stem)
def test_committed_lengths_have_not_moved(path: Path) -> None:
    """The longest sequence of a reference cell still fits, and the next one tried still does not.

    A length is a threshold: another release of PyTorch that allocates a few bytes less moves it.
    """
    before = record.read(path)
    made_with = before.provenance.versions["torch"].split("+")[0]
    if version("torch").split("+")[0] != made_with:
        pytest.skip(f"searched with torch {made_with}")
    assert before.simulated is not None
    assert before.simulated.search is not None
    found, of = before.simulated.search, setting(before.cell)

    def at(seqlen: int) -> Prediction:
        longer = of.train.model_copy(update={"seqlen": seqlen})
        return predict(of.model_copy(update={"train": longer}), slope=False)

    assert at(found.longest_tokens).fits, "a sequence that fitted does not"
    assert at(found.shortest_failing_tokens).limit == found.limit, "a longer sequence fits now"


def test_a_planted_leak_fails_and_names_its_line(tmp_path: Path) -> None:
    """Holding the layer's output in backward costs one hidden size per token, made by one line."""
    cell = make_cell(
        {
            "model": "llama3.1-8b",
            "method": {"name": "alst", "sp": 8},
            "engine": "fsdp2",
            "dtype": "bfloat16",
            "world_size": 8,
            "seqlen": 1_000_000,
            "world": "sim",
            "hardware": "h100-80gb",
        }
    )
    before = simulated_by(plant(SOUND, tmp_path / "sound"), cell)
    assert_unchanged(before, before)
    leaky = simulated_by(plant(LEAK, tmp_path / "leaky"), cell)
    with pytest.raises(AssertionError) as failure:
        assert_unchanged(before, leaky)
    said = str(failure.value)
    assert "bytes_per_local_token" in said
    assert "worse" in said
    assert "aten::" in said
    assert ".py:" in said
