"""World `phantom`: a cell's step on the real CUDA stack, the real out-of-memory error, and unknown values."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from phantoms import NEEDED, NEEDS_TRITON, estimated

from harness.__main__ import main
from harness.cells.cell import Cell, make_cell
from harness.judge.compare import changes
from harness.judge.defects import Defect, Edit, plant
from harness.records.record import Measurement, Outcome
from harness.run.measure import measure
from tests.conftest import Ranks

pytestmark = NEEDED
ALST = {
    "model": "tiny-llama",
    "method": {"name": "alst", "sp": 2},
    "engine": "fsdp2",
    "seqlen": 4_096,
    "world_size": 2,
    "dtype": "bfloat16",
    "world": "phantom",
    "hardware": "h100-80gb",
    "simulation": {"search": False},
}


def cell(**changed: Any) -> Cell:
    return make_cell({**ALST, **changed})


@cache
def measured() -> Measurement:
    """The record of `ALST`."""
    return measure(cell(), Path("unused"))


def test_a_record_is_like_a_gpus_without_times_and_values() -> None:
    """It has bytes by phase, page-locked bytes and allocations at the peak, but no loss, time or gate."""
    m = measured()
    assert (m.outcome, m.detail) == (Outcome.OK, None)
    assert m.readings is not None
    assert m.simulated is not None
    (memory,) = m.readings.memory
    assert memory.cuda is not None
    assert {"forward", "backward", "update"} <= set(memory.cuda.allocated_bytes)
    assert memory.cuda.pinned_bytes
    assert memory.attention == ["flash"]
    assert memory.cuda.allocator["expandable_segments"] == "True"
    assert (m.readings.loss, m.readings.grad_norm, m.readings.step_s) == ([], [], [])
    (evidence,) = m.readings.evidence
    assert evidence["exchanges"]
    assert evidence["offloaded_bytes"]


def test_what_is_alive_at_the_peak_adds_up_to_the_peak() -> None:
    """The sum lacks only the rounding of each tensor to 512 bytes. File names have no folders of this machine."""
    found = measured().simulated
    assert found is not None
    held = sum(each.nbytes for each in found.holdings)
    rounding = 512 * sum(each.count for each in found.holdings)
    assert held <= found.peak_bytes <= held + rounding
    assert {"parameters", "optimizer"} <= {each.category for each in found.holdings}
    assert not [each for each in found.holdings if (each.location or "").startswith("/")]


def _bytes_at_rest(rank: int, world_size: int) -> dict[str, int]:
    """Bytes of parameters and optimizer states of one rank on a CPU, after a step."""
    import torch

    from alst_impl.layout import make_mesh
    from alst_impl.methods.base import layouts
    from alst_impl.placement import Placement
    from alst_impl.step import micro_batches, start, train_step
    from harness.gate.truths import corpus_of

    config = cell().train.model_copy(update={"seqlen": 128})
    mesh = make_mesh(layouts(config), "cpu")
    device = torch.device("cpu")
    method, runtime = start(config, mesh, Placement(device=device))
    train_step(method, runtime, micro_batches(config, corpus_of(config), method, mesh, 0, device))
    parameters = list(runtime.module.parameters())
    states = [t for p in parameters for t in runtime.optimizer.state[p].values() if t.ndim]
    return {
        "parameters": sum(p.to_local().untyped_storage().nbytes() for p in parameters),
        "optimizer": sum(t.to_local().untyped_storage().nbytes() for t in states),
    }


def test_parameters_and_optimizer_are_those_of_real_processes(ranks: Ranks) -> None:
    """They are equal to the byte, because resting bytes do not depend on the world."""
    expected = ranks(2)(_bytes_at_rest)[0]
    found = measured().simulated
    assert found is not None
    # At the peak one unit is gathered in addition to the shards, which are older than the history.
    at_rest = {
        category: sum(h.nbytes for h in found.holdings if h.category == category and not h.location)
        for category in expected
    }
    assert at_rest == expected


def test_a_copy_without_a_defect_changes_nothing(tmp_path: Path) -> None:
    """Otherwise what a planted defect changes would prove nothing."""
    copy = plant(Defect(file="__init__.py", edits=[]), tmp_path)
    after = measure(cell(), Path("unused"), sources=copy)
    assert after.outcome is Outcome.OK, after.detail
    assert not changes({"it": measured()}, {"it": after})


def test_a_leak_is_noticed_and_its_line_named(tmp_path: Path) -> None:
    """On the CUDA path: the last head exchange keeps some bytes per token alive."""
    edit = Edit(
        old="def _all_to_all(",
        new="""HELD = {}


def _all_to_all(x, *rest):
    HELD[0] = x.new_empty(16 * x.numel(), dtype=torch.uint8)
    return _exchanged(x, *rest)


