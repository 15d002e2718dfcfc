"""What a device holds beyond live tensors: how it is measured, and how the simulator reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from samples import PROVENANCE

from harness import calibration, paths
from harness.calibrate import Bench, Shapes, attentions, offloads, stages, token_wise
from harness.calibration import Calibration, Scratch, Stage, backward_scratch, outside_bytes
from harness.scratch import cuda_scratch
from harness.worlds.cuda import Meter

GIB = 2**30
LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}
TINY = Shapes(
    tokens=[16, 32],
    heads=[(4, 2)],
    head_dim=8,
    rows=8,
    hidden=16,
    intermediate=24,
    vocab=32,
    layer_tokens=[8],
    dtype="float32",
)


class StillMeter(Meter):
    """A device on which nothing is ever allocated; that of the host."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def synchronize(self) -> None: ...
    def reset_peaks(self) -> None: ...
    def empty_cache(self) -> None: ...

    def allocated(self) -> int:
        return 0

    def peak_allocated(self) -> int:
        return 7


def row(tokens: int, nbytes: int, **more: Any) -> Scratch:
    """Scratch of one length."""
    sizes = {"tokens": tokens, **LLAMA, **more}
    return Scratch(
        operator="aten::_scaled_dot_product_cudnn_attention_backward",
        part_of="sdpa_cudnn",
        backward=True,
        sizes=sizes,
        nbytes=nbytes,
    )


def found(*rows: Scratch) -> Calibration:
    """A calibration of a H100."""
    return Calibration(
        hardware="h100-80gb",
        provenance=PROVENANCE,
        stages=[
            Stage(name="context", allocated_bytes=0, reserved_bytes=0, device_bytes=GIB),
            Stage(name="nccl", allocated_bytes=0, reserved_bytes=GIB, device_bytes=3 * GIB),
        ],
        scratch=list(rows),
        timings=[],
        refused={},
    )


def test_everything_is_tried_and_refusals_are_findings() -> None:
    """On any device: scratch and time of each part; a kernel that cannot run is named, not left out."""
    bench = Bench(StillMeter(), TINY)
    for part in (token_wise, offloads, attentions):
        part(bench)
    assert {r.nbytes for r in bench.scratch} == {7}
    assert {r.part_of for r in bench.scratch} >= {"mlp", "loss", "embedding", "sdpa", "sdpa_flash"}
    timed = {t.name for t in bench.timings}
    assert {"sdpa, forward", "sdpa, backward", "4 layers, offloaded, blocking, backward"} <= timed
    refused = {name.split()[0] for name in bench.refused}
    assert refused == {"sdpa_cudnn", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
    assert any(
        r.backward and "flash_attention_for_cpu_backward" in r.operator for r in bench.scratch
    )


def test_scratch_is_a_straight_line_through_the_longest_lengths() -> None:
    """Affine in tokens, proportional to heads; other groupings and widths are other kernels."""
    calibrated = found(row(1024, 999), row(2048, 3000), row(4096, 5000), row(8192, 1, kv_heads=32))
    assert backward_scratch(calibrated, "sdpa_cudnn", {"tokens": 8192, **LLAMA}) == 9000
    eighth = {"tokens": 8192, "heads": 4, "kv_heads": 1, "head_dim": 128}
    assert backward_scratch(calibrated, "sdpa_cudnn", eighth) == 1125
    with pytest.raises(ValueError, match="has 0 lengths of attention 'sdpa_cudnn' with 8 heads"):
        backward_scratch(calibrated, "sdpa_cudnn", {**eighth, "heads": 8, "head_dim": 64})


def test_the_table_takes_a_kernel_that_was_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without a formula counts what was measured; without a measurement it is refused."""
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    with pytest.raises(ValueError, match="run `alst calibrate` on 'h100-80gb'"):
        cuda_scratch("sdpa_cudnn", "h100-80gb")
    path = calibration.committed_path("h100-80gb")
    path.parent.mkdir()
    path.write_text(found(row(1024, 1000), row(2048, 2000)).model_dump_json())
    scratch = cuda_scratch("sdpa_cudnn", "h100-80gb")
    query = torch.empty(2, 32, 4096, 128, device="meta")
    key = torch.empty(2, 8, 4096, 128, device="meta")
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert scratch(backward, (None, query, key), {}) == {"measured": 8000}


def test_what_lies_outside_the_allocator_is_read_when_all_is_in_use() -> None:
    """Context, libraries and communicators."""
    assert outside_bytes(found()) == 2 * GIB


def test_stages_come_in_the_order_of_a_run(tmp_path: Path) -> None:
    """Each adds one part of a process's set-up."""
    import torch.distributed as dist

    class Counting(StillMeter):
        def peak_reserved(self) -> int:
            return 0

        def in_use(self) -> int:
            return GIB

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        names = [stage.name for stage in stages(Counting())]
    finally:
        dist.destroy_process_group()
    assert names == ["context", "matrix product", "attention", "all_reduce", "all_to_all"]
