"""Real processes on NVIDIA GPUs: NCCL, one device per rank, memory from PyTorch's allocators.

In the training step only this module, world `phantom` and `alst_impl.ops.memory.offload` use
`torch.cuda`. The fork server imports this module, and a process with CUDA initialised cannot fork
ranks that use it. So importing it does not initialise CUDA.
"""

from __future__ import annotations

import datetime as dt
import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from alst_impl.engines.base import Runtime, load_engine
from alst_impl.layout import make_mesh
from alst_impl.methods.base import layouts
from alst_impl.models.weights import Initializer
from harness.cells.cell import Cell
from harness.processes.jobs import Rank
from harness.records.record import CudaMemory, RankMemory
from harness.worlds.base import World, attention_operators, rss_bytes, store_of


def require_forkable() -> None:
    """Raise `RuntimeError` if CUDA is initialised in this process, because forked ranks could not use it."""
    if torch.cuda.is_initialized():
        raise RuntimeError("an import has initialised CUDA, so that forked ranks cannot use it")


class Meter:
    """Memory counters of one device. The allocator counts when work is issued, so reading them does
    not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        torch.cuda.synchronize(self.device)

    def reset_peaks(self) -> None:
        """Reset peaks to the current values."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def reset_pinned_peak(self) -> None:
        """Reset the peak of pinned host memory."""
        torch.cuda.reset_peak_host_memory_stats()

    def empty_cache(self) -> None:
        """Release memory that is reserved but not allocated."""
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes allocated now."""
        return torch.cuda.memory_allocated(self.device)

    def peak_allocated(self) -> int:
        """Peak of allocated bytes since the last reset."""
        return torch.cuda.max_memory_allocated(self.device)

    def peak_reserved(self) -> int:
        """Peak of reserved bytes since the last reset."""
        return torch.cuda.max_memory_reserved(self.device)

    def in_use(self) -> int:
        """Bytes of the device in use by all processes."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def peak_pinned(self) -> int | None:
        """Peak of allocated pinned host bytes since the last reset of that peak; None if PyTorch
        does not report it.
        """
        found: int | None = torch.cuda.host_memory_stats().get("active_bytes.peak")
        return found

    def changes(self) -> int:
        """Number of allocations and frees so far."""
        stats = torch.cuda.memory_stats(self.device)
        return sum(stats.get(f"allocation.all.{kind}", 0) for kind in ("allocated", "freed"))

    def retries(self) -> int:
        """Number of times that the cache was emptied to satisfy an allocation."""
        found: int = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        return found

    def set(self, setting: str) -> None:
        """Change a setting of the allocator, before anything is allocated."""
        torch._C._accelerator_setAllocatorSettings(setting)

    def settings(self) -> dict[str, str]:
        """Settings that the allocator reports."""
        found = torch.cuda.memory._snapshot().get("allocator_settings", {})
        return {name: str(value) for name, value in found.items()}


class Phases:
    """Memory peaks of a step by phase. A phase that occurs again keeps the larger peak."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._name: str | None = None
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.device: dict[str, int] = {}

    def begin(self, name: str | None) -> None:
        """End the current phase and begin phase `name`; None begins none."""
        self._meter.synchronize()
        if self._name is not None:
            self._note(self.allocated, self._meter.peak_allocated())
            self._note(self.reserved, self._meter.peak_reserved())
            self._note(self.device, self._meter.in_use())
        self._meter.reset_peaks()
        self._name = name

    def _note(self, peaks: dict[str, int], nbytes: int) -> None:
        assert self._name is not None
        peaks[self._name] = max(nbytes, peaks.get(self._name, 0))


class HostBytes:
    """Bytes of live tensors with offloaded data, and their peak. Counts requested sizes."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` while it lives."""
        storage = tensor.untyped_storage()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage.nbytes()).atexit = False

    def _drop(self, nbytes: int) -> None:
        self.live -= nbytes


