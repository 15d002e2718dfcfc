"""`alst plan`: the settings with which a length fits, or the reason why none does. Needs no GPU."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

import typer
from rich.table import Table

from harness.cells.prediction import Plan
from harness.cells.units import bytes_text, seconds_text
from harness.commands.predict import (
    AsJson,
    HardwareName,
    HostMemory,
    Model,
    cell_of,
    hush_transformers,
    on_phantom,
    wide_console,
)


def plan(
    model: Model,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of one sample.")],
    hardware: HardwareName = "h100-80gb",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="Accelerators, over all nodes.", show_default="the fewest that suffice"
        ),
    ] = None,
    host_memory: HostMemory = None,
    as_json: AsJson = False,
) -> int:
    """List the legal ALST settings with which SEQLEN tokens fit, cheapest first.

    Exit code 1 and the reason if none fits.

    Example: alst plan llama3.1-8b --seqlen 1_000_000 --hardware h100-80gb
    """
    cell = cell_of(model, seqlen, "alst", gpus or 1, hardware, host_memory)
    hush_transformers()
    asked = {"cell": cell.model_dump(mode="json"), "gpus": gpus}
    (planned,) = on_phantom("harness.predict.plan:execute", asked, cell)
    found = Plan(**planned)
    if as_json:
        print(json.dumps([option.as_json() for option in found.options]))
    elif found.options:
        _print(found, f"{model}, {seqlen:,} tokens on {hardware}")
    if found.reason:
        print(f"alst: {found.reason} ({found.limit})", file=sys.stderr)
        return 1
    return 0


def _print(found: Plan, title: str) -> None:
    table = Table(title=title, title_justify="left")
    headings = ("GPUs", "sp", "dp", "tiling", "offload", "total", "host / node", "step")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "offload" else "right", no_wrap=True)
    for option in found.options:
        p, rung = option.prediction, option.rung
        offloaded = ["checkpoints"] * rung.offload + ["states"] * rung.offload_states
        table.add_row(
            *map(str, (option.gpus, option.sp, option.dp)),
            "on" if rung.tiling else "off",
            ", ".join(offloaded) or "none",
            bytes_text(p.total_bytes),
            bytes_text(p.host_bytes),
            seconds_text(p.step_seconds_modelled or math.nan),
        )
    console = wide_console()
    console.print(table)
    console.print("Bytes per GPU and time of a step are modelled. Cheapest first.")
