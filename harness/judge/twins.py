"""What a GPU measured beside what a phantom device read of the same cell. Imports no torch."""

from __future__ import annotations

from alst_impl.config import Frozen
from harness.cells.cell import Cell
from harness.records.metrics import value_of
from harness.records.record import Measurement, Outcome
from harness.records.table import Results


class Twin(Frozen):
    """One number of one cell."""

    cell: Cell
    """The measured one."""
    quantity: str
    """`allocated` with its phase, `reserved` or `nvml`."""
    measured: float
    predicted: float
    judged: bool
    """Whether both have to be equal: the same allocator was asked for the same bytes in the same order.

    What it reserves is never judged: a block that a second stream used goes back to the cache when the
    device has passed the place, and a phantom device has no time. NVML is modelled.
    """

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        """Whether numbers that have to be equal differ."""
        return self.judged and self.predicted != self.measured


def run_of(cell: Cell) -> str:
    """Equal for a measured cell and its twin: the training run, its device, allocator and steps before."""
    return " ".join(
        [
            cell.hardware,
            str(cell.expandable_segments),
            str(cell.warmup),
            cell.train.model_dump_json(),
        ]
    )


def pairs(results: Results) -> list[tuple[Measurement, Measurement]]:
    """(measured, played) records of the same cell, both whole, in the order of the measured ones."""
    whole = [m for m in results.measurements.values() if m.readings and m.readings.memory]
    played = {run_of(m.cell): m for m in whole if m.cell.traits.phantom}
    measured = [m for m in whole if m.cell.traits.gpus and m.outcome is Outcome.OK]
    return [(m, played[run_of(m.cell)]) for m in measured if run_of(m.cell) in played]


def torch_versions(results: Results) -> list[tuple[str, str]]:
    """(on the GPU, on the phantom device) of pairs that cannot be judged, each once."""
    found = ((_torch(gpu), _torch(phantom)) for gpu, phantom in pairs(results))
    return sorted({each for each in found if each[0] != each[1]})


def twins(results: Results) -> list[Twin]:
    """Every number that both a GPU and a phantom device read, in the order of the cells."""
    return [twin for pair in pairs(results) for twin in _of(*pair)]


def _of(gpu: Measurement, phantom: Measurement) -> list[Twin]:
    same = _torch(gpu) == _torch(phantom)
    ours = allocated_by_phase(phantom)
    found = [
        Twin(
            cell=gpu.cell,
            quantity=f"allocated, {phase}",
            measured=nbytes,
            predicted=ours[phase],
            judged=same,
        )
        for phase, nbytes in allocated_by_phase(gpu).items()
        if nbytes and phase in ours
    ]
    total = phantom.simulated.prediction if phantom.simulated else None
    shown = {
        "reserved": (value_of("reserved_bytes", gpu), value_of("reserved_bytes", phantom)),
        "nvml": (value_of("nvml_bytes", gpu), total and total.total_bytes),
    }
    return found + [
        Twin(cell=gpu.cell, quantity=name, measured=read, predicted=guess, judged=False)
        for name, (read, guess) in shown.items()
        if read and guess
    ]


def allocated_by_phase(m: Measurement) -> dict[str, int]:
    """The largest over ranks; a phantom device plays the rank that holds the most."""
    assert m.readings is not None
    ranks = [rank.cuda.allocated_bytes for rank in m.readings.memory if rank.cuda is not None]
    phases = dict.fromkeys(phase for rank in ranks for phase in rank)
    return {phase: max(rank.get(phase, 0) for rank in ranks) for phase in phases}


def _torch(m: Measurement) -> str:
    """Version without the name of the build: a phantom device runs the CUDA build beside one for processors."""
    return m.provenance.versions.get("torch", "unknown").partition("+")[0]
