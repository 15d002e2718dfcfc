"""What a GPU measured beside what was simulated of the same training run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from alst_impl.config import Frozen
from harness.cell import Cell, Simulation
from harness.metrics import nvml_bytes
from harness.prediction import Simulated
from harness.record import Measurement, Outcome
from harness.table import Results

KERNELS = {
    "sdpa": "flash_attention_2",
    "sdpa_flash": "flash_attention_2",
    "sdpa_cudnn": "sdpa_cudnn",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
"""Attention of a measured cell -> the kernel whose scratch its twin counts. PyTorch's own flash kernel is
version 2, and what `sdpa` chooses for a causal bf16 step on a GPU."""
TOLERANCE = 0.03
"""How far the simulated allocated peak may be from the measured one."""


class Twin(Frozen):
    """One number of one cell."""

    cell: Cell
    """The measured one."""
    quantity: str
    """`allocated`, `reserved` or `nvml`, and the phase where it has one."""
    measured: float
    predicted: float
    judged: bool
    """Whether `TOLERANCE` holds for it: a count, not a model."""

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        """Whether a count is off by more than `TOLERANCE`."""
        return self.judged and abs(self.error) > TOLERANCE


def _run_of(cell: Cell) -> str:
    """Equal for a measured cell and its twin."""
    kernel = cell.simulation.kernel if cell.simulation else KERNELS.get(cell.train.attention)
    return f"{kernel} {cell.hardware} {cell.train.model_dump_json(exclude={'attention'})}"


def twins(results: Results) -> list[Twin]:
    """Every number that was both measured and simulated, in the order of the cells."""
    simulated = {_run_of(cell): s for cell, s in _simulated(results)}
    return [
        twin
        for m in results.measurements.values()
        if m.cell.world == "cuda" and m.outcome is Outcome.OK
        for twin in _of(m, simulated.get(_run_of(m.cell)))
    ]


def _simulated(results: Results) -> Iterator[tuple[Cell, Simulated]]:
    for m in results.measurements.values():
        if _is_twin(m.cell.simulation) and m.simulated is not None:
            yield m.cell, m.simulated


def _is_twin(simulation: Simulation | None) -> bool:
    return simulation is not None and simulation.part == "step" and simulation.resident


def _of(m: Measurement, simulated: Simulated | None) -> Iterator[Twin]:
    if m.readings is None or simulated is None:
        return
    ranks = [rank.cuda for rank in m.readings.memory if rank.cuda is not None]
    if not ranks:
        return
    for phase, nbytes in simulated.phase_peak_bytes.items():
        read = max(rank.allocated_bytes.get(phase, 0) for rank in ranks)
        if read:
            yield _twin(m.cell, f"allocated, {phase}", read, nbytes, judged=True)
    # The update is not simulated, and what it reserved stays: compare where it asked for no more.
    reserved = max(rank.reserved_bytes.get("backward", 0) for rank in ranks)
    if reserved and simulated.reserved_bytes:
        yield _twin(m.cell, "reserved", reserved, simulated.reserved_bytes, judged=False)
    used = nvml_bytes.value(m)
    if used is not None and simulated.prediction is not None:
        yield _twin(m.cell, "nvml", used, simulated.prediction.total_bytes, judged=False)


def _twin(cell: Cell, quantity: str, measured: float, predicted: float, *, judged: bool) -> Twin:
    return Twin(cell=cell, quantity=quantity, measured=measured, predicted=predicted, judged=judged)
