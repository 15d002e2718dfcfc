"""World `phantom` in tests: requirements, a cell, and its record."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness.cells.cell import Cell, make_cell
from harness.cells.prediction import Prediction
from harness.phantom.wheel import find, headers, peers
from harness.records.record import Measurement
from harness.run.measure import measure


def missing() -> str:
    """The missing requirement of phantom devices; empty if nothing is missing."""
    try:
        headers(find())
    except ValueError as error:
        return str(error)
    return ""


def torch_version() -> tuple[int, ...]:
    """Major and minor version of PyTorch's CUDA build; empty if there is none."""
    try:
        return tuple(int(part) for part in find().version.split(".")[:2])
    except ValueError:
        return ()


def found_there(package: str) -> bool:
    """Whether programs on phantom devices find `package`."""
    return find_spec(package) is not None or (peers() / package).is_dir()


NEEDED = [
    pytest.mark.phantom,
    pytest.mark.skipif(bool(missing()), reason=missing() or "all there"),
]
"""Marks of tests that need phantom devices."""
NEEDS_TRITON = pytest.mark.skipif(not found_there("triton"), reason="needs the extra peers")


def cell(**settings: Any) -> Cell:
    """A narrow Llama in bf16 on H100, without a search."""
    return make_cell(
        {
            "model": "tiny-llama",
            "engine": "fsdp2",
            "dtype": "bfloat16",
            "world": "phantom",
            "hardware": "h100-80gb",
            "simulation": {"search": False},
            **settings,
        }
    )


def measured(of: Cell, sources: Path | None = None) -> Measurement:
    """The record of `of`, which must succeed. Uses the `alst_impl` in `sources` if given."""
    found = measure(of, Path("unused"), sources=sources)
    assert found.simulated is not None, found.detail
    return found


def predicted(of: Cell) -> Prediction:
    """The prediction of a step of `of`."""
    simulated = measured(of).simulated
    assert simulated is not None
    assert simulated.prediction is not None
    return simulated.prediction
