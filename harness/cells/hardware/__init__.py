"""Hardware rows: one accelerator each, with its host and its links. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from alst_impl.config import Frozen
from alst_impl.plugin import explain, nearest, squeezed
from harness.cells.units import (
    bandwidth_value,
    bytes_text,
    bytes_value,
    flops_value,
    written,
)
from harness.cells.yamls import read_yaml

Bytes = Annotated[int, BeforeValidator(written(bytes_value)), Field(gt=0)]
"""Bytes, or a size such as `80GiB` or `1.9TB`."""
Bandwidth = Annotated[
    float, BeforeValidator(written(bandwidth_value)), Field(gt=0, allow_inf_nan=False)
]
"""Bytes per second, or a bandwidth such as `450GB/s`."""
Flops = Annotated[float, BeforeValidator(written(flops_value)), Field(gt=0, allow_inf_nan=False)]
"""FLOP/s, or a speed such as `989.4TFLOPS`."""


class Chip(Frozen):
    """Properties that CUDA reports for a device."""

    capability: tuple[int, int]
    """Compute capability."""
    multiprocessors: int = Field(gt=0)
    """Streaming multiprocessors."""
    shared_block_bytes: Bytes
    """Maximum shared memory of a block."""
    shared_multiprocessor_bytes: Bytes
    """Shared memory of one multiprocessor."""
    l2_bytes: Bytes
    """Size of the L2 cache."""
    usable_bytes: Bytes
    """Total device memory that CUDA reports, which is less than the nominal: the limit of what fits."""
    source: str
    """Where the numbers are from."""


class Hardware(Frozen):
    """One accelerator and its node of `devices_per_node` accelerators. SI base units.

    Bandwidths are peak, one direction, per accelerator; None where the hardware has no such link.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the row, as cells use it and folders of records are called."""
    aliases: tuple[str, ...] = ()
    """Other names for it."""
    memory_bytes: Bytes
    """Device memory."""
    bf16_flops: Flops | None = None
    """Peak dense bf16 FLOP/s (multiply and add count as two), without sparsity."""
    memory_bandwidth: Bandwidth | None = None
    """Device memory, bytes/s."""
    link: Literal["NVLink", "PCIe"] | None = None
    """What joins the accelerators of a node."""
    intra_node_bandwidth: Bandwidth | None = None
    """Between accelerators of a node, bytes/s."""
    inter_node_bandwidth: Bandwidth | None = None
    """Between nodes, bytes/s per accelerator."""
    host_bandwidth: Bandwidth | None = None
    """Between accelerator and host memory, bytes/s."""
    host_memory_bytes: Bytes | None = None
    """Host memory of one node."""
    devices_per_node: int = Field(gt=0)
    """Accelerators of one node."""
    source: str
    """Titles of the vendor's datasheets that the numbers are from. A nominal node has a host and a network that no
    datasheet names."""
    device_names: tuple[str, ...] = ()
    """Names that the driver reports for this accelerator; empty for hardware without CUDA."""
    chip: Chip | None = None
    """None for hardware without CUDA."""

    @property
    def usable_bytes(self) -> int:
        """The limit of what fits: what CUDA reports, or all memory without CUDA."""
        return self.chip.usable_bytes if self.chip else self.memory_bytes

    @model_validator(mode="after")
    def usable_memory_is_a_part_of_the_memory(self) -> Hardware:
        if self.chip and self.chip.usable_bytes > self.memory_bytes:
            raise ValueError(
                f"chip.usable_bytes ({bytes_text(self.chip.usable_bytes)}) are more than memory_bytes "
                f"({bytes_text(self.memory_bytes)}); set usable_bytes to what CUDA reports"
            )
        return self


def _read(path: Path) -> Hardware:
    """The row in the file at `path`. Raises `ValueError` naming the error in it."""
    known = sorted(Hardware.model_fields)
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"hardware {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"hardware '{path}': not a YAML mapping with keys {', '.join(known)}")
    try:
        return Hardware.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, f"hardware '{path}'", known)) from None


FOLDER = Path(__file__).parent / "rows"
ROWS = {row.name: row for row in map(_read, sorted(FOLDER.glob("*.yaml")))}
"""Rows by name: the YAML files in `FOLDER`."""
NAMES = {squeezed(name): row.name for row in ROWS.values() for name in (row.name, *row.aliases)}
"""Names and aliases without what is forgiven in them -> names of rows."""
REFUSED = {
    "mi300x": "runs another stack than CUDA (ROCm), whose allocator and kernels no phantom device has",
}
"""Hardware that people ask for, and why there is no row."""


def load_hardware(name: str) -> Hardware:
    """The row that `row_name` finds, or the row in the YAML file at path `name`. Raises `ValueError` as it does, or
    naming the error in the file.
    """
    if not is_file(name):
        return ROWS[row_name(name)]
    if not Path(name).is_file():
        raise ValueError(f"hardware '{name}': no such file")
    return _read(Path(name))


def is_file(name: str) -> bool:
    """Whether `name` is a path to a YAML file, not the name of a row."""
    return Path(name).suffix in (".yaml", ".yml")


def row_name(name: str) -> str:
    """The name of the row that `name` or an alias means; case, spaces, `-` and `_` are forgiven.

    Raises `ValueError` naming the nearest rows.
    """
    plain = squeezed(name)
    if plain in NAMES:
        return NAMES[plain]
    if plain in REFUSED:
        raise ValueError(f"hardware '{name}' {REFUSED[plain]}; use one of {', '.join(ROWS)}")
    offered = [each for row in ROWS.values() for each in (row.name, *row.aliases)]
    raise ValueError(
        f"unknown hardware '{name}'; {nearest(name, offered)}, or a path to a YAML file with a row"
    )
