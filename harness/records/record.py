"""Records: raw readings of a run, its outcome, its provenance. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells.cell import Cell
from harness.cells.prediction import LIMITS, Simulated
from harness.cells.units import bytes_text
from harness.records.readings import DeviceReadings


class Outcome(StrEnum):
    """How a cell ended. A closed set: every run ends as one of these."""

    OK = "ok"
    REFUSED = "refused"
    """The library refused the model or the settings when it saw them, or the stock model does not run in that dtype.

    The detail has the reason.
    """
    DOES_NOT_FIT = "does_not_fit"
    """The predicted step ran to its end, but needs more memory than the machine has."""
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    ILLEGAL_ACCESS = "illegal_access"
    COMM_TIMEOUT = "comm_timeout"
    TIMEOUT = "timeout"
    NAN_LOSS = "nan_loss"
    WRONG_GRADIENT = "wrong_gradient"
    FOREIGN_PROCESS = "foreign_process"
    KILLED = "killed"
    SETUP_ERROR = "setup_error"


class ParameterGate(Frozen):
    """One parameter's gradient compared with the truth.

    Ratio and cosine are None if the true gradient is zero or only rounding error.
    """

    parameter: str
    """Name in the Hugging Face model."""
    ratio: float | None
    """Norm of our gradient divided by the norm of the true one."""
    cosine: float | None
    """Cosine of the angle between them."""
    norm: float | None = None
    """Norm of our gradient; None if it is not finite. Old records lack the norms, which are then None."""
    truth_norm: float | None = None
    """Norm of the true gradient."""
    error_norm: float | None = None
    """Norm of the difference; None if our gradient is not finite."""

    @property
    def noise(self) -> bool:
        """Whether the true gradient is zero or only rounding error, and ours is finite."""
        return self.ratio is None and self.error_norm is not None


class Gate(Frozen):
    """Every gradient of one step compared with the stock transformers model in one process, in fp64."""

    passed: bool
    """All parameters are within tolerance, and the method did what it claims."""
    loss: float
    """Our loss."""
    truth_loss: float
    """Loss of the stock model."""
    worst: ParameterGate
    """The parameter that uses up most of its tolerance."""
    parameters: list[ParameterGate]
    """All parameters."""
    updates: list[ParameterGate] = []
    """Change of every parameter in that step, compared with PyTorch's optimizer on the true gradients.

    Empty if updates were not compared.
    """
    wrong_update: ParameterGate | None = None
    """The update that exceeds its tolerance most, if all gradients are right and an update is wrong."""
    choice: str = ""
    """The choices between nearly equal scores that differ from those of the model in fp64, in the run and in the truth."""


class Finding(Frozen):
    """Result of one probe."""

    probe: str
    passed: bool
    detail: str
    """One line: the numbers behind the verdict."""


class CudaMemory(Frozen):
    """Readings of CUDA and of PyTorch's allocators on one rank, by phase of one tracked step."""

    allocated_bytes: dict[str, int]
    """`max_memory_allocated`: live tensors and kernel scratch."""
    reserved_bytes: dict[str, int]
    """`max_memory_reserved`: memory that the caching allocator holds."""
    device_bytes: dict[str, int]
    """Memory in use on the device at the end of the phase, by all processes, as CUDA reports it."""
    pinned_bytes: int | None
    """Largest pinned host memory in use, with each block rounded as the allocator does.

    None if this PyTorch does not report it.
    """
    retries: int
    """Number of times the allocator freed its cache and retried, over the whole run."""
    allocator: dict[str, str]
    """Settings of the allocator, as it reports them."""


class RankMemory(Frozen):
    """Bytes of live tensors of one rank over one tracked step."""

    peak_bytes: int
    """Largest sum of live storages on the compute device.

    On CUDA devices it includes kernel scratch, because PyTorch's allocator counts both.
    """
    host_peak_bytes: int
    """Largest sum of live storages that hold offloaded data."""
    phase_peak_bytes: dict[str, int]
    """`peak_bytes` by phase: forward, backward, update."""
    resting_bytes: int
    """Live bytes on the compute device after the step: parameters, optimizer states, buffers of the engine."""
    rss_bytes: int
    """Largest resident set of the process, from the operating system."""
    attention: list[str] = []
    """Operators of core attention that ran in forward and backward, whatever the configuration asked for."""
    cuda: CudaMemory | None = None
    """In world `cuda` only."""


