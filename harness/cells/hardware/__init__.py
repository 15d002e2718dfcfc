"""Hardware rows: one accelerator each, with its host and its links. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain, nearest
from harness.cells.units import bytes_value, rate_value, written

Bytes = Annotated[int, BeforeValidator(written(bytes_value)), Field(gt=0)]
"""Bytes, or a size such as `80GiB` or `1.9TB`."""
Rate = Annotated[float, BeforeValidator(written(rate_value)), Field(gt=0, allow_inf_nan=False)]
"""Units per second, or a rate such as `450GB/s` or `989.4TFLOPS`."""


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
    """Total device memory that CUDA reports, which is less than the nominal."""
    source: str
    """Where the numbers are from."""


class Hardware(Frozen):
    """One accelerator and its node of `devices_per_node` accelerators. SI base units.

    Bandwidths are peak, one direction, per accelerator; None where the hardware has no such link.
    """

    name: str
    """Name of the row, as cells use it."""
    aliases: tuple[str, ...] = ()
    """Other names for it."""
    memory_bytes: Bytes
    """Device memory."""
    bf16_flops: Rate | None = None
    """Peak dense bf16 FLOP/s (multiply and add count as two), without sparsity."""
    memory_bandwidth: Rate | None = None
    """Device memory, bytes/s."""
    intra_node_bandwidth: Rate | None = None
    """Between accelerators of a node, bytes/s."""
    inter_node_bandwidth: Rate | None = None
    """Between nodes, bytes/s per accelerator."""
    host_bandwidth: Rate | None = None
    """Between accelerator and host memory, bytes/s."""
    host_memory_bytes: Bytes | None = None
    """Host memory of one node."""
    devices_per_node: int = Field(gt=0)
    """Accelerators of one node."""
    source: str
    """Title of the datasheets the numbers are from."""
    device_names: tuple[str, ...] = ()
    """Names that the driver reports for this accelerator; empty for hardware without CUDA."""
    chip: Chip | None = None
    """None for hardware without CUDA."""


def _read(path: Path) -> Hardware:
    """The row in the file at `path`. Raises `ValueError` naming the error in it."""
    try:
        return Hardware(**yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        known = sorted(Hardware.model_fields)
        if isinstance(error, ValidationError):
            raise ValueError(explain(error, f"hardware '{path}'", known)) from None
        raise ValueError(
            f"hardware '{path}': not a YAML mapping with keys {', '.join(known)}"
        ) from None


ROWS = {
    row.name: row for row in map(_read, sorted((Path(__file__).parent / "rows").glob("*.yaml")))
}
"""Rows by name: the YAML files in `rows/`."""
ALIASES = {alias: row.name for row in ROWS.values() for alias in row.aliases}
"""Shorter names."""
REFUSED = {
    "mi300x": "runs another stack than CUDA (ROCm), whose allocator and kernels no phantom device has",
}
"""Hardware that people ask for, and why there is no row."""


def load_hardware(name: str) -> Hardware:
    """The row `name`, in any case and by any alias, or the row in the YAML file at path `name`.

    Raises `ValueError` naming the nearest rows, or the error in the file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"hardware '{name}': no such file")
        return _read(path)
    plain = name.lower().replace("_", "-")
    known = ALIASES.get(plain, plain)
    if known in ROWS:
        return ROWS[known]
    if known in REFUSED:
        raise ValueError(f"hardware '{name}' {REFUSED[known]}; use one of {', '.join(ROWS)}")
    raise ValueError(
        f"unknown hardware '{name}'; {nearest(plain, [*ROWS, *ALIASES])} or a path to a YAML file with a row"
    )
