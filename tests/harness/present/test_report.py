"""Tables and the report."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from samples import cell, cuda_measurement, failure, gpu_sweep, measurement, searched, sweep

from harness.cells import paths
from harness.cells.experiment import load_experiment
from harness.cells.units import bytes_text, length_text, seconds_text
from harness.present.described import described
from harness.present.figures.base import draw
from harness.present.grids.gradients import finding_grid
from harness.present.grids.measured import cell_grid, headline_grid, summary, time_verdict
from harness.present.grids.overview import headline_claim_grid, waiting_grid
from harness.present.kinds import question_of
from harness.present.lengths import together
from harness.present.pages.base import Committed, Kept, load_with
from harness.present.report import QUESTIONS, order, page, section
from harness.records.record import Outcome, write, write_text
from harness.records.table import Results, duels, fresh, tidy, wide

ROOT = Path(__file__).parents[3]


class Loads(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [v or "" for k, v in attrs if k in {"src", "srcset", "data"}]
        self.urls += [v or "" for k, v in attrs if k == "href" and tag == "link"]


def committed(*results: Results) -> Committed:
    """Committed results that were written by hand."""
    return Committed([Kept(paths.REFERENCE / "cpu" / r.name, r) for r in results])


def html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *results: Results) -> str:
    """The page of `results`."""
    monkeypatch.chdir(tmp_path)
    return page(committed(*results))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a sweep, with its figures."""
    with pytest.MonkeyPatch.context() as patch:
        return html(tmp_path_factory.mktemp("report"), patch, sweep())


def test_report_loads_nothing(text: str) -> None:
    """The page opens from disk: figures and the script of its tables are inside it."""
    parser = Loads()
    parser.feed(text)
    assert len(parser.urls) == 1 + len(sweep().figures)
    assert all(url.startswith("data:image/svg+xml;base64,") for url in parser.urls)
    assert not re.search(r"url\(|@import", text)


def test_report_shows_what_went_wrong(text: str) -> None:
    """Failures and cells not measured are rows, and wrong gradients are named."""
    for word in ("host_oom", "not measured", "wrong_gradient", "lm_head.weight", sweep().question):
        assert word in text


def test_report_escapes_what_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text from outside is text, not markup."""
    results = replace(sweep(), question="<b>why</b>", figures=[])
    failed = cell()
    said = failure(failed, Outcome.HOST_OOM).model_copy(update={"detail": "<script>x</script>"})
    results = replace(results, cells={failed.key: failed}, measurements={failed.key: said})
    text = html(tmp_path, monkeypatch, results)
    assert "<b>why</b>" not in text
    assert "<script>x</script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text


@pytest.mark.parametrize("results", [[], [sweep()], [gpu_sweep()], [sweep(), gpu_sweep()]], ids=len)
def test_report_copes_with_few_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: list[Results]
) -> None:
    """All questions are there, and nothing says `None`."""
    text = html(tmp_path, monkeypatch, *(replace(each, figures=[]) for each in results))
    assert all(title in text for title, _ in QUESTIONS.values())
    assert "None" not in text


def test_questions_have_no_markup_of_other_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in backticks, as Markdown has it, is a name."""
    text = html(
        tmp_path, monkeypatch, replace(sweep(), question="What does `alst` cost?", figures=[])
    )
    assert "<h3>What does alst cost?</h3>" in text


