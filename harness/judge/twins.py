"""GPU readings beside phantom-device readings of the same cell. Imports no torch."""

from __future__ import annotations

from alst_impl.config import Frozen
from harness.cells.cell import Cell
from harness.records.metrics import value_of
from harness.records.record import Measurement, Outcome
from harness.records.table import Results


class Twin(Frozen):
    """One number of one cell, measured and predicted."""

    cell: Cell
    """The measured cell."""
    quantity: str
    """`allocated, PHASE`, `reserved` or `nvml`."""
    measured: float
    predicted: float
    judged: bool
    """Whether both numbers must be equal. They must if the same allocator got the same requests in the same order.

    Reserved bytes are never judged: a block that a second stream used returns to the cache when the device has
    reached that point, and a phantom device has no time. NVML is modelled.
    """

    @property
    def error(self) -> float:
        """Predicted divided by measured, minus one."""
        return self.predicted / self.measured - 1

    @property
    def missed(self) -> bool:
        """Whether the numbers differ although they must be equal."""
        return self.judged and self.predicted != self.measured


def run_of(cell: Cell) -> str:
    """Identity of the training run: equal for a measured cell and its phantom twin."""
    return " ".join(
        [
            cell.hardware,
            str(cell.expandable_segments),
            str(cell.warmup),
            cell.train.model_dump_json(),
        ]
    )


def pairs(results: Results) -> list[tuple[Measurement, Measurement]]:
    """(measured, predicted) records of the same cell, both complete, in the order of the measured records."""
    whole = [m for m in results.measurements.values() if m.readings and m.readings.memory]
    played = {run_of(m.cell): m for m in whole if m.cell.traits.phantom}
    measured = [m for m in whole if m.cell.traits.gpus and m.outcome is Outcome.OK]
    return [(m, played[run_of(m.cell)]) for m in measured if run_of(m.cell) in played]


def torch_versions(results: Results) -> list[tuple[str, str]]:
    """(on the GPU, on the phantom device) versions of pairs that cannot be judged, each pair of versions once."""
    found = ((_torch(gpu), _torch(phantom)) for gpu, phantom in pairs(results))
    return sorted({each for each in found if each[0] != each[1]})


def twins(results: Results) -> list[Twin]:
    """Every number with a GPU reading and a phantom-device reading, in the order of the cells."""
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
    """Largest allocated bytes over ranks, by phase. A phantom device plays the rank with the highest memory use."""
    assert m.readings is not None
    ranks = [rank.cuda.allocated_bytes for rank in m.readings.memory if rank.cuda is not None]
    phases = dict.fromkeys(phase for rank in ranks for phase in rank)
    return {phase: max(rank.get(phase, 0) for rank in ranks) for phase in phases}


def _torch(m: Measurement) -> str:
    """Version of torch without the build: a phantom device uses the CUDA build while the CPU build is installed."""
    return m.provenance.versions.get("torch", "unknown").partition("+")[0]
