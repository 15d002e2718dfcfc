"""Where a record comes from: code, machine, libraries. Imports no torch."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from harness.records.record import Provenance
from harness.records.sources import judging_fingerprint

LIBRARIES = (
    "torch",
    "transformers",
    "deepspeed",
    "flash-attn",
    "flash-attn-4",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "numpy",
)
ROOT = Path(__file__).parents[2]
CODE = ("alst_impl", "harness", "experiments")
"""Folders below `ROOT` in which an untracked file can affect a result."""


class Checkout(NamedTuple):
    """The commit of the code, and the files that differ from it."""

    commit: str
    changed: list[str]
    """Files that differ from the commit, and untracked files in `CODE` that git does not ignore."""


def provenance(
    wall_s: float, device: str | None = None, driver: str | None = None, nodes: int = 1
) -> Provenance:
    """Provenance of a run that ends now after `wall_s` seconds. Without `device` it ran on the processor."""
    found = checkout()
    return Provenance(
        commit=found.commit if found else None,
        dirty=bool(found.changed) if found else None,
        device=device or _processor(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        versions=_versions(),
        utc=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        wall_s=wall_s,
        code=judging_fingerprint(),
        driver=driver,
        nodes=nodes,
    )


@cache
def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue  # optional and not installed
    return found


def checkout(root: Path = ROOT) -> Checkout | None:
    """The checkout at `root`; None if it has no commit that contains this file."""
    commit = _git(root, "rev-parse", "HEAD")
    # An installed package may lie inside the checkout of another project.
    own = _git(root, "ls-files", "--", str(Path(__file__).relative_to(ROOT)))
    changed = _git(root, "diff", "--name-only", "HEAD")
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "--", *CODE)
    if not commit or not own or changed is None or unknown is None:
        return None
    return Checkout(commit[0], changed + unknown)


def _git(root: Path, *arguments: str) -> list[str] | None:
    """The output lines of git; None if git fails or is not installed."""
    command = ["git", "-C", str(root), "-c", "core.quotePath=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


@cache
def _processor() -> str:
    """The processor's name, as it reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
