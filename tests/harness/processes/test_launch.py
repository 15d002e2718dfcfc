"""Ranks started by torchrun."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from harness.cells.cell import Cell, make_cell
from harness.cells.experiment import load_experiment
from harness.processes.jobs import Ending
from harness.processes.launch import (
    Launch,
    Meeting,
    combined,
    command,
    job_fields,
    launched,
    num_nodes,
)
from harness.records import record
from harness.records.record import Outcome
from harness.run.measure import measure

ENVIRONMENT = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def cell(world_size: int, **more: Any) -> Cell:
    """A CUDA cell with `world_size` ranks."""
    return make_cell(
        {
            "model": "llama3.1-8b",
            "method": {"name": "alst", "sp": 8},
            "dtype": "bfloat16",
            "seqlen": 4096,
            "world": "cuda",
            "hardware": "h100-80gb",
            "world_size": world_size,
            **more,
        }
    )


def test_a_launch_is_read_from_torchruns_variables() -> None:
    """It has ranks, machines and the rendezvous address. Without torchrun's variables there is no launch."""
    launch = launched(ENVIRONMENT)
    assert launch is not None
    assert (launch.rank, launch.num_nodes, launch.meeting) == (9, 2, "node1:29500")
    assert job_fields(launch)["ranks"] == [9]
    assert job_fields(launch)["first_local"] == 1
    assert launched({"RANK": "0", "WORLD_SIZE": "2"}) is None
    assert job_fields(None) == {}


@pytest.mark.parametrize("lost", ["RANK", "TORCHELASTIC_USE_AGENT_STORE"])
def test_another_launcher_is_refused(lost: str) -> None:
    """The error names the missing variable."""
    with pytest.raises(ValueError, match="not torchrun: it"):
        launched({name: value for name, value in ENVIRONMENT.items() if name != lost})


@pytest.mark.parametrize(
    ("world_size", "local", "asked", "words"),
    [
        (8, 8, 16, ["runs on 16 ranks", "1 nodes x 8 ranks = 8"]),
        (
            16,
            4,
            16,
            ["8 devices per node", "4 nodes x 4 ranks", "--nnodes 2", "--nproc-per-node 8"],
        ),
    ],
)
def test_world_size_and_nodes_are_those_of_the_cell(
    world_size: int, local: int, asked: int, words: list[str]
) -> None:
    """A launch of another size is refused with the right command."""
    launch = Launch(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=local,
        address="node1",
        port=1,
    )
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        launch.check(cell(asked))
    assert all(word in str(raised.value) for word in words), str(raised.value)
    launch.model_copy(update={"world_size": 16, "local_world_size": 8}).check(cell(16))


def test_every_process_of_a_launch_gets_the_others_reports() -> None:
    """The first process decides, all processes report, and the first gets every report in order."""
    store, heard = HashStore(), {}
    of = cell(8)

    def process(rank: int) -> None:
        launch = Launch(
            rank=rank, world_size=3, local_rank=rank, local_world_size=3, address="", port=0
        )
        meeting = Meeting(launch, of, store)
        if rank == 0:
            meeting.say("kept", "")
        assert meeting.hear("kept") == ""
        meeting.say(f"ran {rank}", f"this is {rank}")
        if rank == 0:
            heard[rank] = meeting.hear_all("ran")

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert heard[0] == ["this is 0", "this is 1", "this is 2"]


def test_the_root_failure_is_reported() -> None:
    """Of all failures the root failure is returned. Without failures, the results of all ranks are, in order."""
    oom = Ending(how="error", rank=5, error="OutOfMemoryError", message="CUDA out of memory")
    lost = Ending(how="error", rank=0, error="DistBackendError", message="remote process exited")
    late = Ending(how="timeout", rank=1)
    assert combined([late, lost, oom]) == oom
    done = [Ending(how="finished", results=[rank]) for rank in range(3)]
    assert combined(done).results == [0, 1, 2]


def test_one_node_needs_no_launcher_and_several_have_one_each() -> None:
    """One process forks the ranks of a node. SLURM starts torchrun on each of several nodes."""
    assert command(cell(8), "python") == "'python' -m harness"
    words = command(cell(32), "python")
    assert num_nodes(cell(32)) == 4
    assert words.startswith("srun --nodes=4 --ntasks=4 --ntasks-per-node=1 'python' -m torch.dist")
    assert "--nnodes=4 --nproc-per-node=8 " in words
    assert words.endswith("-m harness")


EXPERIMENT = """
question: Do ranks of a launcher leave the record that forked ones leave?
source: here
base:
  {model: tiny-llama, engine: plain, world_size: 2, seqlen: 64, gate: false, timed: false, warmup: 0, steps: 2}
sweeps:
  - axes: {method: [baseline, {name: alst, sp: 2}]}
"""


def test_a_launch_writes_the_same_records_as_forked_ranks(tmp_path: Path) -> None:
    """Two processes of torchrun measure two cells, and one of them writes. A third process is refused."""
    path = tmp_path / "two.yaml"
    path.write_text(EXPERIMENT)

    def torchrun(ranks: int, results: Path) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        alst = ["-m", "harness", "run", str(path), "--results", str(results)]
        return subprocess.run(
            [*launcher, *meeting, *alst], capture_output=True, text=True, check=False, timeout=240
        )

    done = torchrun(2, tmp_path / "together")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2/2]") == 1  # one rank prints
    for cell in load_experiment(path).cells().values():
        here = record.read(tmp_path / "together" / "cells" / "two" / f"{cell.key}.json")
        assert here.outcome is Outcome.OK, here.detail
        alone = measure(cell, tmp_path)
        assert here.readings is not None
        assert alone.readings is not None
        assert here.readings.loss == alone.readings.loss
        assert len(here.readings.memory) == 2
    refused = torchrun(3, tmp_path / "three")
    assert "runs on 2 ranks, but torchrun started 1 nodes x 3 ranks" in refused.stderr
    assert not (tmp_path / "three").exists()
