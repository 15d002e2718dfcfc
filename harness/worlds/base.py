"""One cell on one rank: the same sequence of steps in every world."""

from __future__ import annotations

import importlib
import math
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh

from alst_impl import hf
from alst_impl.config import Frozen, TrainConfig
from alst_impl.data import Corpus
from alst_impl.engines.base import Runtime
from alst_impl.methods.base import Method
from alst_impl.models.weights import Initializer
from alst_impl.placement import Placement, no_evidence
from alst_impl.step import StepResult, accumulate_gradients, micro_batches, start, train_step
from harness.cells.cell import Cell
from harness.gate.gradients import Companion, compare, compare_update
from harness.gate.truths import Truth, corpus_of
from harness.processes.jobs import Rank
from harness.processes.launch import store_at
from harness.records.record import Gate, RankMemory


class World(ABC):
    """How a cell is executed: which process group, which tensors, which clock, which meter."""

    device: torch.device
    """The device on which a rank computes."""
    has_time = True
    """Whether steps take real time. Otherwise none is timed."""
    has_values = True
    """Whether tensors have computed values. Otherwise none is read."""

    @abstractmethod
    def group(self, rank: Rank, cell: Cell) -> AbstractContextManager[DeviceMesh]:
        """Join the process group and yield the mesh of the cell's method. Collective."""

    @abstractmethod
    def clock(self) -> float:
        """Seconds, read after all issued work is done."""

    @abstractmethod
    def track(self, step: Callable[[], object], runtime: Runtime) -> RankMemory:
        """Run `step` and measure its memory."""

    def initializer(self, cell: Cell) -> Initializer | None:
        """Initializer of the weights; None for the default, which all worlds share."""
        return None

    def stand(self, runtime: Runtime) -> None:
        """Called after the model is built, to free memory that building it left behind."""

    def corpus(self, config: TrainConfig) -> Corpus:
        """Source of the samples."""
        return corpus_of(config)

    def skips_update(self) -> bool:
        """Whether steps skip the optimizer's update."""
        return False

    def on_host(self, tensor: Tensor) -> None:
        """Called before `tensor` gets offloaded data."""

    def on_phase(self, name: str) -> None:
        """Called when `forward`, `backward` or `update` begins."""

    def on_layer(self) -> None:
        """Called when a pass through a decoder layer begins, by methods that do not call its attention module."""


class NanLoss(ArithmeticError):
    """A loss or a gradient norm is not finite."""


class RankReadings(Frozen):
    """Readings of one rank."""

    step_s: list[float]
    """Wall time of each timed step."""
    seqlens: list[int] = []
    """Tokens of a sequence of each timed step."""
    loss: list[float]
    """Global mean loss of every step."""
    grad_norm: list[float]
    """Global gradient norm of every step."""
    memory: RankMemory | None
    """Memory of the tracked step."""
    evidence: dict[str, int]
    """Evidence of the last step."""
    cosine: list[float]
    """Cosines of every step but the tracked one, on rank 0; empty if the cell does not request them."""
    gate: Gate | None
    """Gradient comparison on rank 0; None if the cell does not request it."""
    num_parameters: int
    """Parameters of the model on this rank, tied ones counted once."""
    num_expert_parameters: int = 0
    """Those of routed experts."""


