"""Runs the schedules of `alst_impl.ops.pipeline.schedule`: sequence slices through stages on different ranks.

Source: Seq1F1B (arXiv:2406.03488). Hidden states go to the next stage and their gradients to the previous
one, point to point. Keys and values stay on their stage (`alst_impl.ops.pipeline.sliced`).
Legend: B batch, S sequence, s tokens of a slice, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import DeviceMesh, ProcessGroup

from alst_impl.data import Batch
from alst_impl.layout import Part
from alst_impl.ops import draws
from alst_impl.ops.pipeline.schedule import Unit, seq1f1b
from alst_impl.ops.pipeline.sliced import SliceAttention

if TYPE_CHECKING:
    from alst_impl.engines.base import Runtime


class Link:
    """Messages from stage to stage in one direction, over a process group of their own.

    NCCL runs the operations of a group one after another. With both directions on one group, two neighbours
    that send to each other would deadlock.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._sent: tuple[dist.Work, Tensor] | None = None

    def send(self, x: Tensor, stage: int) -> None:
        """Start to send `x`.

        Waits for the previous message first, so that no more than one sent tensor is held.
        """
        self.settle()
        x = x.contiguous()
        work = dist.isend(x, group=self._group, group_dst=stage)
        assert work is not None, "every stage is in the group"
        self._sent = work, x

    def receive(self, into: Tensor, stage: int) -> Tensor:
        """Receive into `into`, which is contiguous. Blocks; on a device with streams, only the stream."""
        work = dist.irecv(into, group=self._group, group_src=stage)
        assert work is not None, "every stage is in the group"
        work.wait()
        return into

    def settle(self) -> None:
        """Wait until everything sent has arrived."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None


class _Live(NamedTuple):
    """What the backward of a slice needs from its forward."""

    hidden: Tensor | None
    """Input [B, s, E]; its gradient goes to the previous stage. None on the first stage."""
    output: Tensor | GradientEdge
    """The loss on the last stage; elsewhere the gradient edge of the hidden states, whose values are not kept."""


@dataclass(frozen=True)
class Pipeline:
    """One rank's stage of a pipeline, and how to run it."""

    stage: int
    num_stages: int
    slices: int
    """Slices of each sample."""
    attentions: Sequence[SliceAttention]
    """One for each attention module of this stage."""
    borders: Callable[[int], list[int]]
    """Sequence length -> slice boundaries."""
    ahead: Link | None
    """Sends hidden states to the next stage; None with one stage."""
    back: Link | None
    """Sends gradients to the previous stage; None with one stage."""
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
        """Run one step. Returns this rank's share of the loss, zero except on the last stage. Collective."""
        borders = self.borders(batches[0].layout.length)
        slices = [
            [self._cut(batch, micro, part, borders) for part in range(self.slices)]
            for micro, batch in enumerate(batches)
        ]
        runtime.start_step(len(batches) * self.slices)
        live: dict[Unit, _Live] = {}
        # The same dtype on all stages, because the losses are summed over ranks.
        wide = torch.promote_types(self.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=num_valid.device)
        for unit in seq1f1b(self.num_stages, len(batches), self.slices, self.stage):
            batch = slices[unit.micro_batch][unit.part]
            if unit.backward:
                self._backward(runtime, batch, live.pop(unit._replace(backward=False)))
            else:
                with draws.of_rank(batch.layout, num_valid.device):
                    live[unit], loss = self._forward(runtime, batch, num_valid)
                if loss is not None:
                    total += loss
        for link in (self.ahead, self.back):
            if link is not None:
                link.settle()
        return total

    def _forward(
        self, runtime: Runtime, batch: Batch, num_valid: Tensor
    ) -> tuple[_Live, Tensor | None]:
        """Forward of the current slice; on the last stage, also its share of the loss."""
        runtime.placement.on_phase("forward")
        runtime.placement.evidence["slices"] += 1
        inputs: dict[str, Any] = batch.model_inputs()
        hidden = None
        if not self.first:
            del inputs["input_ids"]
            hidden = _link(self.ahead).receive(self._like(batch), self.stage - 1).requires_grad_()
            inputs["hidden"] = hidden
        if self.last:
            loss = runtime.module(**inputs, num_items_in_batch=num_valid, use_cache=False).loss
            return _Live(hidden, loss), loss.detach()
        del inputs["labels"], inputs["shift_labels"]
        out = runtime.module(**inputs, use_cache=False)
        _link(self.ahead).send(out.detach(), self.stage + 1)
        return _Live(hidden, get_gradient_edge(out)), None

    def _backward(self, runtime: Runtime, batch: Batch, live: _Live) -> None:
        """Backward of the current slice."""
        gradient = None
        if not self.last:
            gradient = _link(self.back).receive(self._like(batch), self.stage + 1)
        runtime.backward(live.output, gradient)
        if batch.layout.part is not None:
            for attention in self.attentions:
                attention.forget(batch.layout.part)
        if live.hidden is not None:
            assert live.hidden.grad is not None, "a loss depends on its input"
            _link(self.back).send(live.hidden.grad, self.stage - 1)

    def _cut(self, batch: Batch, micro_batch: int, part: int, borders: list[int]) -> Batch:
        """Part `part` of a micro-batch; its documents stay those of the whole sequence."""
        span = slice(borders[part], borders[part + 1])
        at = Part(micro_batch, part, self.slices) if self.slices > 1 else None
        return replace(
            batch,
            input_ids=batch.input_ids[:, span],
            shift_labels=batch.shift_labels[:, span].contiguous(),
            position_ids=batch.position_ids[:, span],
            layout=replace(batch.layout, part=at),
        )

    def _like(self, batch: Batch) -> Tensor:
        """Uninitialized tensor [B, s, E] for the slice's hidden states, or for their gradient."""
        ids = batch.input_ids
        return torch.empty(*ids.shape, self.hidden_size, dtype=self.dtype, device=ids.device)


def _link(link: Link | None) -> Link:
    assert link is not None, "several stages have links"
    return link


def links(mesh: DeviceMesh) -> tuple[Link, Link]:
    """Links to the next and to the previous stage along axis `pp`, which is outermost. Collective over all ranks."""
    pipelines = mesh.size() // mesh["pp"].size()
    every = [list(range(i, mesh.size(), pipelines)) for i in range(pipelines)]
    group, _ = dist.new_subgroups_by_enumeration(every)
    assert group is not None, "every rank is in a pipeline"
    return Link(mesh["pp"].get_group()), Link(group)
