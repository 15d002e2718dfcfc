"""Where a checkout keeps what runs read and write, relative to its root."""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = Path("experiments")
DEFECTS = EXPERIMENTS / "planted" / "defects.yaml"
CAUGHT = EXPERIMENTS / "planted" / "caught.csv"
"""Which cell of the correctness matrix caught each of them."""
RESULTS = Path("results")
REFERENCE = RESULTS / "reference"
"""Committed records, one folder per hardware and experiment."""
CALIBRATION = "calibration.json"
"""In a hardware row's folder of `REFERENCE`: what was measured to simulate it with."""
CHANGES = REFERENCE / "CHANGES.md"
"""Why committed records were replaced, and by what they differ."""
REPORT = RESULTS / "report.html"
README = Path("README.md")


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