class Readings(Frozen):
    """Raw readings in SI base units; outer lists run over timed steps, inner ones over ranks. All are finite."""

    model_config = ConfigDict(allow_inf_nan=False)

    step_s: list[list[float]]
    """Wall time of each timed step on each rank."""
    seqlens: list[int] = []
    """Tokens of a sequence of each timed step, over all ranks. Empty in old records."""
    loss: list[float]
    """Global mean loss of every step, warm-up included."""
    grad_norm: list[float]
    """Global gradient norm of every step, before clipping."""
    memory: list[RankMemory]
    """Per rank, from the tracked step."""
    evidence: list[dict[str, int]]
    """Per rank, of the tracked step: counters by their names in `alst_impl.placement.COUNTERS`."""
    cosine: list[float] = []
    """Cosine between the whole gradient of each step and the stock model's at the same weights.

    Empty unless the cell asks for it. The tracked step is not included.
    """
    gate: Gate | None
    """The gradient comparison, if the cell asks for one."""
    num_parameters: int | None = None
    """Parameters of the model; tied ones count once. None in old records."""
    num_expert_parameters: int = 0
    """Those of routed experts. 0 in old records."""
    devices: list[DeviceReadings] = []
    """NVML readings of every device, in world `cuda` only."""


class Provenance(Frozen):
    """Where a record comes from."""

    commit: str | None
    """Git commit of the code; None outside a checkout."""
    dirty: bool | None
    """Whether the checkout had uncommitted changes or untracked code."""
    device: str
    """Name of the processor or accelerator, as it reports it."""
    cores: int
    """Processor cores available."""
    python: str
    """Interpreter version."""
    versions: dict[str, str]
    """Versions of the libraries that affect a result."""
    utc: str
    """When the run ended, ISO 8601."""
    wall_s: float
    """Wall time of the whole cell, in seconds."""
    code: str | None = None
    """Fingerprint of the code that trained and compared."""
    driver: str | None = None
    """Driver version of the accelerator."""
    nodes: int = 1
    """Number of machines."""


class Measurement(Frozen):
    """One record: a cell, its outcome, its readings."""

    schema_version: Literal[1] = 1
    """Version of this file format."""
    cell: Cell
    outcome: Outcome
    detail: str | None = None
    """One line: the error, the signal, the step it came at."""
    readings: Readings | None
    """None if nothing could be read."""
    simulated: Simulated | None = None
    """Forecast of a cell: beside readings in world `phantom`, instead of readings in world `schedule`."""
    provenance: Provenance


def settled(m: Measurement) -> Measurement:
    """`m` with outcome `does_not_fit` if its predicted step needs more memory than the machine has.

    The predicted bytes decide this outcome, not the outcome stored in the file.
    """
    excess = m.simulated and _excess(m.simulated)
    if m.outcome is not Outcome.OK or not excess:
        return m
    return m.model_copy(update={"outcome": Outcome.DOES_NOT_FIT, "detail": excess})


def _excess(simulated: Simulated) -> str | None:
    """The limit that a predicted step exceeds, in words; None if it fits."""
    p = simulated.prediction
    if p is None or p.fits:
        return None
    size = {
        "gpu_memory": p.total_bytes,
        "heads": p.total_bytes,
        "host_memory": p.host_bytes,
    }.get(p.limit)
    return LIMITS[p.limit] if size is None else f"{LIMITS[p.limit]}: {bytes_text(size)}"


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new file, never a part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write(path: Path, measurement: Measurement) -> None:
    """Write one record atomically."""
    write_text(path, measurement.model_dump_json(indent=1) + "\n")


def read(path: Path) -> Measurement:
    """Read one record and settle its outcome. Raises `ValueError` naming the file if it is not a record."""
    try:
        return settled(Measurement.model_validate_json(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path} is not a record: {error.strerror}; remove it") from None
    except ValidationError as error:
        raise ValueError(explain(error, f"{path} is not a record", [])) from None
