"""World `schedule`: simulates a pipeline's schedule with modelled times and bytes, without tensors.
Imports no torch.
"""

from __future__ import annotations

from typing import Any

from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.formulas import pipelines
from harness.processes.jobs import Rank
from harness.records.sources import fingerprint


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Simulate the schedule of `payload["cell"]`."""
    cell = Cell(**payload["cell"])
    assert cell.simulation is not None
    rank.progress("playing its schedule")
    prediction = pipelines.prediction(
        pipelines.staged(cell.train, cell.simulation.tp, cell.hardware)
    )
    found = Simulated(
        code=fingerprint(),
        prediction=prediction,
        peak_bytes=prediction.allocated_bytes,
        checkpoint_bytes=0,
        holdings=[],
        search=None,
        timeline=None,
    )
    return {"simulated": found.model_dump(mode="json"), "readings": None}
