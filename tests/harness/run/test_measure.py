"""Cells to records, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.cells.cell import Cell, make_cell
from harness.cells.experiment import load_experiment
from harness.commands import run as commands
from harness.processes.client import submit
from harness.processes.jobs import Ending, Rank
from harness.processes.server import last_words
from harness.records import record
from harness.records.readings import Device, DeviceReadings
from harness.records.record import Measurement, Outcome
from harness.run.measure import RETRIED, measure, measure_to
from harness.run.outcomes import classify, measurement
from harness.run.ranks import Ran

TINY: dict[str, Any] = {
    "model": "tiny-llama",
    "engine": "plain",
    "world_size": 2,
    "seqlen": 64,
    "gate": False,
    "timed": False,
    "warmup": 0,
    "steps": 2,
    "timeout_s": 100,
}
YAML = f"""
question: Which?
source: here
base: {json.dumps(TINY)}
sweeps:
  - axes:
      method: [baseline, {{name: alst, sp: 2}}]
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment of two cells."""
    path = tmp_path / "two.yaml"
    path.write_text(YAML)
    return path


def cell_of(**changes: Any) -> Cell:
    """A cell of two ranks."""
    return make_cell({**TINY, "method": {"name": "alst", "sp": 2}, **changes})


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["alst", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int | None)
    return left.value.code or 0


def test_cell_is_measured(tmp_path: Path) -> None:
    """A cell yields readings of every step and rank, and a gradient comparison."""
    measured = measure(cell_of(gate=True, warmup=1), tmp_path)
    assert measured.outcome is Outcome.OK, measured.detail
    readings = measured.readings
    assert readings is not None
    assert [len(ranks) for ranks in readings.step_s] == [2, 2]
    assert len(readings.loss) == len(readings.grad_norm) == 5  # compared, warm-up, 2 timed, tracked
    assert [memory.peak_bytes > memory.resting_bytes > 0 for memory in readings.memory] == [
        True
    ] * 2
    assert {"forward", "backward", "update"} <= readings.memory[0].phase_peak_bytes.keys()
    assert readings.memory[0].host_peak_bytes > 0
    assert readings.evidence[0]["exchanges"] > 0
    assert readings.num_parameters == 918_144
    assert any(name.endswith("_backward") for name in readings.memory[0].attention)
    assert readings.gate is not None
    assert readings.gate.passed


def test_same_cell_has_the_same_losses(tmp_path: Path) -> None:
    """A run is deterministic to the bit."""
    first, second = (measure(cell_of(), tmp_path).readings for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)


def test_killed_worker_leaves_a_record_and_the_sweep_goes_on(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of one worker makes its cell `killed`, ends its peers, and spares the other cell."""
    pids: list[int] = []

    class Killer(commands.CellLine):
        """Kills rank 1 of the first cell as it takes its first step."""

        def hear(self, event: dict[str, Any]) -> None:
            if event["event"] == "started":
                pids.extend(event["pids"])
            elif event["doing"] == "step 1/2" and len(pids) == 2:
                os.kill(pids[1], signal.SIGKILL)
                pids.append(0)

    monkeypatch.setattr(commands, "CellLine", Killer)
    results = tmp_path / "results"
    assert command(monkeypatch, "run", str(experiment), "--results", str(results)) == 0
    records = {r.cell.train.method.name: r for r in records_in(results)}
    assert records["baseline"].outcome is Outcome.KILLED
    detail = records["baseline"].detail or ""
    # Rank 0 is the one that was at its first step; the other may be a message behind.
    assert detail.startswith("rank 1 during ")
    assert detail.endswith(": SIGKILL")
    assert records["alst"].outcome is Outcome.OK
    assert not [pid for pid in pids if pid and Path(f"/proc/{pid}").exists()]


def records_in(results: Path) -> list[Measurement]:
    """All records of a folder."""
    return [record.read(path) for path in sorted(results.rglob("cells/*/*.json"))]


def test_second_run_measures_only_what_was_killed(tmp_path: Path) -> None:
    """A record with a final outcome is kept; `killed` says nothing of the cell and is measured again."""
    path, cell = tmp_path / "record.json", cell_of()
    measured, fresh = measure_to(path, cell, tmp_path, force=False)
    assert fresh
    assert measure_to(path, cell, tmp_path, force=False) == (measured, False)
    assert measure_to(path, cell, tmp_path, force=True)[1]
    record.write(path, measured.model_copy(update={"outcome": Outcome.KILLED}))
    assert measure_to(path, cell, tmp_path, force=False)[1]


