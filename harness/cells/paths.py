"""Paths that runs read and write, relative to the working directory.

Experiments, published numbers and planted defects ship with the code. They are read from there if
the working directory has none.
"""

from __future__ import annotations

import re
from pathlib import Path

EXPERIMENTS = Path("experiments")
DEFECTS = EXPERIMENTS / "planted" / "defects.yaml"
CAUGHT = EXPERIMENTS / "planted" / "caught.csv"
"""Which cell of the correctness matrix caught each planted defect."""
RESULTS = Path("results")
REFERENCE = RESULTS / "reference"
"""Committed records, one folder per hardware and experiment."""
CHANGES = REFERENCE / "CHANGES.md"
"""Why committed records were replaced, and how the new ones differ."""
REPORT = RESULTS / "report.html"
README = Path("README.md")

HERE = Path(__file__).parents[1]
HOME = next(home for home in (HERE, HERE.parent) if (home / EXPERIMENTS).is_dir())
"""The folder that contains `EXPERIMENTS`: the checkout's root, or the package `harness` in an installed wheel."""


SOURCES = [HERE.parent / package for package in ("alst_impl", "harness")]
"""The project's packages."""


def located(path: Path) -> Path:
    """`path`, or the copy that ships with the code if the working directory has none."""
    carried = HOME / path
    own = path.exists() or path.parts[:1] != EXPERIMENTS.parts or not carried.exists()
    return path if own else carried


def experiments() -> list[Path]:
    """The YAML of every experiment, sorted."""
    return sorted(located(EXPERIMENTS).glob("*.yaml"))


def experiment(name: str) -> Path:
    """The YAML of an experiment. Raises `ValueError` for a name that would leave the folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"'{name}' is no name of an experiment; use one of {', '.join(p.stem for p in experiments())}"
        )
    return EXPERIMENTS / f"{name}.yaml"


def published(table: str) -> Path:
    """A table of published numbers."""
    return EXPERIMENTS / "published" / f"{table}.csv"


def cells(name: str) -> Path:
    """Folder of an experiment's fresh records, one `<key>.json` per cell."""
    return RESULTS / "cells" / name


def table(name: str) -> Path:
    """An experiment's table."""
    return RESULTS / "tables" / f"{name}.csv"


def figures(name: str) -> Path:
    """Folder of an experiment's figures, `<figure>.png` and `<figure>.svg`."""
    return RESULTS / "figures" / name
