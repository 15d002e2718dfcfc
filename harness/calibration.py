"""What a device was measured to hold beyond live tensors: kernel scratch, contexts, workspaces. Imports no torch.

`harness.calibrate` makes one on a GPU. The committed one of a hardware row gives scratch to kernels whose
sources the table of `harness.scratch` does not have.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness import paths
from harness.record import Provenance


class Stage(Frozen):
    """Memory after one more part of a process's set-up was used for the first time."""

    name: str
    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    """In use on the device, by whomever."""


class Scratch(Frozen):
    """What an operator held at its peak beside its inputs and outputs, alone on the device."""

    operator: str
    """As PyTorch names it."""
    part_of: str
    """What was run: an attention of `alst_impl.ops.attention.BACKENDS`, or a part of a model."""
    backward: bool
    """Whether it ran in backward."""
    sizes: dict[str, int]
    """What was asked for: tokens, heads, kv_heads, head_dim, and so on."""
    nbytes: int


class Timing(Frozen):
    """Seconds of something alone on the device, the median over runs."""

    name: str
    sizes: dict[str, int]
    seconds: float


class Calibration(Frozen):
    """Everything that one device was asked."""

    hardware: str
    """Row of `harness.hardware`."""
    provenance: Provenance
    stages: list[Stage]
    scratch: list[Scratch]
    timings: list[Timing]
    refused: dict[str, str]
    """What could not be run -> why."""


def fresh_path(hardware: str, results: Path = paths.RESULTS) -> Path:
    """Where a calibration is written."""
    return results / "calibration" / f"{Path(hardware).stem}.json"


def committed_path(hardware: str) -> Path:
    """Where the committed one of a hardware row lies."""
    return paths.REFERENCE / Path(hardware).stem / paths.CALIBRATION


def read(path: Path) -> Calibration:
    """Raises `ValueError` naming the file if it is not one."""
    try:
        return Calibration.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(explain(error, f"{path} is not a calibration", [])) from None


def outside_bytes(found: Calibration) -> int:
    """On the device and not in PyTorch's allocator, once everything of `stages` is in use."""
    last = found.stages[-1]
    return last.device_bytes - last.reserved_bytes


def backward_scratch(found: Calibration, attention: str, sizes: dict[str, int]) -> int:
    """Scratch of `attention` in backward at `sizes` (tokens, heads, kv_heads, head_dim).

    Bytes are affine in tokens and proportional to heads: the line through the two longest sequences
    that were measured with as many query heads per kv head and the same head_dim. Raises `ValueError`
    where there are fewer.
    """
    points: dict[int, float] = {}
    for row in found.scratch:
        of = row.sizes
        same = row.part_of == attention and row.backward and of["head_dim"] == sizes["head_dim"]
        if same and of["heads"] * sizes["kv_heads"] == sizes["heads"] * of["kv_heads"]:
            nbytes = row.nbytes * sizes["heads"] / of["heads"]
            points[of["tokens"]] = max(nbytes, points.get(of["tokens"], 0))
    if len(points) < 2:
        raise ValueError(
            f"the calibration of '{found.hardware}' has {len(points)} lengths of attention '{attention}' with "
            f"{sizes['heads']} heads, {sizes['kv_heads']} kv heads of {sizes['head_dim']}, and two are needed; "
            "run `alst calibrate` there"
        )
    (near, less), (far, more) = sorted(points.items())[-2:]
    slope = (more - less) / (far - near)
    return max(int(more + slope * (sizes["tokens"] - far)), 0)
