"""`alst league`: other people's stacks, as they are, on phantom devices and under the gradient gate."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import typer
from rich.console import Console

from harness.cells.league import tasks
from harness.cells.units import bytes_text, length_text
from harness.commands.run import DEFAULT_RESULTS, truth_cache
from harness.records import league as records
from harness.records.league import FRESH, Record
from harness.records.record import write_text


def league(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            help="Tasks, as --list prints them: names, beginnings of names or patterns with *; by default all.",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the tasks' names alone.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run tasks that have a record again.")
    ] = False,
    page: Annotated[
        bool,
        typer.Option("--page", help=f"Write the page of all records to {FRESH} instead."),
    ] = False,
    commit: Annotated[
        bool,
        typer.Option("--commit", help="Commit the last runs' records instead, and renew the page."),
    ] = False,
) -> int:
    """Run stacks of others beside our own methods: bytes, longest sequences, gradients.

    Each folder of experiments/peers/ is a stack: a short script in its own public API. On phantom devices it shows
    what it holds at several lengths and the longest sequence that fits; on CPU ranks every gradient of a step is
    compared with that of the stock model. Records go to results/league/; a task that has one is not run again.
    A stack whose packages are not here is `not installed`: `python -m harness.league.packages` installs them.

    Examples: alst league alst-gate; alst league '*-qwen3-8b-x8-*'; alst league --commit
    """
    from harness.league.runs import final, run

    chosen = [key for key in tasks() if not keys or any(is_meant(key, part) for part in keys)]
    if not chosen:
        raise ValueError(
            f"no task is called {' or '.join(keys or [])}, or begins so; see `alst league --list`"
        )
    if listed:
        print("\n".join(chosen))
        return 0
    if page:
        return _page()
    if commit:
        return _commit(chosen)
    console = Console()
    for number, key in enumerate(chosen, start=1):
        task = tasks()[key]
        record = None if force else final(task)
        fresh = record is None
        if record is None:
            with console.status(f"{key} ({number} of {len(chosen)})"):
                record = run(task, truth_cache(DEFAULT_RESULTS))
        if fresh or key not in records.fresh():
            records.write(record)
        said = line(record) + ("" if fresh else " (recorded before)")
        console.print(f"{number}/{len(chosen)} {key}: {said}", highlight=False, soft_wrap=True)
    return 0


def is_meant(key: str, part: str) -> bool:
    """Whether `part` names the task `key`: its name, the beginning of it, or a pattern with `*`."""
    return fnmatchcase(key, part if "*" in part or part in tasks() else f"{part}*")


def line(record: Record) -> str:
    """What a record says."""
    parts: list[str] = [record.verdict]
    step, gradient = record.step, record.gradient
    if step is not None:
        parts.append(
            f"{length_text(step.seqlen)} tokens, {bytes_text(step.allocated_bytes)} allocated, "
            f"{bytes_text(step.reserved_bytes)} reserved, {bytes_text(step.host_bytes)} of the host by a rank"
        )
    if gradient is not None and gradient.error is not None:
        parts.append(f"worst {gradient.worst}, error {gradient.error:.1e} of its norm")
    if record.reason and record.reason != "ran to its end":
        parts.append(record.reason)
    return ", ".join(parts)


def _page() -> int:
    """Write the page and its figure, of fresh records and of committed ones where there is none."""
    from harness.present import pictures
    from harness.present.figures.league import of_records
    from harness.present.pages.league import IMAGE, text

    found = {**records.committed(), **records.fresh()}
    write_text(FRESH / "league.md", text(found))
    (FRESH / IMAGE).write_bytes(pictures.png(of_records(found, str(FRESH))))
    print(f"wrote {FRESH / 'league.md'}")
    return 0


def _commit(chosen: list[str]) -> int:
    from harness.present.generated import renew

    found = [record for key, record in records.fresh().items() if key in chosen]
    if not found:
        raise ValueError(f"no records in {records.FRESH}; run `alst league` first")
    records.commit(found)
    changed = renew(write=True)
    print(
        f"{len(found)} records in {records.committed_path()}; {len(changed)} pages and figures renewed"
    )
    return 0