def load_world(name: str) -> World:
    """The world in `harness/worlds/<name>.py`."""
    module = importlib.import_module(f"harness.worlds.{name}")
    world = module.world()
    assert isinstance(world, World)
    return world


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Run `payload["cell"]` on this rank. `payload["truth"]` is the reference of its gradients. Collective."""
    cell = Cell(**payload["cell"])
    world = load_world(cell.world)
    truth = None if payload["truth"] is None else Truth(**payload["truth"])
    return run(rank, cell, world, truth).model_dump(mode="json")


def run(rank: Rank, cell: Cell, world: World, truth: Truth | None = None) -> RankReadings:
    """The steps of `cell` on this rank of `world`. Collective."""
    rank.progress("joining the group")
    with world.group(rank, cell) as mesh:
        return _Run(rank, cell, world, mesh, truth).readings()


class _Run:
    """The steps of one cell: gradients, warm-up, timed steps, one tracked step."""

    def __init__(
        self, rank: Rank, cell: Cell, world: World, mesh: DeviceMesh, truth: Truth | None
    ) -> None:
        self.rank, self.cell, self.world, self.mesh, self.truth = rank, cell, world, mesh, truth
        rank.progress("building the model")
        self.placement = Placement(
            device=world.device,
            on_host=world.on_host,
            on_phase=world.on_phase,
            on_layer=world.on_layer,
        )
        self.method: Method
        self.method, self.runtime = start(cell.train, mesh, self.placement, world.initializer(cell))
        world.stand(self.runtime)
        self.corpus = world.corpus(cell.train)
        self.step = 0
        self.seqlens: list[int] = []
        self.loss: list[float] = []
        self.grad_norm: list[float] = []
        self.cosine: list[float] = []
        followed = cell.followed and rank.index == 0
        self.companion = Companion(cell.train) if followed else None

    def readings(self) -> RankReadings:
        """Run all steps."""
        cell = self.cell
        gate = self._gate() if cell.gate else None
        for i in range(cell.warmup):
            self._timed(f"warm-up step {i + 1}/{cell.warmup}")
        first = self.step
        step_s = [self._timed(f"step {i + 1}/{cell.steps}") for i in range(cell.steps)]
        memory = self._tracked() if cell.steps or not self.world.has_time else None
        return RankReadings(
            step_s=step_s,
            seqlens=self.seqlens[first : first + cell.steps],
            loss=self.loss,
            grad_norm=self.grad_norm,
            memory=memory,
            evidence=dict(self.placement.evidence),
            cosine=self.cosine,
            gate=gate,
            num_parameters=num_parameters(self.runtime.module.parameters()),
            num_expert_parameters=num_parameters(hf.expert_parameters(self.runtime.module)),
        )

    def _batches(self, doing: str) -> list[Any]:
        """This rank's shards of the next step's micro-batches."""
        self.rank.progress(doing)
        self.placement.evidence.update(no_evidence())
        batches = micro_batches(
            self.cell.train, self.corpus, self.method, self.mesh, self.step, self.world.device
        )
        self.step += 1
        self.seqlens.append(batches[0].layout.length)
        return batches

    def _note(self, result: StepResult) -> None:
        if not self.world.has_values:
            return
        loss, norm = float(result.loss), float(result.grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NanLoss(f"loss {loss}, gradient norm {norm} in step {self.step}")
        self.loss.append(loss)
        self.grad_norm.append(norm)

    def _gate(self) -> Gate | None:
        """Compare all gradients of the first step, then finish the step with its update."""
        batches = self._batches("comparing gradients")
        loss = accumulate_gradients(self.method, self.runtime, batches)
        if not math.isfinite(float(loss)):
            raise NanLoss(f"loss {float(loss)} in step {self.step}")
        gradients = self.runtime.gradients()
        self._follow(gradients)
        gate, noise = None, {}
        if self.rank.index == 0:
            assert self.truth is not None
            gate = compare(gradients, float(loss), self.truth, self.cell.train)
            # AdamW makes a full-size update even of a tiny gradient, so the reference update uses
            # our rounding noise.
            noise = {
                p.parameter: gradients[p.parameter].clone()
                for p in gate.parameters
                if p.noise and p.parameter in gradients
            }
        del gradients
        before = self._parameters()
        self._note(StepResult(loss=loss, grad_norm=self.runtime.update()))
        after = self._parameters()
        if gate is not None and self.cell.update:
            assert self.truth is not None
            gate = compare_update(gate, before, after, self.truth, self.cell.train, noise)
        return gate

    def _parameters(self) -> dict[str, Tensor]:
        """Copies of all parameters; empty if the cell does not compare the update. Collective."""
        if not self.cell.update:
            return {}
        return {name: p.clone() for name, p in self.runtime.state_dict().items()}

    def _follow(self, gradients: dict[str, Tensor]) -> None:
        """Compare the step's gradients with the stock model's if the cell requests it. Collective."""
        if not self.cell.followed:
            return
        weights = self.runtime.state_dict()
        if self.companion is not None:
            self.cosine.append(self.companion.cosine(gradients, weights, self.step - 1))

    def _timed(self, doing: str) -> float:
        batches = self._batches(doing)
        dist.barrier()
        begin = self.world.clock()
        if self.cell.followed:
            loss = accumulate_gradients(self.method, self.runtime, batches)
            paused = self.world.clock()
            self._follow(self.runtime.gradients())
            begin += self.world.clock() - paused
            result = StepResult(loss=loss, grad_norm=self.runtime.update())
        else:
            result = self._step(batches)
        seconds = self.world.clock() - begin
        self._note(result)
        return seconds

    def _step(self, batches: list[Any]) -> StepResult:
        if not self.world.skips_update():
            return train_step(self.method, self.runtime, batches)
        loss = accumulate_gradients(self.method, self.runtime, batches)
        self.runtime.drop_gradients()
        return StepResult(loss=loss, grad_norm=torch.zeros_like(loss))

    def _tracked(self) -> RankMemory:
        batches = self._batches("memory step")
        return self.world.track(self._noted(batches), self.runtime)

    def _noted(self, batches: list[Any]) -> Callable[[], StepResult]:
        def step() -> StepResult:
            result = self._step(batches)
            self._note(result)
            return result

        return step


def num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements of `parameters`, of sharded ones with their full size."""
    # ZeRO-3 keeps the full size in `ds_numel`. A DTensor reports its full size.
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def attention_operators(operators: Iterable[str]) -> list[str]:
    """The core attention operators among `operators`, sorted."""
    return sorted(name for name in operators if "attention" in name or "attn" in name)


def store_of(rank: Rank, cell: Cell) -> dist.Store:
    """The store through which the ranks of `cell` find each other."""
    if rank.meeting is not None:
        return store_at(rank.meeting, f"ranks/{cell.key}")
    return dist.FileStore(str(rank.scratch / "store"), rank.world_size)


def rss_bytes() -> int:
    """Peak resident set size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
