"""World `cuda`, tested without a device."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from training import config_of, corpus_of

from alst_impl import step
from alst_impl.placement import Placement
from harness.cells.cell import make_cell
from harness.processes.jobs import Rank
from harness.worlds.cuda import (
    Cuda,
    HostBytes,
    Meter,
    OperatorNames,
    Phases,
    ask_for_settings,
)

ROOT = Path(__file__).parents[3]
MAY_NAME_CUDA = {
    "alst_impl/ops/memory/offload.py",
    "harness/worlds/cuda.py",
    "harness/worlds/phantom.py",
}
CELL = {"model": "tiny-llama", "method": "alst", "seqlen": 64, "world": "cuda"}


class FakeMeter(Meter):
    """A fake allocator with counters that a test sets."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = self.peak = self.reserved = 0
        self.waits = 0

    def hold(self, nbytes: int) -> None:
        """Allocate memory, or free it with a negative number."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self.reserved = max(self.reserved, self.now + 100)

    def synchronize(self) -> None:
        self.waits += 1

    def reset_peaks(self) -> None:
        self.peak = self.now

    def empty_cache(self) -> None:
        self.reserved = self.now

    def allocated(self) -> int:
        return self.now

    def peak_allocated(self) -> int:
        return self.peak

    def peak_reserved(self) -> int:
        return self.reserved

    def in_use(self) -> int:
        return self.reserved + 1000

    def reset_pinned_peak(self) -> None: ...

    def peak_pinned(self) -> int | None:
        return None

    def retries(self) -> int:
        return 0

    def settings(self) -> dict[str, str]:
        return {}


def test_each_phase_has_its_own_peak() -> None:
    """A peak belongs to the phase in which it occurred. A repeated phase keeps the larger peak."""
    meter = FakeMeter()
    phases = Phases(meter)
    meter.hold(500)  # before the step: warm-up
    meter.hold(-490)
    phases.begin("forward")
    meter.hold(40)
    meter.hold(-10)
    phases.begin("backward")
    meter.hold(5)
    phases.begin("forward")  # the next micro-batch
    meter.hold(-20)
    phases.begin("backward")
    meter.hold(90)
    phases.begin("update")
    phases.begin(None)
    assert phases.allocated == {"forward": 50, "backward": 115, "update": 115}
    assert phases.reserved == {"forward": 600, "backward": 600, "update": 600}
    assert phases.device == {"forward": 1600, "backward": 1600, "update": 1600}
    assert meter.waits == 6  # each phase end waits for the device


def test_offloaded_bytes_leave_with_their_tensors() -> None:
    """The peak is of tensors that live at the same time."""
    held = HostBytes()
    first, second = torch.empty(100), torch.empty(200)
    held.add(first)
    held.add(second)
    del first
    gc.collect()
    held.add(torch.empty(25))
    gc.collect()
    assert (held.live, held.peak) == (800, 1200)


def test_operators_are_seen_in_backward_too() -> None:
    """The record has the kernel that ran, whatever was requested."""
    names = OperatorNames()
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    with names:
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        out.sum().backward()
    assert any("attention" in name and name.endswith("_backward") for name in names.names)


def test_a_compiled_function_stays_compiled_while_it_is_watched() -> None:
    """Else a compiled attention would make all scores."""
    twice = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
    with OperatorNames():
        assert twice(torch.ones(2)).tolist() == [2, 2]


class Settings(FakeMeter):
    """A fake allocator that reports `said`, and accepts settings if it `listens`."""

    def __init__(self, said: str | None, *, listens: bool) -> None:
        super().__init__()
        self.said, self.listens = said, listens
        self.told: list[str] = []

    def settings(self) -> dict[str, str]:
        return {} if self.said is None else {"expandable_segments": self.said}

    def set(self, setting: str) -> None:
        self.told.append(setting)
        if self.listens:
            self.said = setting.split(":")[1]


@pytest.mark.parametrize(
    ("said", "told"), [("True", []), ("False", ["expandable_segments:True"]), (None, [])]
)
def test_the_allocator_runs_as_the_cell_asks(said: str | None, told: list[str]) -> None:
    """The environment variable sets it, or a later call does. An allocator that reports nothing is trusted."""
    meter = Settings(said, listens=True)
    ask_for_settings(meter, make_cell(CELL))
    assert meter.told == told


def test_an_allocator_that_ignores_the_setting_is_an_error() -> None:
    """No cell is measured under a setting other than its own."""
    with pytest.raises(RuntimeError, match="asks for expandable_segments True"):
        ask_for_settings(Settings("False", listens=False), make_cell(CELL))


def track_a_step(rank: int, world_size: int, engine: str) -> Any:
    """A step of a tiny model as world `cuda` tracks it, with constant counters."""
    config = config_of(
        method={"name": "alst", "tiles": 2}, engine={"name": engine}, world_size=world_size
    )
    world = Cuda()
    meter = FakeMeter()
    meter.hold(100)
    said: list[str] = []
    world._meter, world._rank = meter, Rank(rank, world_size, Path(), said.append)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "sp"))
    placement = Placement(torch.device("cpu"), on_host=world.on_host, on_phase=world.on_phase)
    method, runtime = step.start(config, mesh, placement)
    batches = step.micro_batches(config, corpus_of(config), method, mesh, 0, placement.device)
    found = world.track(lambda: step.train_step(method, runtime, batches), runtime)
    return found.model_dump(), said


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero"])
def test_a_tracked_step_records_phases_and_kernels(ranks: Any, engine: str) -> None:
    """Under every engine, the record has bytes by phase, offloaded bytes and the kernels of both directions."""
    ((memory, said),) = ranks(1)(track_a_step, engine)
    assert said == [f"memory step, {name}" for name in ("forward", "backward", "update")]
    assert {"forward", "backward", "update"} <= memory["cuda"]["allocated_bytes"].keys()
    assert memory["peak_bytes"] == memory["resting_bytes"] == 100
    assert memory["host_peak_bytes"] > 0
    assert any(name.endswith("_backward") for name in memory["attention"])
    assert any(not name.endswith("_backward") for name in memory["attention"])


def test_only_listed_files_name_cuda() -> None:
    """Only these files use streams and counters of a device. All other code takes a device as argument."""
    found = {
        str(path.relative_to(ROOT))
        for package in ("alst_impl", "harness")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\btorch\.cuda\b(?! `|`)", code_of(path))
    }
    # Code that runs inside a program on phantom devices uses them, too.
    assert {name for name in found if not name.startswith("harness/phantom/")} == MAY_NAME_CUDA


def code_of(path: Path) -> str:
    """The source of a file without docstrings."""
    return re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())


def test_imports_of_the_server_do_not_initialise_cuda() -> None:
    """If an import initialised CUDA, forked ranks could not use it. In a rank it works."""
    program = (
        "import harness.processes.preload, harness.worlds.base\n"
        "from harness.worlds.cuda import require_forkable\n"
        "require_forkable()\n"
        "import os, torch\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    os._exit(torch.cuda._is_in_bad_fork())\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])\n"
    )
    from harness.processes.client import server_environment

    environment = {**server_environment("cuda"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_initialised_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server then reports it and forks no ranks."""
    from harness.worlds.cuda import require_forkable

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="initialised CUDA"):
        require_forkable()
