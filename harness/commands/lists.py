"""`alst models`, `alst hardware`: names that other commands take."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from alst_impl.models import field, names, published
from harness.cells.hardware import FOLDER, ROWS, Hardware, row_name
from harness.cells.units import bytes_text

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def models(as_json: AsJson = False) -> None:
    """List the published configurations by name.

    A path to any config.json, a folder with one, and a hub name that the local cache has are models, too.

    Example: alst models --json
    """
    found = {name: published(name) for name in names()}
    if as_json:
        print(json.dumps(found))
        return
    table = Table("model", "type", *SIZES, box=None)
    for name, fields in found.items():
        sizes = (f"{field(fields, key):,}" if key in fields else "" for key in SIZES)
        table.add_row(name, fields["model_type"], *sizes)
    _print(table)


def hardware(
    name: Annotated[
        str | None,
        typer.Argument(help="A row to print as YAML.", show_default="a table of all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the accelerators that are known, with their peaks, or print the YAML of one.

    Bandwidths are in GB/s, of one direction and one accelerator. What fits is limited by usable memory, which CUDA
    reports. A YAML file like a printed one is hardware, too; it takes sizes such as 40GB and 1.9TB.

    Example: alst hardware h100 > mine.yaml
    """
    rows = ROWS if name is None else {row_name(name): ROWS[row_name(name)]}
    if as_json:
        print(json.dumps({each: row.model_dump(mode="json") for each, row in rows.items()}))
        return
    if name is not None:
        print((FOLDER / f"{row_name(name)}.yaml").read_text(), end="")
        return
    table = Table("hardware", "also", *HEADINGS, box=None)
    for row in rows.values():
        table.add_row(row.name, ", ".join(row.aliases), *_cells(row))
    _print(table)


HEADINGS = (
    "memory",
    "usable",
    "bf16 TFLOP/s",
    "memory GB/s",
    "GPU to GPU",
    "node to node",
    "to the host",
    "GPUs / node",
    "host / node",
)


def _cells(row: Hardware) -> list[str]:
    """Texts below `HEADINGS`."""
    between = _gigabytes(row.intra_node_bandwidth)
    return [
        bytes_text(row.memory_bytes),
        bytes_text(row.usable_bytes),
        f"{row.bf16_flops / 1e12:,.0f}" if row.bf16_flops else "",
        _gigabytes(row.memory_bandwidth),
        f"{between} {row.link}" if row.link else between,
        _gigabytes(row.inter_node_bandwidth),
        _gigabytes(row.host_bandwidth),
        str(row.devices_per_node),
        bytes_text(row.host_memory_bytes) if row.host_memory_bytes else "",
    ]


def _gigabytes(bandwidth: float | None) -> str:
    return f"{bandwidth / 1e9:,g}" if bandwidth else ""


def _print(table: Table) -> None:
    console = Console()
    console.width = max(console.width, 150)  # rows are not wrapped
    console.print(table)
