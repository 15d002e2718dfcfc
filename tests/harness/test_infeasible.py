"""A simulated step that exceeds the machine is a separate outcome, never a success."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import cell
from samples import searched as simulated

from harness.cells import paths
from harness.cells.experiment import load_experiment
from harness.commands import present
from harness.judge.claims import evidence
from harness.judge.compare import changes
from harness.present import drawing
from harness.present.drawing import DOES_NOT_FIT
from harness.present.figures.base import draw
from harness.present.grids.gradients import finding_grid
from harness.present.grids.predicted import simulated_grid
from harness.present.pages.base import Committed, Kept
from harness.present.pictures import svg
from harness.present.report import BAD, GOOD, page
from harness.records import record
from harness.records.record import Measurement, Outcome, settled
from harness.records.table import Results, fresh, tidy

GIB = 2**30
YAML = """question: q
source: s
base: {model: tiny-llama, seqlen: 1_000, world: phantom, engine: fsdp2, hardware: h100-80gb}
sweeps:
  - axes:
      _row:
        - method: {name: alst}
          claim: {id: one, table: told, row: {name: ours}, columns: {step_seconds: tokens}}
"""


def over(of: Measurement) -> Measurement:
    """The record of a cell whose step exceeds the device, with the old outcome `ok`."""
    assert of.simulated is not None
    assert of.simulated.prediction is not None
    more = {"fits": False, "limit": "gpu_memory", "total_bytes": 90 * GIB}
    prediction = of.simulated.prediction.model_copy(update=more)
    return of.model_copy(
        update={"simulated": of.simulated.model_copy(update={"prediction": prediction})}
    )


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """One simulated cell that does not fit, with one claimed number, read from its record."""
    monkeypatch.chdir(tmp_path)
    record.write_text(paths.experiment("told"), YAML)
    record.write_text(
        paths.published("told"), "name,tokens,source,source_locator\nours,10,a paper,Table 1\n"
    )
    (of,) = load_experiment(paths.experiment("told")).cells().values()
    record.write(paths.cells("told") / f"{of.key}.json", over(simulated(of)))
    return fresh(paths.experiment("told"))


def test_an_infeasible_step_is_shown_as_infeasible(results: Results) -> None:
    """The table, the report and the published number show it, whatever its record says."""
    (m,) = results.measurements.values()
    assert (m.outcome, m.detail) == (Outcome.DOES_NOT_FIT, "more than the GPU's memory: 90 GiB")
    assert set(tidy(results)["outcome"]) == {"does_not_fit"}
    grid = simulated_grid(results)
    assert {"does_not_fit", "GPU memory"} <= set(grid.rows[0])
    assert finding_grid(results).rows == []
    (claim,) = evidence([results])
    assert claim.infeasible
    shown = page(Committed([Kept(paths.cells("told"), results)]))
    assert '<td class="bad">does_not_fit</td>' in shown
    assert "reproduced (does_not_fit)" in shown
    assert "1 of 1 cells simulated: 1 does_not_fit" in shown
    assert "simulated H100-80GB" in shown


def test_every_outcome_has_a_colour() -> None:
    """Exactly one outcome is a success."""
    assert {outcome.value for outcome in Outcome} <= GOOD | BAD
    assert GOOD & set(Outcome) == {"ok"}


def test_summary_counts_simulated_cells(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts them by outcome, and as simulated."""
    present.summary(["told"])
    assert "told: 1 of 1 cells simulated: 1 does_not_fit." in capsys.readouterr().out


def test_a_cell_that_no_longer_fits_got_worse() -> None:
    """A cell that newly fits got better. The same line names what grew."""
    of = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    small, large = simulated(of), settled(over(simulated(of, peak=2 * GIB)))
    worse = changes({"key": small}, {"key": large})
    assert [(c.quantity, c.worse) for c in worse] == [("outcome", True), ("peak_bytes", True)]
    assert not any(c.worse for c in changes({"key": large}, {"key": small}))
    assert changes({"key": large}, {"key": large}) == []


def test_a_step_that_does_not_fit_is_crossed_out() -> None:
    """Figures of simulated cells cross it out and explain the mark in the legend. Other figures have neither."""
    of = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")

    def crosses(m: Measurement) -> tuple[int, int]:
        drawn = draw("methods", Results("n", "q", "s", ["methods"], {of.key: of}, {of.key: m}))
        lines = [line for axes in drawn.axes for line in axes.get_lines()]
        entries = [
            text for text in drawn.legends[0].get_texts() if text.get_text() == "does not fit"
        ]
        return len([line for line in lines if line.get_gid() == DOES_NOT_FIT["gid"]]), len(entries)

    assert crosses(settled(over(simulated(of)))) == (1, 1)
    assert crosses(simulated(of)) == (0, 0)


def test_simulated_cells_are_never_drawn_as_measured() -> None:
    """A figure of lengths for an experiment with simulated cells has the marks of predictions."""
    of = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    results = Results("n", "q", "s", ["peak_memory"], {of.key: of}, {of.key: simulated(of)})
    (entry,) = draw("peak_memory", results).legends[0].get_lines()
    assert (entry.get_label(), entry.get_markerfacecolor()) == ("predicted", "white")
    absent = Results("n", "q", "s", ["methods"], {of.key: of}, {})
    assert "not simulated" in drawing.source_line(absent)
    assert "not measured" not in svg(draw("methods", absent))
