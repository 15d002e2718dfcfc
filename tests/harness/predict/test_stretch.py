"""A step that is stretched from few layers equals the step with all layers, on phantom devices."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import pytest
from phantoms import NEEDED, cell

from harness.cells.cell import Cell
from harness.cells.prediction import Holding
from harness.processes.client import submit
from harness.processes.jobs import Rank

pytestmark = NEEDED

LAYERS = 8


def both(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Body of a rank: use, work and holdings of a step, stretched and of the step itself."""
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    from harness.predict import stretch
    from harness.predict.attempts import roomy
    from harness.predict.fits import counted
    from harness.processes.apart import apart

    of = Cell(**payload["cell"])
    few = stretch.with_few_layers(rank, of, counted=True, explained=True)
    step = apart([partial(roomy, rank, of, counted=True, explained=True)])[0]
    stretched = stretch.stretched_holdings(of, *few, step.allocated_bytes)
    return {
        "deep": stretch.is_deep(of),
        "uses": [
            [u.device, u.host] for u in (stretch.stretched_use(of, *few), stretch.use_of(of, step))
        ],
        "costs": [c.model_dump() for c in (stretch.stretched_cost(of, *few), counted(rank, of))],
        "holdings": [h and sorted(_by_line(h)) for h in (stretched, step.holdings)],
        "too much": stretch.stretched_holdings(of, *few, 2 * step.allocated_bytes),
    }


def _by_line(holdings: list[Holding]) -> list[tuple[str, int, int]]:
    """Line, bytes and number of tensors, summed over the categories of a line; by category where none is known."""
    sums: dict[str, tuple[int, int]] = {}
    for h in holdings:
        line = h.operator + (h.location or h.category)
        nbytes, count = sums.get(line, (0, 0))
        sums[line] = nbytes + h.nbytes, count + h.count
    return [(line, *both) for line, both in sums.items()]


def ran(body: str, of: Cell) -> dict[str, Any]:
    """Result of `body` for `of` in a process with phantom devices."""
    payload = {"cell": of.model_dump(mode="json")}
    ending = submit(f"{__name__}:{body}", payload, 1, of.timeout_s, accelerator="phantom")
    assert ending.how == "finished", ending
    (found,) = ending.results
    return dict(found)


def compared(**settings: Any) -> dict[str, Any]:
    """What `both` finds of a model with `LAYERS`."""
    return ran("both", cell(overrides={"num_hidden_layers": LAYERS}, **settings))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "alst", "sp": 2},
        {"name": "layerwise", "sp": 2, "every": 1},
        {"name": "alst", "sp": 2, "offload": False},
    ],
    ids=["offload", "layerwise", "checkpoints on the device"],
)
def test_few_layers_tell_of_all(method: dict[str, Any]) -> None:
    """FLOPs are equal, and bytes at every line that allocates; sums that do not add up are never shown.

    The bytes of a device and a host guide a search only, and depend on where tensors find room.
    """
    found = compared(method=method, world_size=2, seqlen=4096)
    assert found["deep"]
    assert found["uses"][0] == pytest.approx(found["uses"][1], rel=0.02, abs=2048)
    assert found["costs"][0] == found["costs"][1]
    stretched, full = found["holdings"]
    if method["name"] == "alst" or stretched is not None:
        assert stretched == full
    assert found["too much"] is None


def test_the_peak_moves_to_another_phase() -> None:
    """Two layers need the most in backward, with the loss; all layers in the update, with every gradient and state."""
    found = compared(method={"name": "alst"}, engine="plain", world_size=1, seqlen=128)
    stretched, full = (device for device, _ in found["uses"])
    assert stretched == pytest.approx(full, rel=0.001)


def crossed(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Body of a rank: the length at which backward meets the memory, where the update holds more until then."""
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    from harness.predict.attempts import capacity_bytes
    from harness.predict.longest import FULL, crossing
    from harness.predict.stretch import Use

    of = Cell(**payload["cell"])
    room = FULL * capacity_bytes(of)
    known = {
        tokens: Use(phases={"backward": room * tokens / 9_000, "update": room / 2}, host=tokens)
        for tokens in (1_000, 2_000)
    }
    return {"tokens": crossing(of, known)}


def test_what_no_token_adds_to_does_not_hide_what_grows() -> None:
    """A plan with states on the GPUs said 8M where backward ends far earlier: it followed the peak, which was flat."""
    assert ran("crossed", cell(method="alst", seqlen=1_000))["tokens"] == pytest.approx(9_000)


def chunked(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Body of a rank: bytes, work and holdings of a step of many chunks, stretched and of the step itself."""
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    from harness.predict import attempts, passes
    from harness.processes.apart import apart

    of = Cell(**payload["cell"])
    asked: dict[str, Any] = {"counted": True, "explained": True}
    calls = [
        partial(attempts.attempt, rank, of, attempts.ROOMY_BYTES, **asked),
        partial(attempts.run_attempt, rank, of, attempts.ROOMY_BYTES, **asked),
    ]
    steps = apart(calls)
    return {
        "stretches": passes.stretches(of),
        "uses": [
            [each.allocated_bytes, attempts.host_bytes(of, each), each.memory.host_peak_bytes]
            for each in steps
        ],
        "costs": [each.cost.model_dump() for each in steps],
        "holdings": [sorted(_by_line(each.holdings)) for each in steps],
    }


def test_a_step_of_many_chunks_is_stretched_to_the_byte() -> None:
    """From three steps of few chunks, on sequences that chunks do not divide."""
    method = {"name": "chunked", "sp": 2, "chunk": 64}
    found = ran("chunked", cell(method=method, world_size=2, seqlen=11 * 128 - 100))
    assert found["stretches"]
    for name in ("uses", "costs", "holdings"):
        stretched, full = found[name]
        assert stretched == full, name
