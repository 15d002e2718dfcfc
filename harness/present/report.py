"""Records to one self-contained HTML page: the verdict first, then four questions with their experiments."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from harness.cells import paths
from harness.judge.claims import TOLERANCE, evidence
from harness.present import pictures
from harness.present.described import described
from harness.present.figures.base import draw
from harness.present.grids.base import Grid, sort_value
from harness.present.grids.claims import claim_grid, claim_summary, miss_grid
from harness.present.grids.gradients import (
    defect_grid,
    finding_grid,
    method_grid,
    refusal_grid,
    verdict_counts,
    worst_grid,
)
from harness.present.grids.measured import (
    cell_grid,
    headline_grid,
    headline_title,
    ratio_grid,
    summary,
    verdict_grid,
)
from harness.present.grids.origins import environment_grid
from harness.present.grids.overview import (
    correctness_line,
    headline_claim_grid,
    length_rows,
    waiting_grid,
)
from harness.present.grids.predicted import simulated_grid, twin_grid
from harness.present.kinds import (
    Question,
    is_compared,
    is_repeated,
    is_simulated,
    is_timed,
    question_of,
)
from harness.present.lengths import beside_published, shortened, together
from harness.present.pages import families, longest
from harness.present.pages.base import Committed, Kept
from harness.present.render import render
from harness.records.record import Outcome
from harness.records.table import (
    NOT_MEASURED,
    NOT_SIMULATED,
    Results,
    counted_outcomes,
    machine_of,
    measured_part,
    source_line,
)

GATES = ("passed", "failed")
GOOD = {Outcome.OK.value, "passed", "lower", "faster", "passed / passed", "reproduced", "equal"}
"""Words of a table that are drawn as a success."""
BAD = {
    *(outcome.value for outcome in Outcome if outcome is not Outcome.OK),
    *(f"{ours} / {theirs}" for ours in GATES for theirs in GATES if "failed" in (ours, theirs)),
    *("failed", "higher", "slower", "refuted", "differs", NOT_MEASURED, NOT_SIMULATED),
}
"""Words of a table that are drawn as a failure."""

QUESTIONS: dict[Question, tuple[str, str]] = {
    "fits": (
        "What fits?",
        "The longest sequence that trains, and what a step holds. On simulated GPUs unless a table says otherwise.",
    ),
    "same": (
        "Is it the same training?",
        "Every gradient against the stock model, which runs whole in fp64. Measured on CPU with small models.",
    ),
    "costs": (
        "What does it cost?",
        "Memory and time of methods side by side. On a CPU they show what is relatively cheaper, and nothing about a GPU.",
    ),
    "others": (
        "Who else?",
        "What authors of other methods publish, beside what is found for the same runs.",
    ),
}


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    title: str
    grid: Grid
    note: str = ""
    folded: bool = True
    """Whether it opens on a click."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    id: str
    uri: str
    alt: str
    note: str
    source: str
    width: int
    height: int
    """In pixels, at which its smallest words can be read."""


@dataclass(frozen=True)
class Section:
    """One experiment on the page."""

    id: str
    name: str
    question: str
    about: str
    """Source, progress, machine and where the records are."""
    summary: str
    pictures: list[Picture]
    tables: list[Table]
    command: str


def section(k: Kept) -> Section:
    """The part of the page on one experiment."""
    results = measured_part(k.results)
    found = evidence([results])
    machines = "; ".join(dict.fromkeys(machine_of(m) for m in results.measurements.values()))
    kept = f"committed in {k.folder}" if k.is_committed else "of the last run"
    identity = f"{results.name}-{k.folder.parent.name}"
    words = claim_summary(found) if found else ""
    if is_timed(results) and not is_repeated(results):
        words = summary(results)
    return Section(
        id=identity,
        name=results.name,
        question=results.question,
        about=f"Source: {results.source}. {counted_outcomes(results)}. On {machines}. Records {kept}.",
        summary=verdict_counts(results) + "." if is_compared(results) else words,
        pictures=[
            picture
            for name in results.figures
            if (picture := _picture(f"{identity}-{name}", name, k.results))
        ],
        tables=[table for table in _tables(k, results) if table.grid.rows],
        command=f"snakemake --cores all --config experiments={results.name}",
    )


