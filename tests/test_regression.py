"""Predicted numbers do not change, and a planted leak is reported with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from phantoms import NEEDED, measured, torch_version

from harness.cells import paths
from harness.cells.cell import Cell, make_cell
from harness.judge.compare import changes
from harness.judge.defects import plant, read_defects
from harness.records import record
from harness.records.record import Measurement, Outcome
from harness.run.measure import measure

ROOT = Path(__file__).parent.parent
QUICK = (
    "paper_parts/*_plain_*",
    "paper_parts/llama3.1-8b_alst-*sp8_*",
    "paper_ablation/llama3.1-8b_alst-offloadFalse-tile_mlpFalse_*",
    "longest/llama3.1-8b_layerwise-sp8_fsdp2_w8_s4000000_*",
)
"""Phantom cells that are run again here. Cells of world `schedule` are cheap, so all of them run."""
SEARCHED = "paper_ablation/llama3.1-8b_alst-offloadFalse-tile_mlpFalse_*"
LEAK = read_defects(ROOT / paths.DEFECTS)["the recomputed output stays alive"]
"""The checkpoint function keeps the layer's output alive while the layer's backward runs."""


def references(*patterns: str) -> list[Path]:
    """Committed records, sorted."""
    committed = ROOT / "results" / "reference"
    return [path for each in patterns for path in sorted(committed.glob(f"*/{each}.json"))]


def unsearched(cell: Cell) -> Cell:
    """`cell` without its search."""
    assert cell.simulation is not None
    short = cell.simulation.model_copy(update={"search": False})
    return cell.model_copy(update={"simulation": short})


def assert_unchanged(before: Measurement, after: Measurement) -> None:
    """Fails if a byte count changed, naming function and line of what grew."""
    moved = changes({"cell": before}, {"cell": after})
    assert not moved, "\n".join(map(str, moved))


def require_its_torch(before: Measurement) -> None:
    """Skip where PyTorch is of another version: bytes are equal at equal versions."""
    made = before.provenance.versions["torch"]
    if tuple(int(part) for part in made.split(".")[:2]) != torch_version():
        pytest.skip(f"the committed bytes are those of torch {made}")


@pytest.mark.parametrize("path", references("seq1f1b/*"), ids=lambda path: path.stem)
def test_committed_schedules_have_not_changed(path: Path) -> None:
    """The bytes of a reference cell of world `schedule` are unchanged. `alst reference --reason` is
    the way to change them.
    """
    before = record.read(path)
    assert_unchanged(before, measure(before.cell, Path("unused")))


@pytest.mark.parametrize("path", references(*QUICK), ids=lambda path: path.stem)
@NEEDED[0]
@NEEDED[1]
def test_committed_numbers_have_not_changed(path: Path) -> None:
    """Bytes per token and peak of a reference cell are unchanged. `alst reference --reason` is the
    way to change them.
    """
    before = record.read(path)
    require_its_torch(before)
    assert_unchanged(before, measured(unsearched(before.cell)))


@pytest.mark.parametrize("path", references(SEARCHED), ids=lambda path: path.stem)
@NEEDED[0]
@NEEDED[1]
def test_committed_lengths_have_not_changed(path: Path) -> None:
    """The longest sequence of a reference cell still fits, and the shortest failing one still does not."""
    before = record.read(path)
    require_its_torch(before)
    assert before.simulated is not None
    found = before.simulated.search
    assert found is not None

    def at(seqlen: int) -> Outcome:
        train = before.cell.train.model_copy(update={"seqlen": seqlen})
        return measured(unsearched(before.cell).model_copy(update={"train": train})).outcome

    assert at(found.longest_tokens) is Outcome.OK
    assert at(found.shortest_failing_tokens) is Outcome.DOES_NOT_FIT


@NEEDED[0]
@NEEDED[1]
def test_a_planted_leak_fails_and_names_its_line(tmp_path: Path) -> None:
    """Keeping the layer's output alive in backward costs one hidden size per token, at one line. The peak is there."""
    cell = make_cell(
        {
            "model": "llama3.1-8b",
            "overrides": {"num_hidden_layers": 4},
            "method": {"name": "alst", "sp": 8},
            "engine": "fsdp2",
            "dtype": "bfloat16",
            "world_size": 8,
            "seqlen": 1_600_000,
            "world": "phantom",
            "hardware": "h100-80gb",
            "simulation": {"search": False},
        }
    )
    before, leaky = measured(cell), measured(cell, plant(LEAK, tmp_path))
    with pytest.raises(AssertionError) as failure:
        assert_unchanged(before, leaky)
    said = str(failure.value)
    assert "bytes_per_local_token" in said
    assert "worse" in said
    assert ".py:" in said
