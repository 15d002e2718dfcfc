"""What a run leaves behind: raw readings, the outcome and where they come from. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells.cell import Cell
from harness.cells.prediction import LIMITS, Simulated
from harness.cells.units import bytes_text
from harness.records.readings import DeviceReadings


class Outcome(StrEnum):
    """How a cell ended. A closed set: whatever happens is one of these."""

    OK = "ok"
    DOES_NOT_FIT = "does_not_fit"
    """Predicted to its end, and more than the machine has."""
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
    """One parameter's gradient beside the truth; ratio and cosine are null where the true gradient is zero,
    or nothing but rounding.
    """

    parameter: str
    """Name in the Hugging Face model."""
    ratio: float | None
    """Norm of ours over norm of the truth."""
    cosine: float | None
    """Cosine of the angle between them."""
    norm: float | None = None
    """Of ours; None where it is not finite. This and what follows is None in records from before it was
    kept."""
    truth_norm: float | None = None
    """Of the truth."""
    error_norm: float | None = None
    """Of their difference; None where ours is not finite."""

    @property
    def noise(self) -> bool:
        """Whether the true gradient is zero, or nothing but rounding, and ours is finite."""
        return self.ratio is None and self.error_norm is not None


class Gate(Frozen):
    """Every gradient of one step against stock transformers, whole, in one process, in fp64."""

    passed: bool
    """All parameters within tolerance, and the method did what it claims."""
    loss: float
    """Ours."""
    truth_loss: float
    """The stock model's."""
    worst: ParameterGate
    """The parameter furthest beyond either bound."""
    parameters: list[ParameterGate]
    """All of them."""
    updates: list[ParameterGate] = []
    """The change of every parameter in that step beside PyTorch's own optimizer on the true gradients;
    empty where it was not compared."""
    wrong_update: ParameterGate | None = None
    """The one of them furthest beyond either bound, where gradients are right and it is not."""


class Finding(Frozen):
    """What one probe saw."""

    probe: str
    passed: bool
    detail: str
    """One line: the numbers behind the verdict."""


class RankEvidence(Frozen):
    """`alst_impl.placement.Evidence` of one rank and one step."""

    local_seqlen: int
    tiles: int
    exchanges: int
    offloaded_bytes: int
    rotations: int = 0
    slices: int = 0


class CudaMemory(Frozen):
    """What CUDA and PyTorch's allocators say of one rank, by phase of one tracked step."""

    allocated_bytes: dict[str, int]
    """`max_memory_allocated`: live tensors and kernel scratch."""
    reserved_bytes: dict[str, int]
    """`max_memory_reserved`: what the caching allocator holds."""
    device_bytes: dict[str, int]
    """In use on the device at the end of the phase, by whomever, as CUDA says."""
    pinned_bytes: int | None
    """Largest pinned host memory in use, each block rounded as the allocator does; None where this
    PyTorch does not say."""
    retries: int
    """Times that the allocator gave all cached memory back and asked again, over the whole run."""
    allocator: dict[str, str]
    """Settings of the allocator, as it says itself."""


class RankMemory(Frozen):
    """Bytes of live tensors of one rank over one tracked step."""

    peak_bytes: int
    """Largest sum of live storages on the compute device; on CUDA's devices kernel scratch is part of it,
    as PyTorch's allocator counts both."""
    host_peak_bytes: int
    """Largest sum of live storages that hold offloaded data."""
    phase_peak_bytes: dict[str, int]
    """`peak_bytes` by phase: forward, backward, update."""
    resting_bytes: int
    """Live on the compute device after the step: parameters, optimizer, what an engine keeps."""
    rss_bytes: int
    """Largest resident set of the process, from the operating system."""
    attention: list[str] = []
    """Operators of core attention that ran, backward too: what was used, whatever was asked for."""
    cuda: CudaMemory | None = None
    """In world `cuda`."""


class Readings(Frozen):
    """Raw readings in SI base units; outer lists run over timed steps, inner ones over ranks."""

    step_s: list[list[float]]
    """Wall time of each timed step on each rank."""
    loss: list[float]
    """Global mean loss of every step, warm-up included."""
    grad_norm: list[float]
    """Global gradient norm of every step, before clipping."""
    memory: list[RankMemory]
    """Per rank, from the tracked step."""
    evidence: list[RankEvidence]
    """Per rank, of the tracked step."""
    cosine: list[float] = []
    """Between the whole gradient of each step and the stock model's with the same weights, where the cell
    asked for it; the tracked step is left out."""
    gate: Gate | None
    """The gradient comparison, where the cell asked for one."""
    num_parameters: int | None = None
    """Of the model, tied ones once; None in records from before it was read."""
    devices: list[DeviceReadings] = []
    """What NVML read of every device, in world `cuda`."""


class Provenance(Frozen):
    """Where a record comes from."""

    commit: str | None
    """Git commit of the code, where it is a checkout."""
    dirty: bool | None
    """Whether the checkout had uncommitted changes, or code that git does not know."""
    device: str
    """Processor or accelerator, as it names itself."""
    cores: int
    """Processor cores available."""
    python: str
    """Interpreter version."""
    versions: dict[str, str]
    """Versions of the libraries that decide a result."""
    utc: str
    """When the run ended, ISO 8601."""
    wall_s: float
    """Wall time of the whole cell."""
    code: str | None = None
    """Fingerprint of the code that trained and compared."""
    driver: str | None = None
    """Of the accelerator."""
    nodes: int = 1
    """Machines."""


class Measurement(Frozen):
    """One record: a cell, how it ended, what was read."""

    schema_version: Literal[1] = 1
    """Of this file's format."""
    cell: Cell
    outcome: Outcome
    detail: str | None = None
    """One line: the error, the signal, the step it came at."""
    readings: Readings | None
    """None where nothing could be read."""
    simulated: Simulated | None = None
    """Of a cell in world `phantom`, beside its readings, and in world `schedule`, in place of them."""
    provenance: Provenance


def settled(m: Measurement) -> Measurement:
    """`m` with the outcome that its own numbers decide: a predicted step may be more than the machine has.

    The numbers own that fact, whatever outcome was written beside them.
    """
    excess = m.simulated and _excess(m.simulated)
    if m.outcome is not Outcome.OK or not excess:
        return m
    return m.model_copy(update={"outcome": Outcome.DOES_NOT_FIT, "detail": excess})


def _excess(simulated: Simulated) -> str | None:
    """What a predicted step has too much of, in words; None of one that fits."""
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
    """Write atomically: a reader sees the old file or the new one, never half of one."""
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
    """Read one record, `settled`. Raises `ValueError` naming the file if it is not one."""
    try:
        return settled(Measurement.model_validate_json(path.read_text()))
    except ValidationError as error:
        raise ValueError(explain(error, f"{path} is not a record", [])) from None
