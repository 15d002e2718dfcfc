"""Which files decide a forecast or a verdict, and whether they are the same. Imports no torch."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from harness.cells.paths import SOURCES

FORECASTING = ("cells", "devices", "formulas", "meters", "phantom", "predict", "worlds")
"""Packages of the harness that decide a forecast; of the implementation, every file counts."""

JUDGING = ("gate", "worlds")
"""Packages of the harness that run and judge gradients; of the implementation, every file counts."""

KINDS = ("*.py", "*.c", "*.h", "*.json", "*.yaml")
"""Files that count."""


def code_files() -> list[Path]:
    """The files that decide a forecast, sorted."""
    return _files(FORECASTING)


def _files(packages: tuple[str, ...]) -> list[Path]:
    implementation, harness = SOURCES
    folders = [implementation, *(harness / package for package in packages)]
    return sorted(path for folder in folders for kind in KINDS for path in folder.rglob(kind))


@cache
def fingerprint() -> str:
    """Equal for code and libraries that forecast the same."""
    return _hash(code_files())


@cache
def judging_fingerprint() -> str:
    """Equal for code and libraries that train and judge gradients the same."""
    return _hash(_files(JUDGING))


def _hash(files: list[Path]) -> str:
    libraries = f"torch {version('torch')}, transformers {version('transformers')}"
    digest = hashlib.sha256(libraries.encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
