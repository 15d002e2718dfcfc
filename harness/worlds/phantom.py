"""Phantom devices: PyTorch's CUDA build over a runtime with real memory and no arithmetic.

One process runs the rank with the highest memory use, in a fake process group of all ranks. The
code is shared with world `cuda`, and bytes are the same. There are no values and no times.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import phantom_agent.history
import phantom_agent.host
import phantom_agent.reads
import phantom_agent.runtime
import phantom_agent.watch
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import alst_impl
from alst_impl import hf
from alst_impl.config import TrainConfig
from alst_impl.data import Batch
from alst_impl.engines.base import Runtime, load_engine
from alst_impl.hf.tap import Tap
from alst_impl.layout import Layout, make_mesh
from alst_impl.methods.base import layouts, load_method
from alst_impl.models.weights import Initializer
from harness.cells.cell import Cell
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Cost, Holding, Timeline
from harness.meters import cost
from harness.meters.timeline import timeline
from harness.phantom.session import Read, reviewed_sites
from harness.processes.jobs import Rank
from harness.records.record import RankMemory
from harness.worlds.base import World
from harness.worlds.cuda import Cuda, Meter, ask_for_settings, require_forkable

__all__ = ["Phantom", "UnknownValue", "require_forkable", "world"]


STATES = {"adamw": 2, "sgd": 0}
"""Optimizer -> number of states per parameter, each of the parameter's size."""


EVENTS = 10_000_000
"""Maximum number of events of a timeline, more than the allocations of any step."""


class UnknownValue(RuntimeError):
    """A value that no device computed may have decided control flow."""


class _Seen(BaseException):
    """Ends a step early, after its measurement is complete."""


class Counting(TorchDispatchMode):
    """Passes every operator to a meter."""

    def __init__(self, meter: cost.Meter) -> None:
        TorchDispatchMode.__init__(self)
        self._meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._meter.observe(func, args, kwargs or {}, result)
        return result


class Unfilled(Initializer):
    """Weights of the right shape and dtype in device memory, without values."""

    def values(self, model: PreTrainedModel, path: str, module: nn.Module) -> dict[str, Tensor]:
        """Tensors for all parameters and buffers that `module` itself holds, by name."""
        held = {**module._parameters, **module._buffers}
        return {
            k: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for k, t in held.items()
            if t is not None
        }


class Blank:
    """Unpacked samples in which every label counts."""

    def __init__(self, config: TrainConfig) -> None:
        self._seqlen = config.seqlen

    def batch(self, samples: Sequence[int]) -> Batch:
        """ids, labels and positions [B, S]."""
        ids = torch.zeros(len(samples), self._seqlen, dtype=torch.int64)
        positions = torch.arange(self._seqlen).expand_as(ids)
        return Batch(ids, ids.clone(), positions, Layout(self._seqlen))

    def lengths(self, _: int) -> tuple[int, ...]:
        """One document."""
        return (self._seqlen,)


