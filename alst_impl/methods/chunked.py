"""One sequence in chunks, the outer loop over chunks instead of layers, with ALST's tiles, Ulysses and offload.

Forward runs all layers on one chunk after another without a graph, and keeps keys and values (`ops.attention.pages`).
Backward takes the last chunk first: it runs all layers on a chunk again, with a graph, and then backward. So only one
chunk has activations, whatever the length. The order is that of SeCO (arXiv:2505.16710); attention and its exactness
are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.engines.base import load_engine
from alst_impl.layout import Layout, Part
from alst_impl.methods.base import Tiled, check_flash_by_name, check_rotary, check_sharded, layouts
from alst_impl.models import described

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.engines.base import Runtime
    from alst_impl.ops.attention.pages import Pages
    from alst_impl.ops.attention.patterns.base import Pattern
    from alst_impl.placement import Placement

TOKENS = 32_768
"""Tokens of a chunk on each rank by default. Parameters are read once per chunk, and pages are copied once per pair of
chunks, so that shorter chunks are bound by these copies."""


class Chunked(Tiled):
    """Exact, with the activations of one chunk. Every layer runs forward twice, or three times with checkpoints."""

    recomputes_layers: ClassVar[bool] = False
    knows: ClassVar[frozenset[str]] = frozenset({"softcap", "sinks", "chunks"})
    """Soft-capped attention is refused in several chunks, other soft-caps are not."""
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree: ranks that share one chunk."""
    chunk: int | None = Field(default=None, ge=1)
    """Maximum tokens of a chunk on each of the ranks that share it; None is 32,768."""
    offload: bool = True
    """Keep keys, values, their gradients and checkpointed layer inputs in host memory."""

    def attends(self, pattern: Pattern) -> bool:
        keys = pattern.as_window()
        return keys is not None and not keys[1]

    def replaces_core(self, seqlen: int) -> bool:
        return self.layout(seqlen).passes > 1

    def longest_chunk(self) -> int:
        return self.sp * (self.chunk or TOKENS)

    def layout(self, length: int) -> Layout:
        passes = -(-length // self.longest_chunk())
        return Layout(length, sp=self.sp, passes=passes)

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "chunked", knows=self.knows)
        longest = config.seqlen // self.sp
        if self.chunk is not None and self.chunk > longest:
            raise ValueError(
                f"chunk ({self.chunk}) is more than the {longest} of {config.seqlen} tokens that each of sp "
                f"({self.sp}) ranks holds; use a chunk up to {longest}"
            )
        passes = self.layout(config.seqlen).passes
        if passes == 1:
            super().check(config)
        else:
            self._check_chunks(config, passes)

    @staticmethod
    def _check_chunks(config: TrainConfig, passes: int) -> None:
        """What several chunks need."""
        check_flash_by_name(config, "chunked")
        fields = described(config.model, config.overrides)
        check_rotary(fields, "chunk", passes, config.model)
        if fields.get("attn_logit_softcapping"):
            raise ValueError(
                f"model '{config.model}' has soft-capped attention logits "
                f"(attn_logit_softcapping={fields['attn_logit_softcapping']}), which attention in chunks does not "
                "support: it merges what PyTorch's flash kernel returns, which has no soft-cap; use method 'alst'"
            )
        if load_engine(config.engine).updates_in_backward:
            raise ValueError(
                f"{passes} chunks accumulate gradients over as many backward passes, but engine "
                f"'{config.engine.name}' updates in the first (update_in_backward); use update_in_backward: false"
            )

    def promises(self, config: TrainConfig) -> set[str]:
        promised = super().promises(config) | ({"exchanges"} if self.sp > 1 else set())
        return promised | ({"slices"} if self.layout(config.seqlen).passes > 1 else set())

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl import hf
        from alst_impl.ops.attention.cores.base import load_core
        from alst_impl.ops.attention.pages import PagedAttention, Pages
        from alst_impl.ops.memory.offload import HostOffload

        if self.layout(config.seqlen).passes > 1:
            hf.refuse_positions_of_shards(model)
            for mixer in hf.mixers(model):
                raise ValueError(
                    f"{type(mixer).__name__} mixes tokens otherwise than by attention, which chunks would cut apart; "
                    "use method 'alst'"
                )
        offload = HostOffload(placement, overlap=self.overlap) if self.offload else None
        core, pages = load_core(config.attention), []
        core.activate()

        def paged() -> PagedAttention:
            pages.append(Pages(offload))
            return PagedAttention(core, pages[-1])

        self.attach(model, paged, layouts(config)[0].shards, placement)
        vars(model)["chunked"] = _State(pages, hf.without_logits(model))

    def chunks(self, batch: Batch) -> list[Batch]:
        return chunks(batch)

    @contextmanager
    def leaving(self, model: nn.Module, *, keep: bool) -> Iterator[dict[str, Any]]:
        """Context in which chunks of a sample leave their pages, in place of those of the sample before."""
        state = _state(model)
        for pages in state.pages:
            pages.clear()
            pages.leaving = True
        try:
            yield state.without_logits
        finally:
            for pages in state.pages:
                pages.leaving = False
                if not keep:
                    pages.clear()

    def forward_backward(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        import torch

        samples = [chunks(batch) for batch in batches]
        runtime.start_step(sum(map(len, samples)))
        total = torch.zeros((), device=num_valid.device)
        for sample in samples:
            self._leave_pages(runtime, sample[:-1])
            for batch in reversed(sample):
                total = total + self.micro_step(runtime, batch, num_valid)
        return total

    def micro_step(self, runtime: Runtime, batch: Batch, num_valid: Tensor) -> Tensor:
        runtime.placement.evidence["slices"] += 1
        return super().micro_step(runtime, batch, num_valid)

    def loss(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        import torch

        losses = []
        for batch in batches:
            with self.leaving(runtime.module, keep=False):
                losses += [runtime.forward(chunk, num_valid) for chunk in chunks(batch)]
        return torch.stack(losses).sum()

    def _leave_pages(self, runtime: Runtime, batches: list[Batch]) -> None:
        """Forward of the chunks `batches` for their keys and values alone. Collective."""
        import torch

        from alst_impl.ops import draws

        runtime.placement.on_phase("forward")
        with self.leaving(runtime.module, keep=True) as without_logits, torch.no_grad():
            for batch in batches:
                inputs: dict[str, Any] = batch.model_inputs()
                del inputs["labels"], inputs["shift_labels"]
                with draws.of_rank(batch.layout, batch.input_ids.device):
                    runtime.module(**inputs, **without_logits, use_cache=False)


@dataclass(frozen=True)
class _State:
    """What `Chunked.apply` leaves in the model for its steps."""

    pages: list[Pages]
    """One for each attention module."""
    without_logits: dict[str, Any]


def _state(model: Any) -> _State:
    """What `Chunked.apply` left in `model`, which may be inside the wrapper of an engine."""
    state: _State = model.chunked
    return state


def chunks(batch: Batch) -> list[Batch]:
    """The chunks of this rank's shard of a batch, in order."""
    layout = batch.layout
    if layout.passes == 1:
        return [batch]
    size = layout.local // layout.passes
    spans = [slice(start, start + size) for start in range(0, layout.local, size)]
    return [
        replace(
            batch,
            input_ids=batch.input_ids[:, span].contiguous(),
            shift_labels=batch.shift_labels[:, span].contiguous(),
            position_ids=batch.position_ids[:, span].contiguous(),
            layout=replace(layout, part=Part(0, index, layout.passes)),
        )
        for index, span in enumerate(spans)
    ]
