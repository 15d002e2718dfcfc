"""The commands that turn records into tables, figures and the report, in a separate checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from samples import cell, measurement

from harness.cells import paths
from harness.commands import present
from harness.present import pictures
from harness.present.figures.base import draw
from harness.present.generated import pages, path_of
from harness.records import record
from harness.records.table import Results, fresh

YAML = """question: q
source: s
base: {model: tiny-llama, world_size: 2, seqlen: 1024}
sweeps:
  - axes: {method: [{name: baseline}, {name: alst, sp: 2}]}
figures: [headline]
"""
README = """<!-- begin: headline -->
<!-- end: headline -->
<!-- begin: summary -->
<!-- end: summary -->
"""
MEASURED = paths.REFERENCE / "measured.md"


def measured() -> None:
    """Makes this folder a checkout with an experiment of two measured cells."""
    record.write_text(paths.experiment("two"), YAML)
    record.write_text(paths.README, README)
    for method in ("baseline", "alst"):
        m = measurement(cell(method))
        record.write(paths.cells("two") / f"{m.cell.key}.json", m)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an experiment of two measured cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    measured()
    return tmp_path


@pytest.fixture(scope="module")
def promoted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a checkout, whose records are reference records."""
    folder = tmp_path_factory.mktemp("promoted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CI", raising=False)
        measured()
        present.reference("two")
    return folder


@pytest.fixture
def promoted(checkout: Path, promoted_once: Path) -> Path:
    """A copy of it."""
    shutil.copytree(promoted_once, checkout, dirs_exist_ok=True)
    return checkout


def test_table_figures_and_report_appear(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command writes to the path that the README names, and `alst report` says where."""
    present.table("two")
    present.figures("two")
    assert present.report(["two"]) == 0
    assert f"wrote {paths.REPORT}" in capsys.readouterr().out
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


def test_reference_renews_the_readme(promoted: Path) -> None:
    """Promoted records are copied, drawn, and put into the README and its pages."""
    folder = paths.REFERENCE / "cpu" / "two"
    assert len(list(folder.glob("*.json"))) == 2
    assert (folder / "headline.png").is_file()
    assert "| 1K | alst |" in MEASURED.read_text()
    assert "cpu/two/headline.png" in MEASURED.read_text()
    assert "results/reference/measured.md" in paths.README.read_text()
    assert present.report(check=True) == 0
    paths.README.write_text(README)
    assert present.report(check=True) == 1


def test_part_of_an_experiment_leaves_no_empty_folder(checkout: Path) -> None:
    """Hardware without a measured cell has no committed records."""
    more = YAML.replace(
        "figures:", "  - base: {hardware: h100-80gb}\n    axes: {method: [baseline]}\nfigures:"
    )
    record.write_text(paths.experiment("two"), more)
    present.reference("two", partial=True)
    assert [folder.parent.name for folder in paths.REFERENCE.glob("*/two")] == ["cpu"]
    assert present.report(check=True) == 0


def test_a_stale_page_fails_the_check(promoted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named, left as it is, and made anew when asked for."""
    written = {path_of(name): path_of(name).read_text() for name in pages()}
    assert len(written) >= 5
    for path, text in written.items():
        path.write_text(f"{text}a word of somebody\n")
    assert present.report(check=True) == 1
    said = capsys.readouterr().err
    assert all(str(path) in said for path in written)
    assert all(path.read_text() != text for path, text in written.items())
    assert present.report(readme=True) == 0
    assert {path: path.read_text() for path in written} == written


def test_a_missing_page_fails_the_check(promoted: Path) -> None:
    """A page that was removed is as stale as one that differs."""
    MEASURED.unlink()
    assert present.report(check=True) == 1


def test_a_stale_figure_fails_the_check(promoted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure of other records does not pass; its pixels may differ."""
    path = paths.REFERENCE / "cpu" / "two" / "headline.png"
    other = Results("two", "q", "s", ["headline"], {cell().key: cell()}, {})
    path.write_bytes(pictures.png(draw("headline", other)))
    assert present.report(check=True) == 1
    assert str(path) in capsys.readouterr().err
    results = fresh(paths.experiment("two"))
    path.write_bytes(pictures.png(draw("headline", results), dpi=20))
    assert present.report(check=True) == 0


def test_reference_refuses_records_of_a_dirty_tree(checkout: Path) -> None:
    """Records of uncommitted code are refused, unless allowed."""
    m = measurement(cell("alst"))
    unclean = m.model_copy(update={"provenance": m.provenance.model_copy(update={"dirty": True})})
    record.write(paths.cells("two") / f"{m.cell.key}.json", unclean)
    with pytest.raises(ValueError, match="--dirty"):
        present.reference("two")
    present.reference("two", dirty=True)
    assert "uncommitted changes" in MEASURED.read_text()


def test_reference_refuses_holes(checkout: Path) -> None:
    """A reference needs a record of every cell."""
    next(paths.cells("two").glob("*alst*")).unlink()
    with pytest.raises(ValueError, match="no record of"):
        present.reference("two")
