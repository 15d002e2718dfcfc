"""Runs the schedules of `alst_impl.ops.pipeline.schedule`: slices of sequences through stages on different ranks.

Source: Seq1F1B (arXiv:2406.03488). Hidden states go to the next stage, their gradients to the one
before, point to point. Keys and values stay where they are (`alst_impl.ops.pipeline.sliced`).
Legend: B batch, S sequence, s tokens of a slice, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import DeviceMesh, ProcessGroup

from alst_impl.data import Batch
from alst_impl.ops.pipeline.schedule import Unit, seq1f1b
from alst_impl.ops.pipeline.sliced import Current, SliceAttention

if TYPE_CHECKING:
    from alst_impl.engines.base import Runtime


class Link:
    """The way from stage to stage in one direction, over a group of its own.

    NCCL runs what it is given on a group one after another: with both directions on one, two neighbours
    that send to each other would wait for ever.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._sent: tuple[dist.Work, Tensor] | None = None

    def send(self, x: Tensor, stage: int) -> None:
        """Begin to send. One message is on its way at a time: the one before has arrived by then, or is
        waited for, so that no more than one is held.
        """
        self.settle()
        x = x.contiguous()
        work = dist.isend(x, group=self._group, group_dst=stage)
        assert work is not None, "every stage is in the group"
        self._sent = work, x

    def receive(self, into: Tensor, stage: int) -> Tensor:
        """Fill `into`, contiguous; blocks, on a device with streams the stream alone."""
        work = dist.irecv(into, group=self._group, group_src=stage)
        assert work is not None, "every stage is in the group"
        work.wait()
        return into

    def settle(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None


class _Live(NamedTuple):
    """What backward of a slice needs from its forward; the values of its output are on their way."""

    hidden: Tensor | None
    """Input [B, s, E], whose gradient the stage before waits for; None on the first stage."""
    output: Tensor | GradientEdge
    """The loss on the last stage, hidden states elsewhere."""


@dataclass(frozen=True)
class Pipeline:
    """One rank's place in a pipeline and what it runs there."""

    stage: int
    num_stages: int
    current: Current
    """Where the attention modules read which slice runs."""
    attentions: Sequence[SliceAttention]
    """Of this stage's layers."""
    borders: Callable[[int], list[int]]
    """Length of a sequence -> borders of its slices."""
    ahead: Link
    """For hidden states, to the next stage."""
    back: Link
    """For gradients, to the stage before."""
    hidden_size: int
    dtype: torch.dtype

    @property
    def first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage has the loss."""
        return self.stage == self.num_stages - 1

    def run(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        """One step; returns this rank's addend to the loss, zero but on the last stage. Collective."""
        borders = self.borders(batches[0].input_ids.shape[1])
        slices = [[_cut(batch, *ends) for ends in pairwise(borders)] for batch in batches]
        runtime.start_step(len(batches) * self.current.parts)
        live: dict[tuple[int, int], _Live] = {}
        # Of one dtype on all stages, for they are added up.
        wide = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=num_valid.device)
        for unit in seq1f1b(self.num_stages, len(batches), self.current.parts, self.stage):
            batch = slices[unit.micro_batch][unit.part]
            self.current.micro_batch, self.current.part = unit.micro_batch, unit.part
            if unit.backward:
                self._backward(runtime, batch, live.pop(_place(unit)))
            else:
                live[_place(unit)], loss = self._forward(runtime, batch, num_valid)
                if loss is not None:
                    total += loss
        self.ahead.settle()
        self.back.settle()
        return total

    def _forward(
        self, runtime: Runtime, batch: Batch, num_valid: Tensor
    ) -> tuple[_Live, Tensor | None]:
        """Forward of the current slice, and on the last stage its addend to the loss."""
        runtime.placement.on_phase("forward")
        runtime.placement.evidence.slices += 1
        inputs: dict[str, Any] = batch.model_inputs()
        hidden = None
        if not self.first:
            del inputs["input_ids"]
            hidden = self.ahead.receive(self._like(batch), self.stage - 1).requires_grad_()
            inputs["hidden"] = hidden
        if self.last:
            loss = runtime.module(**inputs, num_items_in_batch=num_valid, use_cache=False).loss
            return _Live(hidden, loss), loss.detach()
        del inputs["labels"], inputs["shift_labels"]
        out = runtime.module(**inputs, use_cache=False)
        self.ahead.send(out.detach(), self.stage + 1)
        return _Live(hidden, get_gradient_edge(out)), None

    def _backward(self, runtime: Runtime, batch: Batch, live: _Live) -> None:
        """Backward of the current slice."""
        gradient = None
        if not self.last:
            gradient = self.back.receive(self._like(batch), self.stage + 1)
        runtime.backward(live.output, gradient)
        for attention in self.attentions:
            attention.forget()
        if live.hidden is not None:
            assert live.hidden.grad is not None, "a loss depends on its input"
            self.back.send(live.hidden.grad, self.stage - 1)

    def _like(self, batch: Batch) -> Tensor:
        """Room for hidden states of the slice, or their gradient [B, s, E]."""
        ids = batch.input_ids
        return torch.empty(*ids.shape, self.hidden_size, dtype=self.dtype, device=ids.device)


def _place(unit: Unit) -> tuple[int, int]:
    return unit.micro_batch, unit.part


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    """Tokens `start` to `stop`; documents stay those of the whole sequence."""
    return replace(
        batch,
        input_ids=batch.input_ids[:, start:stop],
        shift_labels=batch.shift_labels[:, start:stop].contiguous(),
        position_ids=batch.position_ids[:, start:stop],
    )


def links(mesh: DeviceMesh) -> tuple[Link, Link]:
    """The ways ahead and back along axis `pp`, which is the outermost. Collective over all ranks."""
    pipelines = mesh.size() // mesh["pp"].size()
    every = [list(range(i, mesh.size(), pipelines)) for i in range(pipelines)]
    group, _ = dist.new_subgroups_by_enumeration(every)
    assert group is not None, "every rank is in a pipeline"
    return Link(mesh["pp"].get_group()), Link(group)
