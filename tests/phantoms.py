"""World `phantom` in tests: requirements, a cell, and its record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from alst_impl.methods.base import load_method
from harness.cells.cell import Cell, make_cell
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Prediction
from harness.phantom.load import described
from harness.phantom.wheel import find, headers, peers
from harness.processes import client
from harness.processes.jobs import Rank
from harness.records.record import Measurement
from harness.run.measure import measure
from harness.worlds.base import RankReadings


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


PREDICTED: dict[str, Prediction] = {}
"""Predictions of this process, by cell."""


def predicted(of: Cell) -> Prediction:
    """The prediction of a step of `of`, which is made once."""
    key = of.model_dump_json()
    if key not in PREDICTED:
        simulated = measured(of).simulated
        assert simulated is not None
        assert simulated.prediction is not None
        PREDICTED[key] = simulated.prediction
    return PREDICTED[key]


def estimated(*asked: Cell) -> list[Prediction]:
    """Estimates of a step of each cell: its bytes and its work, without what one token more would take."""
    return [Prediction(**found) for found in _asked("estimates", asked)]


def stepped(*asked: Cell, ranks: tuple[int, ...] = ()) -> list[RankReadings]:
    """Readings of a step of each cell on its heaviest rank, or on each of `ranks`."""
    return [RankReadings(**found) for found in _asked("steps", asked, ranks)]


def _asked(entry: str, asked: Sequence[Cell], ranks: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    payload = {"cells": [of.model_dump(mode="json") for of in asked], "ranks": ranks}
    ending = client.submit(f"phantoms:{entry}", payload, 1, 240, accelerator="phantom")
    assert ending.how == "finished", ending
    found: list[dict[str, Any]] = ending.results[0]
    return found


def estimates(rank: Rank, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Body of a phantom process: see `estimated`."""
    from harness.predict.fits import estimate

    return [
        estimate(rank, Cell(**each))[0].model_dump(mode="json", exclude_unset=True)
        for each in payload["cells"]
    ]


def steps(rank: Rank, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Body of a phantom process: see `stepped`."""
    from harness.processes.apart import apart

    found = []
    for of in [Cell(**each) for each in payload["cells"]]:
        heaviest = load_method(of.train.method).heaviest_rank(of.train.world_size)
        for played in payload["ranks"] or [heaviest]:
            found += apart([partial(_step, rank, of, played)])
    return found


def _step(rank: Rank, of: Cell, played: int) -> dict[str, Any]:
    from harness.predict.attempts import ROOMY_BYTES
    from harness.worlds.base import run
    from harness.worlds.phantom import Phantom

    os.environ["PHANTOM_DEVICE"] = described(load_hardware(of.hardware), 1, ROOMY_BYTES)
    world = Phantom(rank=played, counted=False, explained=False)
    return run(rank, of, world).model_dump(mode="json")
