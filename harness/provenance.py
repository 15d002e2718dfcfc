"""Where a record comes from: code, machine, libraries. Imports no torch."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.record import Provenance
from harness.sources import judging_fingerprint

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
ROOT = Path(__file__).parents[1]


def provenance(
    wall_s: float, device: str | None = None, driver: str | None = None, nodes: int = 1
) -> Provenance:
    """Of a run that ends now after `wall_s` seconds; on the processor where no `device` is named."""
    commit, dirty = checkout()
    return Provenance(
        commit=commit,
        dirty=dirty,
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
            continue  # optional, and not here
    return found


def checkout() -> tuple[str | None, bool | None]:
    """Commit and whether files differ from it; None where this is no checkout with a commit."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _processor() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
