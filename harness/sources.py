"""Which files decide a simulated number, and whether they are still the same. Imports no torch."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from harness.processes import SOURCES

HARNESS = (
    "allocator",
    "flops",
    "forecast",
    "hardware",
    "predict",
    "repeat",
    "roofline",
    "scratch",
    "tracker",
    "worlds/parts",
    "worlds/sim",
)
"""Modules of the harness; of the implementation, every file counts."""


def code_files() -> list[Path]:
    """The files, sorted."""
    implementation, harness = SOURCES
    files = [*implementation.rglob("*.py"), *implementation.rglob("*.json")]
    return sorted([*files, *(harness / f"{name}.py" for name in HARNESS)])


@cache
def fingerprint() -> str:
    """Equal for code and libraries that simulate the same."""
    libraries = f"torch {version('torch')}, transformers {version('transformers')}"
    digest = hashlib.sha256(libraries.encode())
    for path in code_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