def _tables(k: Kept, results: Results) -> Iterator[Table]:
    """Every table of an experiment; those without rows are left out of the page."""
    found, shown = evidence([results]), partial(Table, folded=False)
    yield shown("A GPU beside a phantom device", twin_grid(k.results), TWINS)
    if is_timed(results):
        yield from _timed(results)
    yield shown("Published numbers and ours", claim_grid(found, results.files))
    yield Table("What was looked at where a prediction misses", miss_grid(found), MISSES)
    if is_compared(results):
        yield shown("By method", method_grid(results))
    yield Table("Cells that did not pass", finding_grid(results), FINDINGS)
    yield Table("Parameters furthest from the truth", worst_grid(results), WORST)
    yield Table("Planted defects", defect_grid(results), DEFECTS)
    yield Table("Refused", refusal_grid(results), REFUSED)
    simulated = is_simulated(results)
    cells = simulated_grid(results) if simulated else cell_grid(results)
    yield Table("All cells", cells, SIMULATED if simulated else MEASURED)
    yield Table("Environment", environment_grid(results))


def _timed(results: Results) -> Iterator[Table]:
    """Methods side by side."""
    if is_repeated(results):
        yield Table("Methods in turn", ratio_grid(results), folded=False)
        return
    yield Table(headline_title(results), headline_grid(results), folded=False)
    yield Table("All comparisons of two methods", verdict_grid(results), VERDICTS)


def _picture(identity: str, figure: str, results: Results) -> Picture | None:
    """A figure whose foot became its caption; None where it has nothing to show."""
    drawn = draw(figure, results)
    if not any(axes.has_data() for axes in drawn.axes):
        return None
    source = source_line(results)
    note = " ".join(drawn.get_supxlabel().split()).removesuffix(source).strip()
    drawn.supxlabel("")  # the caption has these words
    width, height = (round(120 * inches) for inches in drawn.get_size_inches())
    uri = "data:image/svg+xml;base64," + base64.b64encode(pictures.svg(drawn).encode()).decode()
    return Picture(identity, uri, described(drawn), note, source, width, height)


def page(c: Committed) -> str:
    """The whole report: HTML that loads nothing from anywhere else."""
    sections: dict[Question, list[Section]] = {question: [] for question in QUESTIONS}
    for k in c.kept:
        if k.results.measurements:
            sections[question_of(k.results)].append(section(k))
    forecasts = [k.results for k in c.forecasts]
    lengths = beside_published(forecasts)
    return render(
        "report.html",
        claims=Table("Headline claims", headline_claim_grid(forecasts, c.compared), folded=False),
        longest=Table("Longest sequences", length_rows(shortened(lengths)), folded=False),
        correctness=correctness_line(c.compared, c.families),
        tolerance=f"{TOLERANCE:.0%}",
        on_gpus=c.on_gpus,
        waiting=Table("Experiments that wait for a GPU", waiting_grid(c.recorded)),
        questions=QUESTIONS,
        sections=sections,
        pictures={"fits": [_picture("longest", "longest_sequences", together(forecasts))]},
        tables={
            "fits": [Table("Longest sequences with sources", longest.length_grid(lengths))],
            "same": [Table(*table) for table in families.tables(c)],
        },
        absent=[r.name for r in forecasts if not r.measurements],
        good=GOOD,
        bad=BAD,
        order=order,
        link=_link,
        csv=_csv_uri,
    )


def order(text: str) -> str:
    """What a cell of a numeric column sorts by."""
    value = sort_value(text)
    return str(-sys.float_info.max if value is None else value)


def _link(path: Path) -> str:
    """The address of a file, seen from the report."""
    return quote(os.path.relpath(path, paths.REPORT.parent))


def _csv_uri(grid: Grid) -> str:
    return "data:text/csv;charset=utf-8," + quote(grid.csv())


TWINS = "The same training run, on both. Allocated bytes have to be equal where PyTorch's versions are; NVML's are modelled."
MISSES = "Claims of our own method are not here: for it a longer sequence is the result."
FINDINGS = (
    "Seen with the versions below, and no more than that. Ratios: norm of each parameter's gradient over its norm in the "
    "stock model, least and largest over parameters."
)
WORST = "Norm ratio and cosine of a parameter's gradient; the record of a cell has all parameters."
DEFECTS = "Each was planted alone, as an edit of the source, and cells were run until one failed."
REFUSED = (
    "Combinations that the library refuses to run, with what it says; all else at its usual level."
)
VERDICTS = (
    "Each row compares two runs that differ in the method only. A time is called faster or slower when the slowest step "
    "of one is quicker than the quickest step of the other. Performance counts only where gradients passed."
)
SIMULATED = (
    "One step on a simulated GPU each; none was measured. A step that does_not_fit is run to its end on a larger one: "
    "limit says of what it has more than the machine. Allocated and reserved are what PyTorch's own allocator of one "
    "GPU reads at their largest. Total, what NVML would read, and step time are modelled."
)
MEASURED = (
    "Step: slowest rank, median over steps. Peak: live tensors on the compute device, largest over ranks. Host peak: "
    "offloaded data. Gradients: every parameter against the stock model run whole in fp64."
)
