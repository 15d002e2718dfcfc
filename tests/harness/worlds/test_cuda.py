"""World `cuda` as far as it can be seen without a device."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.cell import make_cell
from harness.worlds.cuda import (
    HostBytes,
    Meter,
    OperatorNames,
    Phases,
    ScratchProbe,
    require_settings,
)

ROOT = Path(__file__).parents[3]
MAY_NAME_CUDA = {"alst_impl/ops/offload.py", "harness/worlds/cuda.py"}
CELL = {"model": "tiny-llama", "method": "alst", "seqlen": 64, "world": "cuda"}


class FakeMeter(Meter):
    """An allocator whose counters a test moves."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = self.peak = self.reserved = 0
        self.waits = 0

    def hold(self, nbytes: int) -> None:
        """Ask for memory, or give it back."""
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


def test_each_phase_has_its_own_peak() -> None:
    """A peak belongs to the phase it came in, and what comes again keeps the larger one."""
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
    assert meter.waits == 6  # a phase ends when the device is done with it


def test_offloaded_bytes_leave_with_their_tensors() -> None:
    """The peak is of what lives at once."""
    held = HostBytes()
    first, second = torch.empty(100), torch.empty(200)
    held.add(first)
    held.add(second)
    del first
    gc.collect()
    held.add(torch.empty(25))
    gc.collect()
    assert (held.live, held.peak) == (800, 1200)


def test_scratch_is_what_an_operator_held_beside_what_it_left() -> None:
    """Of each operator the largest call; outputs that stay are not scratch."""
    meter = FakeMeter()
    library = torch.library.Library("scratchtest", "DEF")
    library.define("busy(Tensor x, int scratch) -> Tensor")

    def busy(x: torch.Tensor, scratch: int) -> torch.Tensor:
        meter.hold(scratch)
        meter.hold(-scratch)
        meter.hold(64)  # the output
        return x.clone()

    library.impl("busy", busy, "CPU")
    probe = ScratchProbe(meter)
    with probe:
        x = torch.ones(2)
        torch.ops.scratchtest.busy(x, 300)
        torch.ops.scratchtest.busy(x, 1000)
    # The output comes after the scratch is gone, so it takes the place of some of it.
    assert probe.largest["scratchtest::busy", False] == 936
    assert probe.largest["aten::ones", False] == 0


def test_operators_are_seen_in_backward_too() -> None:
    """The kernel that ran is on record, whatever was asked for."""
    names = OperatorNames()
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    with names:
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        out.sum().backward()
    assert any("attention" in name and name.endswith("_backward") for name in names.names)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"expandable_segments": "False"}, True),
        ({"expandable_segments": "True"}, False),
        ({}, False),  # an allocator that does not say
    ],
)
def test_an_allocator_that_is_set_otherwise_is_refused(said: dict[str, str], refused: bool) -> None:
    """A setting that came too late, or from somebody else's environment, is no record."""
    cell = make_cell(CELL)
    assert cell.expandable_segments
    if refused:
        with pytest.raises(RuntimeError, match="asks for expandable_segments True"):
            require_settings(said, cell)
    else:
        require_settings(said, cell)


def test_only_two_files_name_cuda() -> None:
    """Streams and counters of a device have their place; everything else takes a device."""
    found = {
        str(path.relative_to(ROOT))
        for package in ("alst_impl", "harness")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\btorch\.cuda\b(?! `|`)", code_of(path))
    }
    assert found == MAY_NAME_CUDA


def code_of(path: Path) -> str:
    """A file without its docstrings."""
    return re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())


def test_what_a_server_imports_touches_no_device() -> None:
    """CUDA that an import has initialised is lost to every rank that is forked; and a rank sees it well."""
    program = (
        "import harness.preload, harness.worlds.base\n"
        "from harness.worlds.cuda import require_forkable\n"
        "require_forkable()\n"
        "import os, torch\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    os._exit(torch.cuda._is_in_bad_fork())\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])\n"
    )
    from harness.client import server_environment

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
    """The server then says so instead of forking ranks that fail."""
    from harness.worlds.cuda import require_forkable

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="initialised CUDA"):
        require_forkable()