class Marks:
    """Marks within a step, in order: each phase and each pass through a layer."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.count = 0
        self.highest = 0
        self.before_highest = 0
        """The last mark before the peak of allocated bytes."""
        self.on_pass: Callable[[int], None] | None = None

    def passed(self) -> None:
        """Pass a mark, and note whether the peak has risen since the last one."""
        peak = self._meter.peak_allocated()
        if peak > self.highest:
            self.highest, self.before_highest = peak, self.count - 1
        if self.on_pass is not None:
            self.on_pass(self.count)
        self.count += 1


class Phantom(Cuda):
    """The rank with the highest memory use, on a phantom device."""

    has_time = has_values = False

    def __init__(
        self, rank: int | None = None, *, counted: bool = False, explained: bool = False
    ) -> None:
        """`rank` is the rank to run, by default the method's heaviest. `counted`: count the work of
        the tracked step. `explained`: run one more step to find the allocations that are alive at
        the peak.
        """
        super().__init__()
        self._played, self._counted, self._explained = rank, counted, explained
        self._marks: Marks | None = None
        self._begins: list[tuple[str, int]] | None = None
        self.cost: Cost | None = None
        self.timeline: Timeline | None = None
        """Timeline of the tracked step; None if the cell does not request it."""
        self.holdings: list[Holding] = []
        self.pageable_bytes = 0
        """Peak of pageable host memory."""

    @contextmanager
    def group(self, rank: Rank, cell: Cell) -> Iterator[DeviceMesh]:
        self._rank, self._cell = rank, cell
        self.device = torch.device("cuda", 0)
        torch.cuda.init()
        self._meter = Meter(self.device)
        ask_for_settings(self._meter, cell)
        self._reads = phantom_agent.reads.watch([site.model_dump() for site in reviewed_sites()])
        # Weights and states on the host have no values either, and would exceed this machine's
        # memory.
        phantom_agent.host.leave_large_untouched()
        method, size = load_method(cell.train.method), cell.train.world_size
        played = method.heaviest_rank(size) if self._played is None else self._played
        # Launcher variables of that rank. DeepSpeed reads them.
        places = {"RANK": played, "LOCAL_RANK": 0, "WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in places.items()})
        dist.init_process_group("fake", rank=played, world_size=size, store=FakeStore())
        # A backward in a separate thread drops its last references before or after the caller
        # continues. Which comes first varies.
        with torch.autograd.set_multithreading_enabled(False):
            yield make_mesh(layouts(cell.train), "cuda")
        dist.destroy_process_group()

    def stand(self, runtime: Runtime) -> None:
        super().stand(runtime)
        model: Any = getattr(runtime.module, "module", runtime.module)  # DeepSpeed wraps it
        for attention in hf.attention_modules(model):
            if not isinstance(getattr(attention, "alst_attention", None), Tap):  # called by tile
                attention.register_forward_pre_hook(lambda *_: self.on_layer())

    def track(self, step: Callable[[], object], runtime: Runtime) -> RankMemory:
        assert self._cell.simulation is not None
        self._marks = marks = Marks(self._meter)
        if self._cell.simulation.timeline:
            memory = self._drawn(step, runtime)
        else:
            memory = super().track(step, runtime)
        self.pageable_bytes = (
            phantom_agent.runtime.library().phantom_pageable_peak()
            + _states_on_host(runtime, self._cell.train.optimizer.name)
        )
        if self._explained:
            self.holdings = self._alive_after(marks.before_highest, step, runtime)
        self._require_known()
        return memory

    def _drawn(self, step: Callable[[], object], runtime: Runtime) -> RankMemory:
        """Track `step` and record its timeline."""
        gc.collect()
        begin, resting = self._meter.changes(), self._meter.allocated()
        self._begins = []
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=EVENTS)
        memory = super().track(step, runtime)
        events = torch.cuda.memory._snapshot()["device_traces"][self.device.index]
        torch.cuda.memory._record_memory_history(enabled=None)
        begins, self._begins = [(name, at - begin) for name, at in self._begins], None
        self.timeline = timeline(events, resting, begins)
        return memory

    @contextmanager
    def watching(self) -> Iterator[Callable[[], list[str]]]:
        node = load_hardware(self._cell.hardware).devices_per_node
        meter = cost.Meter(host="cpu", node=node)
        with Counting(meter) if self._counted else contextlib.nullcontext():
            yield lambda: phantom_agent.watch.attention(phantom_agent.runtime.kernels())
            self.on_layer()
        if self._counted:
            self.cost = meter.cost()

    def on_phase(self, name: str) -> None:
        self.on_layer()  # before the phase that ends has its peaks reset
        if self._begins is not None:
            self._begins.append((name, self._meter.changes()))
        super().on_phase(name)

    def on_layer(self) -> None:
        if self._marks is not None:
            self._marks.passed()

    def initializer(self, cell: Cell) -> Initializer | None:
        return Unfilled(cell.train.seed)

    def corpus(self, config: TrainConfig) -> Any:
        """Blank samples if the data is unpacked and unmasked, because no kernel reads their content."""
        corpus = super().corpus(config)
        plain = not corpus.packed and config.data.mask == "none"
        return Blank(config) if plain else corpus

    def skips_update(self) -> bool:
        """Skips updates on the host, which would be real arithmetic and use no device memory."""
        return load_engine(self._cell.train.engine).updates_on_host

    def _alive_after(
        self, mark: int, step: Callable[[], object], runtime: Runtime
    ) -> list[Holding]:
        """Run another step like the tracked one. Returns the allocations alive at the peak between
        `mark` and the next mark.
        """
        memory = torch.cuda.memory
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        # Addresses of shards. While a unit is gathered, its parameters have other addresses.
        known = _places(runtime)

        def on_pass(number: int) -> None:
            if number == mark:
                known.update(_places(runtime))
                before.update(memory._snapshot())
                memory._record_memory_history(enabled="all", stacks="python")
            elif number == mark + 1:
                after.update(memory._snapshot())
                memory._record_memory_history(enabled=None)
                raise _Seen

        gc.collect()
        memory._record_memory_history(enabled="state", stacks="python")
        self._marks = Marks(self._meter)
        self._marks.on_pass = on_pass
        with contextlib.suppress(_Seen):
            on_pass(-1)
            step()
            self._marks.passed()
        self._marks = None
        held = phantom_agent.history.alive_between(before, after, self.device.index)
        return [
            Holding(category=c, operator=o, location=at, nbytes=sum(sizes), count=len(sizes))
            for (c, o, at), sizes in _grouped(held, known).items()
        ]

    def _require_known(self) -> None:
        """Raise `UnknownValue` if an unknown value was read at a place that is not reviewed, or the
        run continued after a refused function.
        """
        if refused := phantom_agent.runtime.refusals():
            raise UnknownValue(f"the run went on after a refusal of {', '.join(refused)}")
        doubtful = [r for each in self._reads.found.values() if (r := Read(**each)).doubtful]
        if doubtful:
            places = ", ".join(
                f"{read.file}:{read.line} ({read.function}, from {read.caller})"
                for read in doubtful
            )
            raise UnknownValue(f"a value that no device computed was read at {places}")


def _states_on_host(runtime: Runtime, optimizer: str) -> int:
    """Bytes of the states that the optimizer creates for parameters in host memory in its first update."""
    parameters = [p for group in runtime.optimizer.param_groups for p in group["params"]]
    held: list[Tensor] = [getattr(p, "_local_tensor", p) for p in parameters]
    return STATES[optimizer] * sum(t.nbytes for t in held if t.device.type == "cpu")


def _places(runtime: Runtime) -> dict[int, str]:
    """Address -> category of parameters, gradients and optimizer states."""
    found: dict[int, str] = {}
    for p in runtime.module.parameters():
        for tensor, category in ((p, "parameters"), (p.grad, "gradients")):
            if tensor is not None:
                local = getattr(tensor, "_local_tensor", tensor)
                found[local.untyped_storage().data_ptr()] = category
    for state in runtime.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                local = getattr(value, "_local_tensor", value)
                found[local.untyped_storage().data_ptr()] = "optimizer"
    return found


def _grouped(
    held: dict[int, tuple[int, list[Any]]], places: dict[int, str]
) -> dict[tuple[str, str, str | None], list[int]]:
    """Sizes of allocations by category, function and line, largest group first."""
    found: dict[tuple[str, str, str | None], list[int]] = {}
    for address, (size, frames) in held.items():
        category = places.get(address, "activations")
        function, line = phantom_agent.history.place(frames) if frames else ("", None)
        line = line and _short(line)
        found.setdefault((category, function, line), []).append(size)
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def _short(places: str) -> str:
    """File paths relative to the checkout or to the folder of installed packages."""
    for module in (torch, transformers, alst_impl):
        folder = Path(module.__file__ or "").parents[1]
        places = places.replace(f"{folder}/", "")
    return places


def world() -> World:
    """Entry point for `harness.worlds.base.load_world`."""
    return Phantom()