def _exchanged(""",
    )
    planted = plant(Defect(file="ops/attention/ulysses.py", edits=[edit]), tmp_path)
    after = measure(cell(), Path("unused"), sources=planted)
    assert after.outcome is Outcome.OK, after.detail
    moved = changes({"it": measured()}, {"it": after})
    (peak,) = [change for change in moved if change.quantity == "peak_bytes"]
    assert peak.worse
    assert "alst_impl/ops/attention/ulysses.py" in " ".join(peak.culprits)


def test_control_flow_on_an_unknown_value_is_an_error(tmp_path: Path) -> None:
    """The error names the place."""
    edit = Edit(
        old='    """This rank\'s micro-batches of `step`, on',
        new='    assert torch.ones(1, device=device).cos().item() < 2\n    """This rank\'s micro-batches of `step`, on',
    )
    planted = plant(Defect(file="step.py", edits=[edit]), tmp_path)
    found = measure(cell(), Path("unused"), sources=planted)
    assert (found.outcome, found.simulated) == (Outcome.SETUP_ERROR, None)
    assert "a value that no device computed was read at" in (found.detail or "")
    assert "step.py" in (found.detail or "")


@NEEDS_TRITON
def test_a_compiled_attention_runs_in_a_step() -> None:
    """Under sequence parallelism and checkpointing, with sinks, in layers with and without a window. As PyTorch's
    operators do not show its work, none is counted.
    """
    found = measure(
        cell(
            model="tests/families/gpt_oss.json",
            overrides={"max_position_embeddings": 4_096},
            attention="flex",
        ),
        Path("unused"),
    )
    assert found.outcome is Outcome.OK, found.detail
    assert found.readings is not None
    assert found.readings.memory[0].attention == ["flex"]
    assert found.simulated is not None
    assert found.simulated.prediction is not None
    assert found.simulated.prediction.fits
    assert found.simulated.prediction.cost is None


def test_a_window_with_global_tokens_spares_a_ring_most_of_its_traffic() -> None:
    """Keys travel to the next rank alone, and 16 global ones to all; PyTorch's flash kernel computes fewer pairs."""
    pattern = {"name": "window", "window": 256, "global_tokens": 16}
    full, windowed = (
        found.cost
        for found in estimated(
            *(
                cell(
                    method={"name": "ring", "cp": 8, "placement": "contiguous"},
                    attention={"name": "sdpa", **options},
                    world_size=8,
                    seqlen=65_536,
                    engine="plain",
                )
                for options in ({}, {"pattern": pattern})
            )
        )
    )
    assert full is not None
    assert windowed is not None
    assert 0 < windowed.link_bytes < 0.3 * full.link_bytes
    assert 0 < windowed.attention_flops < 0.1 * full.attention_flops


def test_the_longest_sequence_ends_at_the_allocators_out_of_memory() -> None:
    """The longest and the shortest failing length are close, and the limit is the device's memory."""
    found = measure(
        cell(
            model="llama3.1-8b",
            overrides={"num_hidden_layers": 1},
            method="baseline",
            engine="plain",
            seqlen=30_000,
            world_size=1,
            simulation={"search": True},
        ),
        Path("unused"),
    )
    assert found.simulated is not None, found.detail
    search = found.simulated.search
    assert search is not None
    assert search.limit == "gpu_memory"
    assert 0 < search.shortest_failing_tokens / search.longest_tokens - 1 < 0.016
    # Logits in fp32, their copy and their gradients take 128,256 x 4 bytes each.
    assert 30_000 < search.longest_tokens < 79 * 2**30 / (3 * 4 * 128_256)


def test_offloaded_parameters_leave_the_device_for_host_memory() -> None:
    """Shards, gradients and states take eight bytes per parameter on the host in bf16, and rest on the host only."""
    found = measure(cell(engine={"name": "fsdp2", "offload": True}), Path("unused"))
    assert found.readings is not None, found.detail
    assert found.simulated is not None
    before, after = measured().readings, found.readings
    assert before is not None
    assert before.num_parameters is not None
    shard = 2 * before.num_parameters // 2
    saved = before.memory[0].resting_bytes - after.memory[0].resting_bytes
    assert saved >= 3 * shard
    prediction = found.simulated.prediction
    assert prediction is not None
    assert prediction.host_bytes >= 2 * 4 * shard


def answered(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code and output of `alst`."""
    monkeypatch.setattr(sys, "argv", ["alst", *arguments.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_predict_answers_from_a_phantom_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shows allocated, reserved and total bytes, and the allocations at the peak if requested."""
    command = "predict tiny-llama --seqlen 4_096 --gpus 2 --states gpu --explain --json"
    code, out, _ = answered(command, monkeypatch, capsys)
    found = json.loads(out)
    assert (code, found["fits"]) == (0, True)
    assert found["allocated_bytes"] <= found["reserved_bytes"] < found["total_bytes"]
    assert found["alive_at_peak"]
    assert found["cost"]["matmul_flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--seqlen 999_999_999_999", ["999,999,999,999", "does not fit", "shorter"]),
        ("--seqlen 64 --hardware cpu", ["'cpu'", "h100-80gb"]),
        ("--seqlen 64 --method deepspeed_alst --option liger=true", ["liger", "tile_loss: false"]),
    ],
)
def test_cells_that_a_phantom_device_cannot_run_are_refused(
    arguments: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is one line with the value and a fix."""
    command = f"predict tiny-llama --gpus 2 {arguments}"
    code, out, err = answered(command, monkeypatch, capsys)
    (line,) = [line for line in err.splitlines() if " ..." not in line]
    assert (code, out) == (2, "")
    assert all(word in line for word in words)