def test_timeout_is_a_record(tmp_path: Path) -> None:
    """A cell that does not end in time is ended, and says where it was."""
    measured = measure(cell_of(timeout_s=1, steps=500), tmp_path)
    assert measured.outcome is Outcome.TIMEOUT
    assert "did not end in time" in str(measured.detail)


def test_what_transformers_cannot_build_is_a_record(tmp_path: Path) -> None:
    """It is refused in one line, with the model and the value."""
    measured = measure(cell_of(overrides={"hidden_act": "no-such"}), tmp_path)
    assert measured.outcome is Outcome.REFUSED
    assert "no-such" in str(measured.detail)
    assert "tiny-llama" in str(measured.detail)
    assert "\n" not in str(measured.detail)


def test_diverging_run_is_a_record(tmp_path: Path) -> None:
    """A loss that is not finite ends the run as such."""
    measured = measure(cell_of(optimizer={"learning_rate": 1e30}, steps=5), tmp_path)
    assert measured.outcome is Outcome.NAN_LOSS
    assert "step" in str(measured.detail)


def use_too_much(rank: Rank, payload: dict[str, Any]) -> None:
    """Ask for memory that no machine has."""
    import torch

    if rank.index == 1:
        torch.empty(2**60)


def hang_together(rank: Rank, payload: dict[str, Any]) -> None:
    """Rank 0 waits for a collective that rank 1 never joins."""
    import datetime as dt
    import time

    import torch.distributed as dist

    store = dist.FileStore(str(rank.scratch / "store"), rank.world_size)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank.index,
        world_size=rank.world_size,
        timeout=dt.timedelta(seconds=1),
    )
    if rank.index == 1:
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize(
    ("function", "outcome"),
    [(use_too_much, Outcome.HOST_OOM), (hang_together, Outcome.COMM_TIMEOUT)],
)
def test_real_failures_are_told_apart(function: Any, outcome: Outcome) -> None:
    """The words of torch's allocator and of gloo lead to their outcomes."""
    ending = submit(f"{function.__module__}:{function.__name__}", {}, 2, 30)
    assert classify(ending)[0] is outcome, ending


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (Ending(how="finished"), Outcome.OK),
        (Ending(how="signal", rank=0, error="SIGKILL", out_of_memory=True), Outcome.HOST_OOM),
        (Ending(how="signal", rank=0, error="SIGKILL"), Outcome.KILLED),
        (Ending(how="signal", rank=0, error="SIGTERM"), Outcome.KILLED),
        (Ending(how="signal", rank=0, error="SIGSEGV"), Outcome.ILLEGAL_ACCESS),
        (Ending(how="signal", rank=0, error="SIGABRT"), Outcome.SETUP_ERROR),
        (Ending(how="signal", rank=0, error="SIGABRT", message="std::bad_alloc"), Outcome.HOST_OOM),
        (Ending(how="error", rank=0, error="MemoryError"), Outcome.HOST_OOM),
        (Ending(how="error", rank=0, error="NanLoss"), Outcome.NAN_LOSS),
        (Ending(how="error", rank=0, error="KeyboardInterrupt"), Outcome.KILLED),
        (Ending(how="error", rank=0, error="OSError", message=os.strerror(28)), Outcome.KILLED),
        (Ending(how="error", rank=0, error="Unable", message="no bfloat16"), Outcome.REFUSED),
        (Ending(how="lost"), Outcome.KILLED),
        (Ending(how="lost", error="ImportError"), Outcome.SETUP_ERROR),
    ],
)
def test_ending_has_one_outcome(ending: Ending, outcome: Outcome) -> None:
    """Every way to end is one of the closed set."""
    assert classify(ending)[0] is outcome


WATCHDOG = (
    "what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with "
    "exception: "
)


