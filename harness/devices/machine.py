"""Checks that this machine can run a cell: its devices, its packages, its checkout.

A failed check raises `ValueError` before anything runs or is written. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from alst_impl.config import Spec
from alst_impl.ops.attention.cores.base import load_core
from harness.cells.cell import Cell
from harness.cells.hardware import ROWS, load_hardware
from harness.devices import nvml
from harness.processes.launch import Launch
from harness.records.provenance import checkout
from harness.records.readings import Device

PASSED_ON = ("CUDA_", "NCCL_", "TORCH_NCCL_")
"""Prefixes of environment variables that ranks inherit from the caller. They configure devices and network."""
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Environment variable that CUDA's caching allocator reads when it starts."""


def rank_environment(expandable_segments: bool, ours: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of CUDA ranks, set before CUDA starts."""
    passed = {name: value for name, value in ours.items() if name.startswith(PASSED_ON)}
    # NVML orders devices by PCI bus. This makes CUDA use the same order.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**passed, **order, ALLOCATOR: f"expandable_segments:{expandable_segments}"}


def require_devices(cell: Cell, launch: Launch | None, library: Any = None) -> list[Device]:
    """The devices of this machine on which ranks of `cell` run. `library` replaces NVML in tests.

    Raises `ValueError` if there are too few devices or one is not the cell's hardware.
    """
    try:
        found = nvml.visible_devices(
            library or nvml.library(), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
    except ValueError as error:
        raise ValueError(f"{cell.label} needs world 'cuda': {error}") from None
    needed = cell.num_processes if launch is None else launch.local_world_size
    if len(found) < needed:
        raise ValueError(_too_few(cell, found, needed, launch))
    for device in found[:needed]:
        _require(cell, device)
    return found[:needed]


def _too_few(cell: Cell, found: list[Device], needed: int, launch: Launch | None) -> str:
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{len(found)} visible" + (
        f" (CUDA_VISIBLE_DEVICES={asked})" if asked is not None else ""
    )
    way_out = (
        "start it under torchrun on enough nodes" if launch is None else "lower --nproc-per-node"
    )
    return f"{cell.label} needs {needed} devices on this machine, but {seen}; {way_out}"


def _require(cell: Cell, device: Device) -> None:
    """Raise `ValueError` unless `device` matches the cell's hardware row."""
    row = load_hardware(cell.hardware)
    if device.name in row.device_names:
        return
    fitting = row_of(device)
    what = f"device {device.index} is '{device.name}'"
    if device.part is not None:
        what += f", part {device.part} of a device that MIG has split"
    known = f" (that is '{fitting}')" if fitting else ""
    raise ValueError(
        f"{cell.label} is for hardware '{cell.hardware}' ({', '.join(row.device_names) or 'no CUDA device'}), "
        f"but {what}{known}; set hardware to its row, or to a YAML file with a row whose device_names has it"
    )


def row_of(device: Device) -> str | None:
    """Name of the hardware row that matches `device`, or None."""
    return next((name for name, row in ROWS.items() if device.name in row.device_names), None)


def some_devices(library: Any) -> list[Device]:
    """The devices that a run on this machine would use. Raises `ValueError` if there are none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = nvml.visible_devices(library, asked)
    if not found:
        why = "NVML counts none" if asked is None else f"CUDA_VISIBLE_DEVICES={asked} hides all"
        raise ValueError(f"no CUDA device to use: {why}")
    return found


def known_device(library: Any) -> tuple[str, Device]:
    """Hardware row and device of the first visible device. Raises `ValueError` if no row matches."""
    found = some_devices(library)
    row = row_of(found[0])
    if row is None:
        raise ValueError(
            f"device {found[0].index} is '{found[0].name}', which no file in harness/cells/hardware/rows lists in its "
            f"device_names; add a row (there are {', '.join(name for name, r in ROWS.items() if r.device_names)})"
        )
    return row, found[0]


def require_clean(what: str) -> None:
    """Raise `ValueError` unless the checkout is clean, so that its commit identifies the code
    behind a record of `what`.
    """
    found = checkout()
    if found is not None and not found.changed:
        return
    why = "is no checkout with a commit"
    if found is not None:
        more = f" and {len(found.changed) - 1} more" if len(found.changed) > 1 else ""
        why = f"has what its commit does not hold ({found.changed[0]}{more})"
    raise ValueError(
        f"{what}: the tree {why}, but a CUDA record must name the code that made it; commit, or pass "
        "--allow-dirty"
    )


def require_cuda_build(what: str) -> None:
    """Raise `ValueError` if the installed PyTorch is a CPU build."""
    installed = version("torch")
    if installed.endswith("+cpu"):
        raise ValueError(
            f"{what}: torch {installed} was built without CUDA; install a build with it from pytorch.org"
        )


def require_attention(spec: Spec | str) -> None:
    """Raise `ValueError` if the package of a core attention is missing."""
    message = load_core(spec).missing()
    if message is not None:
        raise ValueError(message)
