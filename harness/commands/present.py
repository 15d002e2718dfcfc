"""`alst table`, `figures`, `report`, `summary`, `reference`: show records, and commit them."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cells import paths
from harness.cells.hardware import load_hardware

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from harness.present.grids.base import Grid
    from harness.records.table import Results

Name = Annotated[str, typer.Argument(help="An experiment: the name of a file in experiments/.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="Experiments; by default all that have records.", show_default=False),
]


def table(name: Name) -> None:
    """Write results/tables/NAME.csv: a row per cell and metric.

    Example: alst table cpu_sweep
    """
    from harness.records.inert import inert
    from harness.records.record import write_text
    from harness.records.table import fresh, tidy

    found = tidy(fresh(paths.experiment(name)))
    write_text(paths.table(name), found.map(inert).to_csv(index=False))


def figures(
    name: Name,
    figure: Annotated[
        str | None,
        typer.Argument(
            help="A file in harness/present/figures/; by default all that the experiment names."
        ),
    ] = None,
) -> None:
    """Draw figures to results/figures/NAME/ as PNG and SVG.

    Example: alst figures cpu_sweep peak_memory
    """
    from harness.records.table import fresh

    results = fresh(paths.experiment(name))
    for each in [figure] if figure else results.figures:
        _draw(results, each, paths.figures(name))


def _draw(results: Results, figure: str, folder: Path) -> None:
    from harness.present import pictures
    from harness.present.figures.base import draw

    drawn = draw(figure, results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{figure}.svg").write_text(pictures.svg(drawn))
    (folder / f"{figure}.png").write_bytes(pictures.png(drawn))


def report(
    names: Names = None,
    readme: Annotated[
        bool,
        typer.Option(
            "--readme",
            help="Write the README's blocks and the pages of results/reference/ instead, from committed records.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with 1 if --readme would change a file; write nothing."),
    ] = False,
) -> int:
    """Write results/report.html, one self-contained page, from the committed records and those of the last runs.

    Where an experiment has both, the page shows the last run.

    Example: alst report
    """
    if readme or check:
        return _generate(write=readme)
    from harness.present.pages.base import load_with
    from harness.present.report import page
    from harness.records.record import write_text

    only_committed = not names and any(paths.REFERENCE.glob("*/*/")) and not _folders()
    write_text(paths.REPORT, page(load_with([] if only_committed else _with_records(names))))
    print(f"wrote {paths.REPORT}")
    return 0


def _generate(write: bool) -> int:
    """Write the generated files that differ from the committed records, or name them and return 1."""
    from harness.present.generated import renew

    changed = renew(write=write)
    if write or not changed:
        return 0
    for path in changed:
        print(f"alst: {path} differs from the records in {paths.REFERENCE}", file=sys.stderr)
    print("alst: run `alst report --readme`", file=sys.stderr)
    return 1


def _with_records(names: list[str] | None) -> list[Results]:
    """Results of the experiments `names`, by default of all that have records.

    Raises `ValueError` for a name without a record, and where there is none at all.
    """
    from harness.records.table import fresh

    found = [fresh(paths.experiment(name)) for name in names or _folders()]
    empty = [results.name for results in found if not results.measurements]
    if names and empty:
        raise ValueError(
            f"{empty[0]}: no records of its cells in {paths.cells(empty[0])}; run `make`"
        )
    if len(empty) == len(found):
        raise ValueError(
            "no records in results/cells; run `make` or `alst run experiments/smoke.yaml`"
        )
    return [results for results in found if results.measurements]


def _folders() -> list[str]:
    """Experiments with a folder of records from the last runs."""
    return sorted(folder.name for folder in paths.cells("").glob("*/"))


def summary(names: Names = None) -> None:
    """Print the main table of each experiment, and where its report and figures are."""
    from rich.console import Console

    from harness.records.table import measured_part

    console = Console()
    console.width = max(console.width, 100)  # a narrower terminal wraps rather than hides
    for results in map(measured_part, _with_records(names)):
        for part in _summarised(results):
            console.print(part, highlight=False)
    console.print(f"report:  {paths.REPORT.absolute().as_uri()}", highlight=False, soft_wrap=True)


def _summarised(results: Results) -> Iterator[str | Table]:
    """Lines and tables that sum up one experiment."""
    from harness.judge.claims import evidence
    from harness.present.grids.claims import claim_summary
    from harness.present.grids.gradients import finding_grid, verdict_counts
    from harness.present.grids.measured import headline_grid, headline_title, ratio_grid
    from harness.present.grids.measured import summary as in_words
    from harness.present.kinds import is_compared, is_repeated, is_simulated
    from harness.records.table import counted_outcomes

    if is_compared(results):
        yield f"{results.name}: {verdict_counts(results)}"
        findings = finding_grid(results)
        if findings.rows:
            yield _shown(findings, "what did not pass", wrapped=(0, 6))
        return
    if is_simulated(results):
        found = evidence([results])
        said = f" {claim_summary(found)}" if found else ""
        yield f"{results.name}: {counted_outcomes(results)}.{said}"
    elif is_repeated(results):
        yield _shown(ratio_grid(results), results.name)
    else:
        yield _shown(headline_grid(results), f"{results.name}: {headline_title(results)}")
        yield in_words(results)
    yield f"figures: {paths.figures(results.name)}/"


def _shown(grid: Grid, title: str, wrapped: Sequence[int] = ()) -> Table:
    """`grid` for a terminal; columns in `wrapped` may take several lines."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left", show_lines=bool(wrapped))
    for i, heading in enumerate(grid.headings):
        right = i > 1 and i not in wrapped
        shown.add_column(
            heading,
            justify="right" if right else "left",
            no_wrap=i not in wrapped,
            overflow="fold",
        )
    for row in grid.rows:
        shown.add_row(*row)
    return shown


