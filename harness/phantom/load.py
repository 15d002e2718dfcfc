"""The environment that gives a program phantom devices, and the test that it works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from harness.cells.hardware import ROWS, Hardware, load_hardware
from harness.phantom import build
from harness.phantom.wheel import Wheel, find, peers

AGENT = Path(__file__).with_name("agent")
"""First on the Python path. Every Python process of the program runs its `sitecustomize`."""


def device_of(hardware: str, gpus: int, outside_bytes: int) -> str:
    """Device description for the runtime: `gpus` devices of the row `hardware`, each with `outside_bytes` in use.

    Raises `ValueError` for a row without CUDA devices and for numbers out of range.
    """
    row: Hardware = load_hardware(hardware)
    if row.chip is None:
        usable = ", ".join(name for name, each in ROWS.items() if each.chip is not None)
        raise ValueError(f"hardware '{hardware}' has no CUDA devices; use one of {usable}")
    if not 1 <= gpus <= 64:
        raise ValueError(f"--gpus {gpus}: one process can see 1 to 64 devices")
    total = row.chip.usable_bytes - outside_bytes
    if outside_bytes < 0 or total <= 0:
        raise ValueError(
            f"{outside_bytes / 2**30:.1f} GiB outside the allocator do not fit in the "
            f"{row.chip.usable_bytes / 2**30:.1f} GiB of '{hardware}'"
        )
    return described(row, gpus, total)


def described(row: Hardware, gpus: int, device_bytes: int) -> str:
    """Device description for the runtime: `gpus` devices of `row`, each with `device_bytes` for the allocator."""
    assert row.chip is not None
    fields = {
        "count": gpus,
        "major": row.chip.capability[0],
        "minor": row.chip.capability[1],
        "multiprocessors": row.chip.multiprocessors,
        "total": device_bytes,
        "shared": row.chip.shared_block_bytes,
        "shared_multiprocessor": row.chip.shared_multiprocessor_bytes,
        "l2": row.chip.l2_bytes,
    }
    name = row.device_names[0] if row.device_names else row.name
    return ";".join([name, *(f"{key}={value}" for key, value in fields.items())]) + ";"


def environment(session: Path, device: str, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the variables that give programs phantom devices. `session` is the folder that
    their processes share.

    Builds the libraries if needed. Raises `ValueError` if that fails.
    """
    return {
        **prepared(base),
        "PHANTOM_DEVICE": device,
        "PHANTOM_LEDGER": str(session / "ledger"),
        "PHANTOM_SESSION": str(session),
    }


def prepared(base: Mapping[str, str], wheel: Wheel | None = None) -> dict[str, str]:
    """`base` with the stub libraries preloaded, built and tested if needed. Sets no device.

    Raises `ValueError` if the build or the test fails.
    """
    wheel = wheel or find()
    folder = build.built(wheel)
    changed = preloaded(folder, wheel, base)
    tested = folder / "tested"
    if not tested.is_file():
        self_test({**changed, "PHANTOM_DEVICE": device_of("h100-80gb", 1, 0)})
        tested.touch()
    return changed


def self_test(changed: Mapping[str, str]) -> None:
    """Test the runtime in the environment `changed`. Raises `ValueError` with the failed checks."""
    script = str(Path(__file__).with_name("selftest.py"))
    done = subprocess.run(
        [sys.executable, script], env=dict(changed), check=False, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"phantom devices do not work with this PyTorch: {said}")


def preloaded(folder: Path, wheel: Wheel, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the libraries in `folder` preloaded."""
    names = (folder / build.DONE).read_text().split()
    search = [str(AGENT), str(wheel.folder), base.get("PYTHONPATH", ""), str(peers())]
    return {
        **base,
        "LD_PRELOAD": ":".join(
            [*(str(folder / name) for name in names), *filter(None, [base.get("LD_PRELOAD")])]
        ),
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
        "PHANTOM_LIBRARIES": str(folder),
        # Triton searches a folder for the driver. It compiles its launcher per driver, hence a
        # cache of its own.
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": base.get("TRITON_CACHE_DIR", str(folder.parent / "triton")),
    }
