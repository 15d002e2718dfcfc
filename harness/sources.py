"""Which files decide a forecast or a verdict, and whether they are the same. Imports no torch."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from harness.processes import SOURCES

HARNESS = (
    "apart",
    "attempts",
    "cost",
    "depth",
    "fits",
    "flops",
    "hardware",
    "longest",
    "outside",
    "parts",
    "pipelines",
    "roofline",
    "timeline",
    "worlds/base",
    "worlds/cuda",
    "worlds/phantom",
    "worlds/schedule",
)
"""Modules of the harness; of the implementation, every file counts."""

JUDGES = ("gate", "gradients", "truth", "worlds/base", "worlds/cpu", "worlds/cuda")
"""Modules of the harness that run and judge gradients; of the implementation, every file counts."""


def code_files() -> list[Path]:
    """The files that decide a forecast, the sources of phantom devices among them, sorted."""
    devices = SOURCES[1] / "phantom"
    found = [path for kind in ("*.py", "*.c", "*.h", "*.yaml") for path in devices.rglob(kind)]
    return sorted([*_files(HARNESS), *found])


def _files(modules: tuple[str, ...]) -> list[Path]:
    implementation, harness = SOURCES
    files = [*implementation.rglob("*.py"), *implementation.rglob("*.json")]
    return sorted([*files, *(harness / f"{name}.py" for name in modules)])


@cache
def fingerprint() -> str:
    """Equal for code and libraries that forecast the same."""
    return _hash(code_files())


@cache
def judging_fingerprint() -> str:
    """Equal for code and libraries that train and judge gradients the same."""
    return _hash(_files(JUDGES))


def _hash(files: list[Path]) -> str:
    libraries = f"torch {version('torch')}, transformers {version('transformers')}"
    digest = hashlib.sha256(libraries.encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
