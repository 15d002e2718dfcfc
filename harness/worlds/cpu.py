"""Real processes on a machine without an accelerator: gloo, real tensors, exact live bytes."""

from __future__ import annotations

import datetime as dt
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh

import harness.processes.preload  # noqa: F401  prepares DeepSpeed for a machine without an accelerator
from alst_impl.engines.base import Runtime
from alst_impl.layout import make_mesh
from alst_impl.methods.base import layouts
from harness.cells.cell import Cell
from harness.meters.tracker import Tracker
from harness.processes.jobs import Rank
from harness.records.record import RankMemory
from harness.worlds.base import World, attention_operators, rss_bytes, store_of


class Cpu(World):
    """Every rank is a process with one thread."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._tracker: Tracker | None = None

    @contextmanager
    def group(self, rank: Rank, cell: Cell) -> Iterator[DeviceMesh]:
        dist.init_process_group(
            "gloo",
            store=store_of(rank, cell),
            rank=rank.index,
            world_size=rank.world_size,
            # Shorter than the cell's own limit, so that ranks that wait for each other report it.
            timeout=dt.timedelta(seconds=cell.timeout_s / 2),
        )
        try:
            yield make_mesh(layouts(cell.train), "cpu")
        finally:
            dist.destroy_process_group()  # gloo aborts at exit without it, now and then

    def clock(self) -> float:
        return time.perf_counter()

    def track(self, step: Callable[[], object], runtime: Runtime) -> RankMemory:
        gc.collect()
        tracker = Tracker()
        tracker.adopt()
        self._tracker = tracker
        try:
            with tracker:
                step()
        finally:
            self._tracker = None
        return RankMemory(
            peak_bytes=tracker.peak_bytes,
            host_peak_bytes=tracker.host_peak_bytes,
            phase_peak_bytes=tracker.phase_peaks,
            resting_bytes=tracker.live_bytes,
            rss_bytes=rss_bytes(),
            attention=attention_operators(tracker.operators),
        )

    def on_host(self, tensor: Tensor) -> None:
        if self._tracker is not None:
            self._tracker.mark_host(tensor)

    def on_phase(self, name: str) -> None:
        if self._tracker is not None:
            self._tracker.phase(name)


def world() -> World:
    """Entry point for `harness.worlds.base.load_world`."""
    return Cpu()
