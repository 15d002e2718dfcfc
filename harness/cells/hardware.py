"""Hardware rows: one accelerator each, with its host and its links. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9


class Chip(Frozen):
    """Properties that CUDA reports for a device."""

    capability: tuple[int, int]
    """Compute capability."""
    multiprocessors: int = Field(gt=0)
    """Streaming multiprocessors."""
    shared_block_bytes: int = Field(gt=0)
    """Maximum shared memory of a block."""
    shared_multiprocessor_bytes: int = Field(gt=0)
    """Shared memory of one multiprocessor."""
    l2_bytes: int = Field(gt=0)
    """Size of the L2 cache."""
    usable_bytes: int = Field(gt=0)
    """Total device memory that CUDA reports, which is less than the nominal."""
    source: str
    """Where the numbers are from."""


class Hardware(Frozen):
    """One accelerator and its node of `devices_per_node` accelerators. SI base units.

    Bandwidths are peak, one direction, per accelerator; None where the hardware has no such link.
    """

    name: str
    """Name of the row, as cells use it."""
    memory_bytes: int = Field(gt=0)
    """Device memory."""
    bf16_flops: float | None = Field(default=None, gt=0)
    """Peak dense bf16 FLOP/s (multiply and add count as two), without sparsity."""
    memory_bandwidth: float | None = Field(default=None, gt=0)
    """Device memory, bytes/s."""
    intra_node_bandwidth: float | None = Field(default=None, gt=0)
    """Between accelerators of a node, bytes/s."""
    inter_node_bandwidth: float | None = Field(default=None, gt=0)
    """Between nodes, bytes/s per accelerator."""
    host_bandwidth: float | None = Field(default=None, gt=0)
    """Between accelerator and host memory, bytes/s."""
    host_memory_bytes: int | None = Field(default=None, gt=0)
    """Host memory of one node."""
    devices_per_node: int = Field(gt=0)
    """Accelerators of one node."""
    source: str
    """Title of the datasheets the numbers are from."""
    device_names: tuple[str, ...] = ()
    """Names that the driver reports for this accelerator; empty for hardware without CUDA."""
    chip: Chip | None = None
    """None for hardware without CUDA."""


ROWS = {
    row.name: row
    for row in (
        Hardware(
            name="cpu",
            memory_bytes=16 * GIB,
            host_memory_bytes=16 * GIB,
            devices_per_node=1,
            source="A nominal machine without an accelerator: its speed is measured, never modelled",
        ),
        Hardware(
            name="a100-80gb",
            memory_bytes=80 * GIB,
            bf16_flops=312e12,
            memory_bandwidth=2_039 * GB,
            intra_node_bandwidth=300 * GB,
            inter_node_bandwidth=25 * GB,
            host_bandwidth=32 * GB,
            host_memory_bytes=2 * TIB,
            devices_per_node=8,
            source="NVIDIA A100 80GB Tensor Core GPU datasheet (SXM); NVIDIA DGX A100 640GB datasheet",
            device_names=("NVIDIA A100-SXM4-80GB",),
            chip=Chip(
                capability=(8, 0),
                multiprocessors=108,
                shared_block_bytes=163 * KIB,
                shared_multiprocessor_bytes=164 * KIB,
                l2_bytes=40 * MIB,
                usable_bytes=int(79.14 * GIB),
                source="NVIDIA A100 Tensor Core GPU Architecture; CUDA C++ Programming Guide, compute capabilities; "
                "usable bytes: the least total capacity in PyTorch's out-of-memory messages, which differ by driver",
            ),
        ),
        Hardware(
            name="h100-80gb",
            memory_bytes=80 * GIB,
            bf16_flops=989.4e12,
            memory_bandwidth=3_350 * GB,
            intra_node_bandwidth=450 * GB,
            inter_node_bandwidth=50 * GB,
            host_bandwidth=64 * GB,
            host_memory_bytes=2 * TIB,
            devices_per_node=8,
            source="NVIDIA H100 Tensor Core GPU datasheet (SXM); NVIDIA DGX H100 datasheet",
            device_names=("NVIDIA H100 80GB HBM3",),
            chip=Chip(
                capability=(9, 0),
                multiprocessors=132,
                shared_block_bytes=227 * KIB,
                shared_multiprocessor_bytes=228 * KIB,
                l2_bytes=50 * MIB,
                usable_bytes=int(79.10 * GIB),
                source="NVIDIA H100 Tensor Core GPU Architecture; CUDA C++ Programming Guide, compute capabilities; "
                "usable bytes: the least total capacity in PyTorch's out-of-memory messages, which differ by driver",
            ),
        ),
        Hardware(
            name="h200-141gb",
            memory_bytes=141 * GB,
            bf16_flops=989.4e12,
            memory_bandwidth=4_800 * GB,
            intra_node_bandwidth=450 * GB,
            inter_node_bandwidth=50 * GB,
            host_bandwidth=64 * GB,
            host_memory_bytes=2 * TIB,
            devices_per_node=8,
            source="NVIDIA H200 Tensor Core GPU datasheet (SXM); NVIDIA DGX H200 datasheet",
            device_names=("NVIDIA H200",),
            chip=Chip(
                capability=(9, 0),
                multiprocessors=132,
                shared_block_bytes=227 * KIB,
                shared_multiprocessor_bytes=228 * KIB,
                l2_bytes=50 * MIB,
                usable_bytes=int(139.72 * GIB),
                source="NVIDIA H100 Tensor Core GPU Architecture (the chip of H200); CUDA C++ Programming Guide, compute capabilities; "
                "usable bytes: the least total capacity in PyTorch's out-of-memory messages, which differ by driver",
            ),
        ),
        Hardware(
            name="b200-192gb",
            memory_bytes=192 * GB,
            bf16_flops=2_250e12,
            memory_bandwidth=8_000 * GB,
            intra_node_bandwidth=900 * GB,
            inter_node_bandwidth=50 * GB,
            host_bandwidth=64 * GB,
            host_memory_bytes=2 * TIB,
            devices_per_node=8,
            source="NVIDIA Blackwell Architecture Technical Brief (HGX B200); NVIDIA DGX B200 datasheet",
            device_names=("NVIDIA B200",),
            chip=Chip(
                capability=(10, 0),
                multiprocessors=148,
                shared_block_bytes=227 * KIB,
                shared_multiprocessor_bytes=228 * KIB,
                l2_bytes=126 * MIB,
                usable_bytes=int(178.35 * GIB),
                source="NVIDIA Blackwell Architecture Technical Brief; CUDA C++ Programming Guide, compute capabilities; "
                "usable bytes: the least total capacity in PyTorch's out-of-memory messages, which differ by driver",
            ),
        ),
    )
}


def load_hardware(name: str) -> Hardware:
    """The row `name`, or the row in the YAML file at path `name`.

    Raises `ValueError` naming the known rows, or the error in the file.
    """
    if name in ROWS:
        return ROWS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown hardware '{name}'; use one of {', '.join(ROWS)} or a path to a YAML file with a row"
        )
    if not path.is_file():
        raise ValueError(f"hardware '{name}': no such file")
    try:
        return Hardware(**yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        known = sorted(Hardware.model_fields)
        if isinstance(error, ValidationError):
            raise ValueError(explain(error, f"hardware '{name}'", known)) from None
        raise ValueError(
            f"hardware '{name}': not a YAML mapping with keys {', '.join(known)}"
        ) from None
