"""`alst replay`: FlexSP's published global batches, planned again."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from harness.cells.units import ratio_text, seconds_text
from harness.records import replays
from harness.records.record import write_text


def replay(
    write: Annotated[
        bool, typer.Option("--write", help=f"Write the plans' times to {replays.PATH}.")
    ] = False,
) -> int:
    """Plan FlexSP's published batches with every planner, under its authors' cost model. Takes minutes and needs no GPU.

    Prints mean times of an iteration, and how long a processor planned it, on the mean and at most.

    Example: alst replay --write
    """
    from harness.predict.replay import CASES, replayed

    console = Console()
    headings = ("model", "longest", "planner", "iteration", "over flexsp", "planning", "at most")
    table = Table(*headings, box=None)
    everything: list[replays.Replayed] = []
    for model, context_k in track(CASES, "planning", console=console, transient=True):
        made = list(replayed(model, context_k))
        everything += [each for each, _ in made]
        base = fmean(each.seconds for each, _ in made if each.planner == "flexsp")
        for name in dict.fromkeys(each.planner for each, _ in made):
            seconds = fmean(each.seconds for each, _ in made if each.planner == name)
            took = [took for each, took in made if each.planner == name]
            times = map(seconds_text, (seconds, fmean(took), max(took)))
            iteration, planning, most = times
            ratio = ratio_text(seconds / base)
            table.add_row(model, f"{context_k}K", name, iteration, ratio, planning, most)
    console.print(table)
    if write:
        write_text(replays.PATH, replays.text_of(everything))
        console.print(f"wrote {replays.PATH}")
    return 0
