"""`alst plan`: the settings with which a length fits, or the reason why none does. Needs no GPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.cells.cell import Cell, host_memory_bytes
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Plan, Planned
from harness.cells.units import bytes_text, interval_text, length_text, options_text
from harness.commands.predict import AsJson, hush_transformers, on_phantom, wide_console
from harness.commands.request import Request, Seqlen, States, about, asking, engine_of, places
from harness.commands.tables import show
from harness.present.emit import check_emitted
from harness.present.emit import emit as emitted

UNKNOWN = "?"
LIMIT_S = 3600
"""Seconds that all settings of a plan may take together."""


@asking
def plan(
    request: Request,
    seqlen: Seqlen,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="Accelerators, over all nodes.", show_default="the fewest that suffice"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to choose from: alst, layerwise, chunked, baseline, ring, usp; repeatable.",
            show_default="alst, layerwise, baseline, and rings where heads do not divide the GPUs",
        ),
    ] = None,
    states: Annotated[
        States | None,
        typer.Option(help="Where training states live.", show_default="whatever is better"),
    ] = None,
    emit: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a training script, its settings and run.sh for the first row to this new folder.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Find the fastest settings with which SEQLEN tokens fit, the fewest GPUs, and the longest sequence.

    Exit code 1 and the reason if none fits.

    Example: alst plan llama3.1-8b --seqlen 1_000_000 --gpus 8 --hardware h100-80gb --emit training
    """
    cell = request.cell(seqlen, gpus or 1, "baseline", {}, states or "gpu")
    hush_transformers()
    if emit is not None:
        check_emitted(cell.train, emit)
    engine = cell.train.engine.name
    asked = {
        "cell": cell.model_dump(mode="json"),
        "gpus": gpus,
        "methods": method,
        "engines": [engine_of(engine, at) for at in ((states,) if states else places(engine))],
    }
    (planned,) = on_phantom("harness.predict.plan:execute", asked, cell, LIMIT_S)
    found = Plan(**planned)
    if as_json:
        print(json.dumps({**about(cell), **found.model_dump(mode="json")}))
    elif found.rows:
        console = wide_console()
        _print(console, cell, found)
        console.print(request.assumed(cell, states), highlight=False)
    if emit is not None and found.rows:
        _emit(cell, found.rows[0], emit)
    if found.reason:
        print(f"alst: {found.reason} ({found.limit})", file=sys.stderr)
        return 1
    return 0


def _emit(cell: Cell, row: Planned, folder: Path) -> None:
    """Write a training script for `row` to `folder`, and say what was written."""
    expandable = bool(cell.expandable_segments)
    files = emitted(row.train, cell.hardware, folder, expandable_segments=expandable)
    print(f"alst: wrote {', '.join(map(str, files))}", file=sys.stderr)


def _print(console: Console, cell: Cell, found: Plan) -> None:
    train, row = cell.train, load_hardware(cell.hardware)
    title = f"{train.model}, {length_text(train.seqlen)} tokens on {cell.hardware}: best of {found.tried} settings"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    headings = ("", "GPUs", "sp x cp x dp", "method", "states", "GPU", "host / node", "step")
    rates = ("tokens/s/GPU", "MFU", "binds", "longest, about")
    for heading in (*headings, *rates):
        words = heading in ("", "method", "states", "binds")
        wraps = heading == "method"
        table.add_column(
            heading,
            justify="left" if words else "right",
            no_wrap=not wraps,
            min_width=24 if wraps else None,
        )
    for each in found.rows:
        table.add_row(*_cells(each, row.usable_bytes, host_memory_bytes(cell)))
    show(console, table)
    for number, each in enumerate(found.rows, start=1):
        console.print(f"{number}. next: {each.advice}", highlight=False)
    console.print(
        "longest: on a line through this length and twice as many tokens; alst search tries whole steps",
        highlight=False,
    )
    first = found.rows[0].prediction
    if first.time:
        console.print(f"speeds: {first.time.basis}", highlight=False)


def _rounded(tokens: int) -> str:
    """`tokens` rounded down to two digits, because an extrapolation knows no more."""
    unit = 10 ** max(len(str(tokens)) - 2, 0)
    return f"{tokens // unit * unit:,}"


def _cells(row: Planned, device: int, host: float) -> list[str]:
    p = row.prediction
    method = ", ".join([row.train.method.name, *options_text(_choices(row))])
    offload = row.train.engine.options.get("offload")
    of_host = "" if math.isinf(host) else f" of {bytes_text(host)}"
    step = UNKNOWN
    if p.time is not None:
        step = interval_text(p.time.seconds, p.time.low, p.time.high)
    return [
        ", ".join(row.best),
        str(row.gpus),
        f"{row.sp} x {row.cp} x {row.dp}",
        method,
        "host" if offload else "GPU",
        f"{bytes_text(p.total_bytes)} of {bytes_text(device)}",
        f"{bytes_text(p.host_bytes)}{of_host}",
        step,
        f"{row.tokens_per_second_per_gpu:,.0f}" if row.tokens_per_second_per_gpu else UNKNOWN,
        f"{row.mfu:.0%}" if row.mfu else UNKNOWN,
        p.time.binds if p.time else UNKNOWN,
        _rounded(row.longest_tokens),
    ]


def _choices(row: Planned) -> dict[str, object]:
    """Options of the method but for its degrees."""
    return {k: v for k, v in row.train.method.options.items() if k not in ("sp", "cp")}
