"""Which files decide a forecast or a verdict, and whether they are the same. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from harness.cells.paths import SOURCES

FORECASTING = ("cells", "devices", "formulas", "meters", "phantom", "predict", "worlds")
"""Packages of the harness that decide a forecast; of the implementation, every file counts."""

JUDGING = ("gate", "worlds")
"""Packages of the harness that run and judge gradients; of the implementation, every file counts."""

RUNNING = ("phantom",)
"""Packages of the harness that decide what a script of its own holds on a phantom device; of the implementation, every
file counts."""

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


@cache
def library_fingerprint() -> str:
    """Equal for code and libraries with which a script that uses this project's library holds the same."""
    return _hash(_files(RUNNING))


def _hash(files: list[Path]) -> str:
    release = version("torch").partition("+")[0]  # not its build: phantom devices have another
    libraries = f"torch {release}, transformers {version('transformers')}"
    digest = hashlib.sha256(libraries.encode())
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".py":
            content = without_words(content.decode()).encode()
        digest.update(path.name.encode() + content)
    return digest.hexdigest()[:16]


def without_words(source: str) -> str:
    """Python code without docstrings, blank lines and lines of comment, which decide nothing."""
    lines, nodes = source.splitlines(), list(ast.walk(ast.parse(source)))
    texts = [node for node in nodes if isinstance(node, ast.Constant)]
    docstrings = [
        n.value for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    comments = {n for n, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    words = comments - _rows(texts) | _rows(docstrings)
    kept = (line.rstrip() for n, line in enumerate(lines, 1) if n not in words)
    return "\n".join(filter(None, kept))


def _rows(nodes: Iterable[ast.expr]) -> set[int]:
    """Numbers of the lines on which `nodes` stand."""
    return {row for n in nodes for row in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
