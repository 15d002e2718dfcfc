"""Where runs read and write, relative to the working folder: a checkout's root, or any other.

Experiments, published numbers and planted defects travel with the code: outside a checkout they are
read from there.
"""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = Path("experiments")
DEFECTS = EXPERIMENTS / "planted" / "defects.yaml"
CAUGHT = EXPERIMENTS / "planted" / "caught.csv"
"""Which cell of the correctness matrix caught each of them."""
RESULTS = Path("results")
REFERENCE = RESULTS / "reference"
"""Committed records, one folder per hardware and experiment."""
CHANGES = REFERENCE / "CHANGES.md"
"""Why committed records were replaced, and by what they differ."""
REPORT = RESULTS / "report.html"
README = Path("README.md")

HERE = Path(__file__).parents[1]
HOME = next(home for home in (HERE, HERE.parent) if (home / EXPERIMENTS).is_dir())
"""Where the code has `EXPERIMENTS`: beside it in a checkout, inside it where a wheel was installed."""


SOURCES = [HERE.parent / package for package in ("alst_impl", "harness")]
"""Our packages."""


def located(path: Path) -> Path:
    """`path`, or what travels with the code in its place where the working folder has none."""
    carried = HOME / path
    own = path.exists() or path.parts[:1] != EXPERIMENTS.parts or not carried.exists()
    return path if own else carried


def experiments() -> list[Path]:
    """The YAML of every experiment, sorted."""
    return sorted(located(EXPERIMENTS).glob("*.yaml"))


def experiment(name: str) -> Path:
    """The YAML of an experiment."""
    return EXPERIMENTS / f"{name}.yaml"


def published(table: str) -> Path:
    """A table of published numbers."""
    return EXPERIMENTS / "published" / f"{table}.csv"


def cells(name: str) -> Path:
    """Folder of an experiment's fresh records, `<key>.json` each."""
    return RESULTS / "cells" / name


def table(name: str) -> Path:
    """An experiment's table."""
    return RESULTS / "tables" / f"{name}.csv"


def figures(name: str) -> Path:
    """Folder of an experiment's figures, `<figure>.png` and `<figure>.svg`."""
    return RESULTS / "figures" / name