def test_a_figure_without_data_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that only says that nothing was measured is none."""
    results = Results("s", "?", "", ["methods", "headline"], sweep().cells, sweep().measurements)
    assert "Longest sequence by method" not in html(tmp_path, monkeypatch, results)


def test_each_figure_has_a_description_with_its_numbers() -> None:
    """Rows with what stands beside their points, lines with their ends, and no word of what is not drawn."""
    drawn = draw("headline", sweep(models=("tiny-llama",)))
    text = described(drawn)
    assert text.startswith("tiny-llama on 4 ranks, CPU. Shown: baseline; deepspeed_alst; alst")
    assert "alst: 10 MiB at 1K, 12 MiB at 2K." in text
    rows = described(draw("longest_sequences", together([])))
    assert "MsT (A100-80GB): 60,000 (published)." in rows


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1M", "1,048,000", "160K", "99", "–"], ["–", "99", "160K", "1,048,000", "1M"]),
        (["1.5 GiB", "640 MiB", "512 B"], ["512 B", "640 MiB", "1.5 GiB"]),
        (["2.5 s", "12.3 ms", "1,500 s"], ["12.3 ms", "2.5 s", "1,500 s"]),
        (["+22%", "-4.0%", "1.2e-07", "0.96x"], ["-4.0%", "1.2e-07", "0.96x", "+22%"]),
    ],
)
def test_columns_sort_by_value(texts: list[str], expected: list[str]) -> None:
    """Whatever the unit; what is missing comes first."""
    assert sorted(texts, key=lambda text: float(order(text))) == expected


def test_tables_have_csv_and_name_their_records() -> None:
    """A column for the record of each row, where rows have one."""
    files = {key: Path("results/cells/s") / f"{key}.json" for key in sweep().cells}
    grid = cell_grid(replace(sweep(), files=files))
    first, *_ = csv.DictReader(grid.csv().splitlines())
    assert first["record"] in map(str, files.values())
    assert list(first)[:3] == ["cell", "ranks", "sp"]
    assert "record" not in cell_grid(sweep()).csv().splitlines()[0].split(",")


def test_last_runs_take_the_place_of_committed_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same experiment; all others are shown as they are committed."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_text(paths.experiment(name), YAML)
        m = measurement(cell())
        write(paths.REFERENCE / "cpu" / name / f"{m.cell.key}.json", m)
    write(paths.cells("two") / f"{m.cell.key}.json", m)
    shown = load_with([fresh(paths.experiment("two"))])
    assert [(k.results.name, k.is_committed) for k in shown.kept] == [("one", True), ("two", False)]
    text = page(shown)
    assert f"reference/cpu/one/{m.cell.key}.json" in text
    assert f"cells/two/{m.cell.key}.json" in text


YAML = """question: q
source: s
base: {model: tiny-llama, world_size: 2, seqlen: 1024}
sweeps: [{axes: {method: [{name: alst, sp: 2}]}}]
"""


def test_experiments_stand_under_the_question_that_they_answer() -> None:
    """By what their cells give and whose numbers they stand for."""
    asked = {
        path.stem: question_of(Results(e.name, "", "", [], e.cells(), {}, e.claims()))
        for path in sorted((ROOT / "experiments").glob("*.yaml"))
        if (e := load_experiment(path))
    }
    assert asked["correctness"] == asked["peers"] == asked["loss_parity"] == "same"
    assert asked["paper_scaling"] == asked["longest"] == asked["methods"] == "fits"
    assert asked["cpu_sweep"] == asked["step_times"] == asked["gpu_single"] == "costs"
    assert asked["paper_mst"] == asked["seq1f1b"] == "others"


def test_the_authors_own_code_is_the_evidence_for_a_headline_claim() -> None:
    """Our method stands in where their code has no record, and the row says so."""
    results = fresh(ROOT / "experiments" / "paper_scaling.yaml", Path("nowhere"))
    eight = {claim.id: key for key, claim in results.claims if claim.id.startswith("table3")}
    assert set(eight) == {"table3-baseline", "table3-deepspeed_alst", "table3-alst"}
    absent = {row[0]: row for row in headline_claim_grid([results], []).rows}
    assert absent["ALST, 8 GPUs"][1:] == ["3,800,000", "–", "no record", "–"]
    ours, theirs = eight["table3-alst"], eight["table3-deepspeed_alst"]
    results.measurements[ours] = searched(results.cells[ours], 5_000_000)
    (row,) = (r for r in headline_claim_grid([results], []).rows if r[0] == "ALST, 8 GPUs")
    assert row[2:] == ["5,000,000, our alst", "longer", "simulated H100-80GB"]
    results.measurements[theirs] = searched(results.cells[theirs], 3_000_000)
    (row,) = (r for r in headline_claim_grid([results], []).rows if r[0] == "ALST, 8 GPUs")
    assert row[2:] == ["3,000,000, as released", "refuted", "simulated H100-80GB"]


def test_the_same_training_is_a_headline_claim() -> None:
    """It holds if every gradient of our method does."""
    compared = replace(sweep(), refused=[])
    (row,) = headline_claim_grid([], [compared]).rows
    assert row == [
        "same training",
        "same loss",
        "in 17 of 17 cells",
        "reproduced",
        "every gradient, on CPU",
    ]
    key = next(key for key, of in compared.cells.items() if of.train.method.name == "alst")
    compared.measurements[key] = measurement(compared.cells[key], passed=False)
    (row,) = headline_claim_grid([], [compared]).rows
    assert row[2:4] == ["in 16 of 17 cells", "refuted"]


def test_experiments_that_wait_for_a_gpu_are_named() -> None:
    """With how many of their cells a GPU has measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        rows = {row[0]: row for row in waiting_grid([]).rows}
        assert {"gpu_single", "gpu_node"} <= set(rows)
        assert "cpu_sweep" not in rows
        e = load_experiment(ROOT / "experiments" / "gpu_node.yaml")
        done = {key: cuda_measurement(of) for key, of in e.cells().items()}
        results = Results(e.name, "", "", [], e.cells(), done)
        assert "gpu_node" not in {row[0] for row in waiting_grid([results]).rows}


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


def test_an_experiment_that_times_nothing_compares_no_performance() -> None:
    """Gradients alone have no verdict on memory or time."""
    cells = [cell("alst", steps=0, warmup=0, timed=False), cell(steps=0, warmup=0, timed=False)]
    results = Results("peers", "?", "", [], {c.key: c for c in cells}, {})
    titles = [table.title for table in section(committed(results).kept[0]).tables]
    assert "All cells" in titles
    assert "All comparisons of two methods" not in titles
