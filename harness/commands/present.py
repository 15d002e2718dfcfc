"""`alst table`, `figures`, `report`, `summary`, `reference`: records to what a reader sees."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cells import paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from harness.present.report import Grid
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
    from harness.records.record import write_text
    from harness.records.table import fresh, tidy

    write_text(paths.table(name), tidy(fresh(paths.experiment(name))).to_csv(index=False))


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
    from harness.present import drawing
    from harness.present.figures.base import draw

    drawn = draw(figure, results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{figure}.svg").write_text(drawing.svg(drawn))
    (folder / f"{figure}.png").write_bytes(drawing.png(drawn))


def report(
    names: Names = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Write the README's generated blocks instead.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if the README's blocks are not up to date.")
    ] = False,
) -> int:
    """Write results/report.html, one self-contained page, from records and drawn figures.

    README blocks come from the committed records in results/reference/.

    Example: alst report cpu_sweep
    """
    if readme or check:
        return _readme(write=readme)
    from harness.present.report import page
    from harness.records.record import write_text

    write_text(paths.REPORT, page(_with_records(names)))
    return 0


def _readme(write: bool) -> int:
    from harness.present.report import readme_blocks, with_blocks
    from harness.records.record import write_text

    if not paths.README.is_file():
        raise ValueError(f"no {paths.README} here; run it in the root of a checkout")
    text = paths.README.read_text()
    current = with_blocks(text, readme_blocks(_references()))
    if text == current:
        return 0
    if write:
        write_text(paths.README, current)
        return 0
    print(
        f"alst: {paths.README} differs from results/reference/; run `alst report --readme`",
        file=sys.stderr,
    )
    return 1


def _references() -> list[Results]:
    from harness.records.table import reference as load_reference

    folders = sorted(paths.REFERENCE.glob("*/*/"))
    if not folders:
        raise ValueError(
            f"no records in {paths.REFERENCE}, which the README's blocks are made of; run `make`, then "
            "`alst reference NAME`"
        )
    return [load_reference(folder) for folder in folders]


def _with_records(names: list[str] | None) -> list[Results]:
    """Results of the experiments `names`, by default of all that have records.

    Raises `ValueError` for a name without a record, and where there is none at all.
    """
    from harness.records.table import fresh

    folders = sorted(folder.name for folder in paths.cells("").glob("*/"))
    found = [fresh(paths.experiment(name)) for name in names or folders]
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


def summary(names: Names = None) -> None:
    """Print the headline table of each experiment and where report and figures are."""
    from rich.console import Console

    from harness.judge.claims import evidence
    from harness.present.report import (
        claim_summary,
        finding_grid,
        headline_grid,
        headline_title,
        is_compared,
        is_repeated,
        is_simulated,
        ratio_grid,
        verdict_counts,
    )
    from harness.present.report import summary as in_words
    from harness.records.record import Outcome
    from harness.records.table import counted_outcomes, measured_part

    console = Console()
    console.width = max(console.width, 100)  # a narrower terminal wraps rather than hides
    for results in map(measured_part, _with_records(names)):
        if is_simulated(results):
            found = evidence([results])
            said = f" {claim_summary(found)}" if found else ""
            console.print(f"{results.name}: {counted_outcomes(results)}.{said}", highlight=False)
            console.print(f"figures: {paths.figures(results.name)}/", highlight=False)
            continue
        if is_compared(results):
            console.print(f"{results.name}: {verdict_counts(results)}", highlight=False)
            if any(m.outcome is not Outcome.OK for m in results.measurements.values()):
                console.print(_shown(finding_grid(results), "what did not pass", wrapped=(0, 6)))
            continue
        title = f"{results.name}: {headline_title(results)}"
        grid = ratio_grid(results) if is_repeated(results) else headline_grid(results)
        console.print(_shown(grid, title))
        console.print(in_words(results), highlight=False)
        console.print(f"figures: {paths.figures(results.name)}/", highlight=False)
    console.print(f"report:  {paths.REPORT.absolute().as_uri()}", highlight=False, soft_wrap=True)


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
    """Replace the committed records of an experiment with the fresh ones and renew the README.

    Refuses when a cell is not measured, was measured on a tree with uncommitted changes, or was
    predicted by other code, when numbers move without a reason, and in CI.

    Example: alst reference paper_ablation --reason "Tiles of the loss are half as large"
    """
    from harness.judge.compare import changes, load
    from harness.records.table import fresh
    from harness.run.measure import stale

    if os.environ.get("CI"):
        raise ValueError("references are not updated in CI; do it at your desk and commit them")
    results = fresh(paths.experiment(name))
    missing = sorted(set(results.cells) - set(results.measurements))
    if missing and not (partial and results.measurements):
        raise ValueError(
            f"{name}: no record of {missing[0]} and {len(missing) - 1} more; run `make`"
        )
    unclean = [key for key, m in results.measurements.items() if m.provenance.dirty is not False]
    if unclean and not dirty:
        raise ValueError(
            f"{name}: {len(unclean)} records come from a tree with uncommitted changes, such as "
            f"{paths.cells(name) / unclean[0]}.json; commit and measure again, or pass --dirty"
        )
    old = [key for key, m in results.measurements.items() if stale(m)]
    if old:
        raise ValueError(
            f"{name}: {len(old)} records are of other code, such as {old[0]}; run `make`"
        )
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
    _readme(write=True)


def _note(name: str, reason: str, moved: list[str]) -> None:
    """Add why and what to the log of changes."""
    from harness.records.record import write_text

    old = paths.CHANGES.read_text() if paths.CHANGES.exists() else "# Why committed records moved\n"
    today = datetime.now(UTC).date().isoformat()
    lines = "".join(f"- {line}\n" for line in moved or ["no number of an earlier record"])
    write_text(paths.CHANGES, f"{old}\n## {today}, {name}\n\n{reason.strip()}\n\n{lines}")


def _promote(results: Results, hardware: str) -> None:
    folder = paths.REFERENCE / hardware / results.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for key, m in results.measurements.items():
        if m.cell.hardware == hardware:
            shutil.copyfile(paths.cells(results.name) / f"{key}.json", folder / f"{key}.json")
    from harness.present import drawing
    from harness.present.figures.base import draw
    from harness.present.report import is_compared, is_repeated, is_simulated

    if is_compared(results) or not results.figures:
        return  # nothing to draw
    # Predicted cells have no step times, repeated ones several: their first figure stands for them.
    first = is_simulated(results) or is_repeated(results)
    headline = results.figures[0] if first else "headline"
    (folder / "headline.png").write_bytes(drawing.png(draw(headline, results)))