class OperatorNames(TorchDispatchMode):
    """Records the names of all operators that run. What PyTorch has compiled runs without them."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.names: set[str] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without it, PyTorch compiles nothing while it is watched."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class DrawnOnDevice(Initializer):
    """Weights drawn on the device. Takes a tenth of the time, but the values differ from those that
    all worlds share.
    """

    def values(self, model: PreTrainedModel, path: str, module: nn.Module) -> dict[str, Tensor]:
        """As the base class, on the current device."""
        if self.weights is not None:
            return super().values(model, path, module)
        with torch.device("cuda", torch.cuda.current_device()):
            return super().values(model, path, module)


class Cuda(World):
    """Every rank is a process with one device."""

    def __init__(self) -> None:
        self._phases: Phases | None = None
        self._host = HostBytes()

    @contextmanager
    def group(self, rank: Rank, cell: Cell) -> Iterator[DeviceMesh]:
        self._rank = rank
        self.device = torch.device("cuda", rank.local)
        torch.cuda.set_device(self.device)
        torch.cuda.init()
        self._meter = Meter(self.device)
        ask_for_settings(self._meter, cell)
        # This process updates optimizer states in host memory.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // here, 1))
        # Tensors in host memory are reduced there.
        host_too = load_engine(cell.train.engine).updates_on_host
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if host_too else "nccl",
            store=store_of(rank, cell),
            rank=rank.index,
            world_size=rank.world_size,
            # Shorter than the cell's own limit, so that ranks that wait for each other report it.
            timeout=dt.timedelta(seconds=cell.timeout_s / 2),
            device_id=self.device,
        )
        yield make_mesh(layouts(cell.train), "cuda")
        # Skipped after a failure: waiting peers would never answer, and the process ends anyway.
        dist.destroy_process_group()

    def initializer(self, cell: Cell) -> Initializer | None:
        if cell.gate:
            return None  # the truth starts from the weights that all worlds share
        return DrawnOnDevice(cell.train.seed, weights_of(cell))

    def stand(self, runtime: Runtime) -> None:
        gc.collect()
        self._meter.empty_cache()

    def clock(self) -> float:
        # Events of one stream would miss copies on another stream and a host optimizer.
        self._meter.synchronize()
        return time.perf_counter()

    def track(self, step: Callable[[], object], runtime: Runtime) -> RankMemory:
        gc.collect()
        meter = self._meter
        meter.reset_pinned_peak()
        self._host.peak = self._host.live
        self._phases = phases = Phases(meter)
        phases.begin("setup")
        try:
            with self.watching() as attention:
                step()
            phases.begin(None)
        finally:
            self._phases = None
        return RankMemory(
            peak_bytes=max(phases.allocated.values()),
            host_peak_bytes=self._host.peak,
            phase_peak_bytes=phases.allocated,
            resting_bytes=meter.allocated(),
            rss_bytes=rss_bytes(),
            attention=attention(),
            cuda=CudaMemory(
                allocated_bytes=phases.allocated,
                reserved_bytes=phases.reserved,
                device_bytes=phases.device,
                pinned_bytes=meter.peak_pinned(),
                retries=meter.retries(),
                allocator=meter.settings(),
            ),
        )

    @contextmanager
    def watching(self) -> Iterator[Callable[[], list[str]]]:
        """Watch a running step. Yields a function that returns the core attention operators that ran."""
        names = OperatorNames()
        with names:
            yield lambda: attention_operators(names.names)

    def on_host(self, tensor: Tensor) -> None:
        self._host.add(tensor)

    def on_phase(self, name: str) -> None:
        if self._phases is not None:
            self._phases.begin(name)
            self._rank.progress(f"memory step, {name}")


def weights_of(cell: Cell) -> str | None:
    """The folder with the weights of the cell's model; None if the model has no folder."""
    from alst_impl.models import has_weights

    return cell.train.model if has_weights(cell.train.model) else None


def ask_for_settings(meter: Meter, cell: Cell) -> None:
    """Apply the cell's allocator setting if its environment variable was read too early.

    Raises `RuntimeError` if the allocator still reports another setting.
    """
    asked = str(cell.expandable_segments)
    for last in (False, True):
        said = meter.settings().get("expandable_segments", asked)
        if said == asked:
            return
        if last:
            raise RuntimeError(
                f"the cell asks for expandable_segments {asked}, but the allocator reports {said}"
            )
        meter.set(f"expandable_segments:{asked}")


def world() -> World:
    """Entry point for `harness.worlds.base.load_world`."""
    return Cuda()