@pytest.mark.parametrize(
    ("error", "message", "trace", "outcome"),
    [
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 32.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
            "which 4.75 GiB is free.",
            "",
            Outcome.GPU_OOM,
        ),
        # Reserving pinned memory may come to mind in a trace of the allocator's own error, too.
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate",
            "_new_piece",
            Outcome.GPU_OOM,
        ),
        ("AcceleratorError", "CUDA error: out of memory", "in _step", Outcome.GPU_OOM),
        ("AcceleratorError", "CUDA error: out of memory", "in _new_piece", Outcome.HOST_OOM),
        (
            "RuntimeError",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "",
            Outcome.GPU_OOM,
        ),
        (
            "DistBackendError",
            "NCCL error in: ../NCCLUtils.cpp:77, unhandled cuda error",
            "Cuda failure 2 'out of memory'",
            Outcome.GPU_OOM,
        ),
        (
            "AcceleratorError",
            "CUDA error: an illegal memory access was encountered",
            "",
            Outcome.ILLEGAL_ACCESS,
        ),
        (
            "RuntimeError",
            "Triton Error [CUDA]: an illegal memory access was",
            "",
            Outcome.ILLEGAL_ACCESS,
        ),
        (
            "AcceleratorError",
            "CUDA error: device-side assert triggered",
            "",
            Outcome.ILLEGAL_ACCESS,
        ),
        ("RuntimeError", "No available kernel. Aborting execution.", "", Outcome.SETUP_ERROR),
        ("RuntimeError", "the cell asks for expandable_segments True", "", Outcome.SETUP_ERROR),
    ],
)
def test_words_of_cuda_have_one_outcome(
    error: str, message: str, trace: str, outcome: Outcome
) -> None:
    """Memory of the device, memory of the host and an illegal access are told apart."""
    ending = Ending(how="error", rank=0, error=error, message=message, trace=trace)
    assert classify(ending)[0] is outcome


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        (
            WATCHDOG + "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, "
            "OpType=ALLTOALL_BASE, Timeout(ms)=300000) ran for 300006 milliseconds before timing out.",
            Outcome.COMM_TIMEOUT,
        ),
        (
            WATCHDOG + "CUDA error: an illegal memory access was encountered",
            Outcome.ILLEGAL_ACCESS,
        ),
        (WATCHDOG + "CUDA error: unknown error", Outcome.SETUP_ERROR),
    ],
)
def test_a_watchdog_that_ends_a_rank_says_why(words: str, outcome: Outcome) -> None:
    """NCCL's watchdog aborts the process; what it wrote before its stack trace tells the outcome."""
    log = f"warming up\nterminate called after throwing an instance of 'c10::DistBackendError'\n  {words}\n"
    log += "Exception raised from checkTimeout at ProcessGroupNCCL.cpp:632:\nframe #7: clone + 0x44\n\n"
    said = last_words(log)
    assert said == words
    ending = Ending(how="signal", rank=1, error="SIGABRT", message=said)
    assert classify(ending)[0] is outcome


def test_a_stranger_on_the_device_is_no_result_of_the_cell() -> None:
    """Whatever was read beside somebody else says nothing, and is measured again."""
    whole = Device(index=0, uuid="GPU-0", name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30)
    readings = DeviceReadings(
        device=whole, before_bytes=0, sections=[], strangers=["process 99 during the run"]
    )
    oom = Ending(how="error", rank=0, error="OutOfMemoryError", message="CUDA out of memory")
    ran = Ran(ending=oom, devices=[readings], driver="580.1", nodes=2)
    found = measurement(cell_of(), ran, 1.0)
    assert (found.outcome, found.detail) == (Outcome.FOREIGN_PROCESS, "process 99 during the run")
    assert found.outcome in RETRIED
    assert found.provenance.device == whole.name
    assert (found.provenance.driver, found.provenance.nodes) == ("580.1", 2)


def test_cell_command_writes_one_record(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alst cell` writes results/cells/EXPERIMENT/KEY.json and nothing for other cells."""
    key = next(iter(load_experiment(experiment).cells()))
    arguments = ["cell", str(experiment), key, "--results", str(tmp_path / "results")]
    assert command(monkeypatch, *arguments) == 0
    assert [r.cell.key for r in records_in(tmp_path / "results")] == [key]


def test_cells_command_lists_keys(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`alst cells` prints a key a line."""
    assert command(monkeypatch, "cells", str(experiment)) == 0
    assert capsys.readouterr().out.split() == list(load_experiment(experiment).cells())


@pytest.mark.parametrize("arguments", [["run", "no-such.yaml"], ["cell", "{yaml}", "no-such-key"]])
def test_user_errors_are_one_line(
    arguments: list[str],
    experiment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a user wrote wrong is one line on stderr and exit code 2, without a traceback."""
    filled = [argument.format(yaml=experiment) for argument in arguments]
    assert command(monkeypatch, *filled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such" in line