def reference(
    name: Name,
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Accept records of a tree with uncommitted changes.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept an experiment with cells not measured yet.")
    ] = False,
    reason: Annotated[
        str | None, typer.Option(help="Why numbers move; needed where some do, and kept with them.")
    ] = None,
) -> None:
    """Replace the committed records of an experiment with the fresh ones and renew what is generated from them.

    Refuses in CI, when numbers move without a reason, and when a cell is not measured, was measured on a tree
    with uncommitted changes or was predicted by other code.

    Example: alst reference paper_ablation --reason "Tiles of the loss are half as large"
    """
    from harness.judge.compare import changes, load
    from harness.records.table import fresh

    if os.environ.get("CI"):
        raise ValueError("references are not updated in CI; do it at your desk and commit them")
    results = fresh(paths.experiment(name))
    _must_be_whole(results, partial)
    _must_be_of_committed_code(results, dirty)
    folders = sorted(paths.REFERENCE.glob(f"*/{name}"))
    before = {key: m for folder in folders for key, m in load(folder).items()}
    moved = changes(before, results.measurements)
    if moved and not (reason or "").strip():
        raise ValueError(
            f'{name}: {moved[0]}, and {len(moved) - 1} more; say why with --reason "..."'
        )
    for hardware in {cell.hardware for cell in results.cells.values()}:
        _promote(results, hardware)
    if reason:
        _note(name, reason, [str(change) for change in moved])
    _generate(write=True)


def _must_be_whole(results: Results, partial: bool) -> None:
    """Raise `ValueError` where a cell has no record, with `partial` only where none has."""
    missing = sorted(set(results.cells) - set(results.measurements))
    if missing and not (partial and results.measurements):
        raise ValueError(
            f"{results.name}: no record of {missing[0]} and {len(missing) - 1} more; run `make`"
        )


def _must_be_of_committed_code(results: Results, dirty: bool) -> None:
    """Raise `ValueError` for records of other code, and of uncommitted code unless `dirty`."""
    from harness.run.measure import stale

    name, records = results.name, results.measurements
    unclean = [key for key, m in records.items() if m.provenance.dirty is not False]
    if unclean and not dirty:
        raise ValueError(
            f"{name}: {len(unclean)} records come from a tree with uncommitted changes, such as "
            f"{paths.cells(name) / unclean[0]}.json; commit and measure again, or pass --dirty"
        )
    old = [key for key, m in records.items() if stale(m)]
    if old:
        raise ValueError(
            f"{name}: {len(old)} records are of other code, such as {old[0]}; run `make`"
        )


def _note(name: str, reason: str, moved: list[str]) -> None:
    """Add why and what to the log of changes."""
    from harness.records.record import write_text

    old = paths.CHANGES.read_text() if paths.CHANGES.exists() else "# Why committed records moved\n"
    today = datetime.now(UTC).date().isoformat()
    lines = "".join(f"- {line}\n" for line in moved or ["no number of an earlier record"])
    write_text(paths.CHANGES, f"{old}\n## {today}, {name}\n\n{reason.strip()}\n\n{lines}")


def _promote(results: Results, hardware: str) -> None:
    folder = paths.REFERENCE / load_hardware(hardware).name / results.name
    shutil.rmtree(folder, ignore_errors=True)
    for key, m in results.measurements.items():
        if m.cell.hardware == hardware:
            folder.mkdir(parents=True, exist_ok=True)  # not for a row of which nothing was measured
            shutil.copyfile(paths.cells(results.name) / f"{key}.json", folder / f"{key}.json")
