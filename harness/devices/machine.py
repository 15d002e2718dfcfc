"""Whether this machine is the one that a cell names: its devices, its packages, its checkout.

Every refusal is a `ValueError` before anything runs or is written. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from alst_impl.ops.attention.kernels import MODULES, missing
from harness.cells.cell import Cell
from harness.cells.hardware import ROWS, load_hardware
from harness.devices import nvml
from harness.processes.launch import Launch
from harness.records.provenance import checkout
from harness.records.readings import Device

PASSED_ON = ("CUDA_", "NCCL_", "TORCH_NCCL_")
"""Beginnings of variables that decide how ranks use devices and network; they come from whoever asks."""
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""What CUDA's caching allocator reads as it starts."""


def rank_environment(expandable_segments: bool, ours: Mapping[str, str]) -> dict[str, str]:
    """What CUDA ranks find in their environment before CUDA starts."""
    passed = {name: value for name, value in ours.items() if name.startswith(PASSED_ON)}
    # NVML counts devices by their place on the bus; CUDA does if told so.
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**passed, **order, ALLOCATOR: f"expandable_segments:{expandable_segments}"}


def require_devices(cell: Cell, launch: Launch | None, library: Any = None) -> list[Device]:
    """The devices of this machine on which ranks of `cell` run; `library` stands in for NVML.

    Raises `ValueError` unless there are enough and all are the cell's hardware.
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
    """Raise `ValueError` unless `device` is of the cell's hardware row."""
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
    """The hardware row that `device` is of, if there is one."""
    return next((name for name, row in ROWS.items() if device.name in row.device_names), None)


def some_devices(library: Any) -> list[Device]:
    """The devices that a run here would use. Raises `ValueError` where there is none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = nvml.visible_devices(library, asked)
    if not found:
        why = "NVML counts none" if asked is None else f"CUDA_VISIBLE_DEVICES={asked} hides all"
        raise ValueError(f"no CUDA device to use: {why}")
    return found


def known_device(library: Any) -> tuple[str, Device]:
    """The row of the first device that is visible, and the device. Raises `ValueError` for no known row."""
    found = some_devices(library)
    row = row_of(found[0])
    if row is None:
        raise ValueError(
            f"device {found[0].index} is '{found[0].name}', which no row of harness/cells/hardware.py has among its "
            f"device_names; add one ({', '.join(name for name, r in ROWS.items() if r.device_names)} are there)"
        )
    return row, found[0]


def require_clean(what: str) -> None:
    """Raise `ValueError` unless a record of `what` made now says which code made it."""
    found = checkout()
    if found is not None and not found.changed:
        return
    why = "is no checkout with a commit"
    if found is not None:
        more = f" and {len(found.changed) - 1} more" if len(found.changed) > 1 else ""
        why = f"has what its commit does not hold ({found.changed[0]}{more})"
    raise ValueError(
        f"{what}: the tree {why}, so a CUDA record could not say what it measured; commit, or pass "
        "--allow-dirty"
    )


def require_cuda_build(what: str) -> None:
    """Raise `ValueError` where the installed PyTorch is one for processors alone."""
    installed = version("torch")
    if installed.endswith("+cpu"):
        raise ValueError(
            f"{what}: torch {installed} was built without CUDA; install a build with it from pytorch.org"
        )


def require_attention(name: str) -> None:
    """Raise `ValueError` where the package of attention `name` is missing."""
    if name in MODULES and importlib.util.find_spec(MODULES[name].partition(".")[0]) is None:
        raise ValueError(missing(name))
