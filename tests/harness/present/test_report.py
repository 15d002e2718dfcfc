"""Tables and the report."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from samples import cell, measurement, sweep

from harness.cells import paths
from harness.cells.units import bytes_text, length_text, seconds_text
from harness.present import drawing, report
from harness.present.figures.base import draw
from harness.present.grids.gradients import finding_grid
from harness.present.grids.measured import headline_grid, summary, time_verdict
from harness.present.report import page
from harness.records.table import Results, duels, tidy, wide

ROOT = Path(__file__).parents[3]


class Loads(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [v or "" for k, v in attrs if k in {"src", "srcset", "data"}]
        self.urls += [v or "" for k, v in attrs if k == "href" and tag == "link"]


def html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Results) -> str:
    """The page of `results`, with one figure drawn."""
    monkeypatch.chdir(tmp_path)
    folder = paths.figures(results.name)
    folder.mkdir(parents=True)
    (folder / "headline.svg").write_text(drawing.svg(draw("headline", results)))
    return page([results])


def test_report_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page opens from disk: figures are inside it, and there is no script."""
    text = html(tmp_path, monkeypatch, sweep())
    parser = Loads()
    parser.feed(text)
    assert len(parser.urls) == 1
    assert parser.urls[0].startswith("data:image/svg+xml;base64,")
    assert "<script" not in text
    assert not re.search(r"url\(|@import", text)


def test_report_shows_every_cell_and_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failures and cells not measured are rows, and wrong gradients are named."""
    results = sweep()
    text = html(tmp_path, monkeypatch, results)
    for word in ("host_oom", "not measured", "wrong_gradient", "lm_head.weight", results.question):
        assert word in text


def test_report_escapes_what_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text from outside is text, not markup."""
    original = sweep()
    results = Results("s", "<b>why</b>", "", ["headline"], original.cells, original.measurements)
    assert "<b>why</b>" not in html(tmp_path, monkeypatch, results)


@pytest.mark.parametrize(
    ("speed", "verdict"), [(1.05, "within spread"), (2.0, "faster"), (0.5, "slower")]
)
def test_time_within_the_spread_is_no_difference(speed: float, verdict: str) -> None:
    """Faster and slower are said only of steps whose spreads do not overlap."""
    records = [measurement(cell("alst"), speed=speed), measurement(cell("deepspeed_alst"))]
    by_key = {m.cell.key: m for m in records}
    both = Results("t", "?", "", [], {k: m.cell for k, m in by_key.items()}, by_key)
    (pair,) = duels(wide(tidy(both)), "alst", "deepspeed_alst").to_dict("records")
    assert time_verdict({str(k): v for k, v in pair.items()}) == verdict


def test_headline_is_the_longest_series_beside_ours() -> None:
    """A row per length and method, each beside ours."""
    grid = headline_grid(sweep())
    assert [row[:2] for row in grid.rows[:3]] == [
        ["1K", "baseline (4 samples)"],
        ["1K", "deepspeed_alst"],
        ["1K", "alst"],
    ]
    assert grid.rows[0][3] == "1.60x"


def test_presentation_imports_no_torch() -> None:
    """Tables, figures and reports are made on machines without it."""
    code = (
        "import sys, harness.present.report, harness.present.generated, harness.commands.present; "
        "harness.present.generated.pages(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_units_for_people() -> None:
    """Powers of 1024 for bytes, ms below a second, K for lengths of whole 1024s."""
    assert [bytes_text(n) for n in (512, 1536 * 2**20, 640 * 2**20)] == [
        "512 B",
        "1.5 GiB",
        "640 MiB",
    ]
    assert [seconds_text(s) for s in (0.0123, 2.5)] == ["12.3 ms", "2.5 s"]
    assert [length_text(n) for n in (1000, 4096, 2**20)] == ["1,000", "4K", "1M"]


def test_summary_counts_both_ways() -> None:
    """The summary names each peer with how often the peak was lower; wrong gradients do not count."""
    text = summary(sweep())
    assert "Against deepspeed_alst: peak lower in 15 of 15" in text
    assert "Not counted: 2 with gradients wrong" in text
    assert "Against baseline: peak lower in 17 of 17" in text


def test_findings_show_how_gradients_differ() -> None:
    """Of cells that did not pass: the spread of ratios, the least cosine; passed ones are left out."""
    found = finding_grid(sweep()).rows
    wrong = [row for row in found if row[3] == "wrong_gradient"]
    assert wrong
    assert all(row[4:6] == ["1 to 1.01", "0.99"] for row in wrong)
    assert not [row for row in found if row[3] == "ok"]
    (oom,) = [row for row in found if row[3] == "host_oom"]
    assert oom[4:] == ["–", "–", "rank 1"]


def test_an_experiment_that_times_nothing_compares_no_performance(tmp_path: Path) -> None:
    """Gradients alone have no verdict on memory or time."""
    cells = [cell("alst", steps=0, warmup=0, timed=False), cell(steps=0, warmup=0, timed=False)]
    results = Results("peers", "?", "", [], {c.key: c for c in cells}, {})
    assert not report.section(results, tmp_path).verdicts.rows
