"""The commands that turn records into tables, figures and the report, in a separate checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import cell, measurement

from harness.cells import paths
from harness.commands import present
from harness.records import record

YAML = """question: q
source: s
base: {model: tiny-llama, world_size: 2, seqlen: 1024}
sweeps:
  - axes: {method: [{name: baseline}, {name: alst, sp: 2}]}
figures: [headline]
"""
README = """<!-- begin: versions -->
<!-- end: versions -->
<!-- begin: headline -->
<!-- end: headline -->
<!-- begin: results -->
<!-- end: results -->
<!-- begin: claims -->
<!-- end: claims -->
<!-- begin: correctness -->
<!-- end: correctness -->
<!-- begin: records -->
<!-- end: records -->
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an experiment of two measured cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    record.write_text(paths.experiment("two"), YAML)
    record.write_text(paths.README, README)
    for method in ("baseline", "alst"):
        m = measurement(cell(method))
        record.write(paths.cells("two") / f"{m.cell.key}.json", m)
    return tmp_path


def test_table_figures_and_report_appear(checkout: Path) -> None:
    """Each command writes to the path that the README names."""
    present.table("two")
    present.figures("two")
    assert present.report(["two"]) == 0
    for file in ("tables/two.csv", "figures/two/headline.png", "figures/two/headline.svg"):
        assert (checkout / "results" / file).stat().st_size > 0
    assert "data:image/svg" in paths.REPORT.read_text()


def test_summary_says_where_the_report_is(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of `make` is the path of the report."""
    present.summary(["two"])
    shown = capsys.readouterr().out
    assert (checkout / paths.REPORT).as_uri() in shown
    assert "baseline (2 samples)" in shown


def test_reference_renews_the_readme(checkout: Path) -> None:
    """Promoted records are copied and drawn, and their numbers go into the README."""
    present.reference("two")
    folder = paths.REFERENCE / "cpu" / "two"
    assert len(list(folder.glob("*.json"))) == 2
    assert "| 1K | alst |" in paths.README.read_text()
    assert "headline.png" in paths.README.read_text()
    assert present.report(check=True) == 0
    paths.README.write_text(README)
    assert present.report(check=True) == 1


def test_reference_refuses_records_of_a_dirty_tree(checkout: Path) -> None:
    """Records of uncommitted code are refused, unless allowed."""
    m = measurement(cell("alst"))
    unclean = m.model_copy(update={"provenance": m.provenance.model_copy(update={"dirty": True})})
    record.write(paths.cells("two") / f"{m.cell.key}.json", unclean)
    with pytest.raises(ValueError, match="--dirty"):
        present.reference("two")
    present.reference("two", dirty=True)
    assert "uncommitted changes" in paths.README.read_text()


def test_reference_refuses_holes(checkout: Path) -> None:
    """A reference needs a record of every cell."""
    next(paths.cells("two").glob("*alst*")).unlink()
    with pytest.raises(ValueError, match="no record of"):
        present.reference("two")
