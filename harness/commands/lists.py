"""`alst models`, `alst hardware`: names that other commands take."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from alst_impl.models import field, names, published
from harness.cells.hardware import ROWS, Hardware
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
    """List the published configurations by name. A path to any config.json is a model, too.

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


def hardware(as_json: AsJson = False) -> None:
    """List the accelerators that are known, with their peaks. A YAML file with one row is hardware, too.

    Bandwidths are those of one direction and one accelerator.

    Example: alst hardware --json
    """
    if as_json:
        print(json.dumps({name: row.model_dump(mode="json") for name, row in ROWS.items()}))
        return
    headings = (
        "memory",
        "bf16 TFLOP/s",
        "memory GB/s",
        "GPU to GPU",
        "node to node",
        "to the host",
        "GPUs / node",
    )
    table = Table("hardware", "also", *headings, "host / node", box=None)
    for row in ROWS.values():
        table.add_row(row.name, ", ".join(row.aliases), *_cells(row))
    _print(table)


def _cells(row: Hardware) -> list[str]:
    links = (
        row.memory_bandwidth,
        row.intra_node_bandwidth,
        row.inter_node_bandwidth,
        row.host_bandwidth,
    )
    return [
        bytes_text(row.memory_bytes),
        f"{row.bf16_flops / 1e12:,.0f}" if row.bf16_flops else "",
        *(f"{link / 1e9:,.0f}" if link else "" for link in links),
        str(row.devices_per_node),
        bytes_text(row.host_memory_bytes) if row.host_memory_bytes else "",
    ]


def _print(table: Table) -> None:
    console = Console()
    console.width = max(console.width, 150)  # rows are not wrapped
    console.print(table)
