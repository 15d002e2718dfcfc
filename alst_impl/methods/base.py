"""The interface of a method. Torch is imported inside functions, because `check` runs while sweeps expand."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from alst_impl.config import Frozen, Precision, Spec, TrainConfig
from alst_impl.layout import Layout
from alst_impl.models import described, field, rotary_by_longest, unsupported, window
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.plugin import load
from alst_impl.sources.base import load_source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor, nn
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch, Corpus
    from alst_impl.engines.base import Runtime
    from alst_impl.ops.attention.patterns.base import Pattern
    from alst_impl.ops.attention.ulysses import WholeSequence
    from alst_impl.placement import Placement


LOGITS_TILE_BYTES = 2**30
"""Size of the fp32 logits of one loss tile (arXiv:2506.13996, section 3.1.2)."""


class Sharing(Frozen):
    """Who holds which tokens of which samples. By default each rank holds whole samples of its own."""

    def layout(self, length: int) -> Layout:
        """Layout of samples of `length` tokens over the ranks that share them."""
        return Layout(length)

    def plan(self, lengths: Sequence[int], world_size: int) -> list[Layout]:
        """Layouts of a micro-batch of samples of `lengths`, one for each group of ranks that share samples.

        By default a grid: `world_size` ranks in groups of equal shape, each with the layout of the longest
        sample. The groups lie side by side along the mesh's axis `dp`.
        """
        layout = self.layout(max(lengths))
        return [layout] * (world_size // layout.ranks)

    def micro_batches(
        self, config: TrainConfig, corpus: Corpus, mesh: DeviceMesh, step: int
    ) -> list[Batch]:
        """This rank's shards of the micro-batches of `step`, on the CPU. Collective if `shard` is.

        By default sample ids run over steps, then micro-batches, then dp ranks.
        """
        rank, size = mesh.get_local_rank("dp"), config.batch_size
        batches = []
        for micro in range(config.accumulation):
            first = ((step * config.accumulation + micro) * mesh["dp"].size() + rank) * size
            batch = corpus.batch(range(first, first + size))
            layout = self.plan([batch.layout.length], config.world_size)[rank]
            named = replace(layout, mesh=mesh, draws=f"{config.seed}/{first}")
            batches.append(self.shard(batch, named))
        return batches

    def shard(self, batch: Batch, layout: Layout) -> Batch:
        """This rank's shard of the whole `batch`. Collective for stacks that shard batches themselves."""
        return layout.cut(batch)

    def longest_chunk(self) -> int | None:
        """Tokens of the longest sample that runs in one pass; None if every sample does."""
        return None

    def chunks(self, batch: Batch) -> list[Batch]:
        """The parts of this rank's shard that run one after another, in order. Each has a backward, the last first."""
        return [batch]

    def heaviest_rank(self, world_size: int) -> int:
        """The rank with the highest memory use; a run that executes one rank for all executes this one."""
        return 0


class Method(Sharing):
    """A training method; its options are its fields."""

    recomputes_layers: ClassVar[bool] = True
    """Whether each layer runs two forwards and one backward per step, as in published runs."""

    knows: ClassVar[frozenset[str]] = frozenset()
    """Features of models (`alst_impl.models.FEATURES`) that the method computes exactly, if it shards sequences."""

    def attends(self, pattern: Pattern) -> bool:
        """Whether the method computes attention with `pattern` exactly."""
        return False

    def replaces_core(self, seqlen: int) -> bool:
        """Whether calls of PyTorch's flash kernel stand in the core's place for samples of `seqlen` tokens."""
        return False

    def require(self) -> None:
        """Raise `ValueError`, naming the extra, if a package that `apply` needs is not installed."""

    def check(self, config: TrainConfig) -> None:
        """Raise `ValueError` for settings that cannot work. The message gives the values, the rule and the fix."""

    def check_played(self, config: TrainConfig) -> None:
        """Raise `ValueError` unless one rank shows the bytes of the fullest, as in a run that executes one for all."""

    def period(self) -> int:
        """Number of layers per checkpoint segment."""
        return 1

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        """Change `model` in place, before checkpointing and the engine's sharding."""

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        """Turn on activation checkpointing of the decoder layers."""
        from alst_impl import hf

        hf.stock_checkpointing(model, use_reentrant=False)

    def promises(self, config: TrainConfig) -> set[str]:
        """Counters of `Evidence` that must be non-zero after a step, as proof that the method ran.

        "exchanges/gathers" means one of the two: a model may have attention, other mixers, or both.
        """
        return set()

    def precision(self, config: TrainConfig) -> Precision:
        """The coarsest format that rounds a gradient. For an exact method, this is the run's dtype."""
        return config.dtype

    def mpu(self) -> ModuleType | None:
        """Parallel state for engines that take one (Megatron's mpu protocol), or None."""
        return None

    def leaving(self, model: nn.Module, *, keep: bool) -> AbstractContextManager[dict[str, Any]]:
        """Context of forwards over chunks of a sample in order, without gradients, each of which leaves what later chunks need.

        With `keep` that stays for the backwards of the sample. Yields further arguments of forwards without labels.
        """
        return nullcontext({})

    def forward_backward(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        """Forward and backward of all micro-batches of a step, after announcing their number to the engine.

        `batches` are this rank's shards. `num_valid` (int64 scalar) counts valid labels over all ranks and
        micro-batches of the step. Returns this rank's share of the global mean loss: the sum over ranks is
        the loss. Collective.
        """
        import torch

        runtime.start_step(len(batches))
        losses = [self.micro_step(runtime, batch, num_valid) for batch in batches]
        return torch.stack(losses).sum()

    def loss(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        """This rank's share of the mean loss of `batches`, as in `forward_backward`. Collective."""
        import torch

        return torch.stack([runtime.forward(batch, num_valid) for batch in batches]).sum()

    def micro_step(self, runtime: Runtime, batch: Batch, num_valid: Tensor) -> Tensor:
        """Forward and backward of one micro-batch, for methods that run them one after another. Collective."""
        loss = runtime.forward(batch, num_valid)
        runtime.backward(loss)
        return loss.detach()


class Tiled(Method):
    """Base of methods that shard the sequence over ranks and run token-wise modules and the loss in tiles."""

    tile_mlp: bool = True
    """Compute MLPs in tiles."""
    tile_norm: bool = True
    """Compute norms in tiles."""
    tile_loss: bool = True
    """Compute logits and loss in tiles."""
    tiles: int | None = Field(default=None, ge=1)
    """Number of tiles of MLP, norm and loss.
    None follows ALST (arXiv:2506.13996, section 3.1): tiles of about `hidden_size` rows for MLP and norm, and
    of 1 GiB of logits for the loss."""
    offload: bool = True
    """Keep checkpointed layer inputs in host memory."""
    overlap: bool = True
    """Overlap these copies with compute, through pinned memory. False blocks on them, as in the released recipes."""

    def check(self, config: TrainConfig) -> None:
        if self.offload and not config.checkpoint:
            raise ValueError(
                "offload moves checkpointed layer inputs, but checkpoint is false; set offload: false"
            )

    def promises(self, config: TrainConfig) -> set[str]:
        promised = {"local_seqlen"}
        if self.tile_mlp or self.tile_norm or self.tile_loss:
            promised.add("tiles")
        if self.offload:
            promised.add("offloaded_bytes")
        return promised

    def attach(
        self,
        model: PreTrainedModel,
        core: Callable[[], WholeSequence],
        shards: int | None,
        placement: Placement,
    ) -> None:
        """Install attention over `shards` ranks and the tiling in `model`, in place. None: as many as layouts say.

        `core` is called for each attention module.
        """
        from alst_impl import hf
        from alst_impl.ops.attention.ulysses import UlyssesAttention

        if shards != 1:
            hf.refuse_positions_of_shards(model)
        modules = hf.attention_modules(model)
        attentions = [UlyssesAttention(core(), placement.evidence, shards) for _ in modules]
        hf.use_attentions(model, attentions)
        hf.gather_mixers(model, placement.evidence, shards)
        tiles, evidence, config = self.tiles, placement.evidence, model.config

        def tiles_of_hidden(x: Tensor) -> int:
            return tiles or -(-x.shape[1] // x.shape[2:].numel())

        def tiles_of_logits(x: Tensor) -> int:
            logits = x.shape[0] * x.shape[1] * config.vocab_size  # which may have been resized
            return tiles or -(-logits * 4 // LOGITS_TILE_BYTES)

        tiled = self.tile_mlp or self.tile_norm
        mlps, norms = hf.token_wise_modules(model) if tiled else ([], [])
        for module in (mlps if self.tile_mlp else []) + (norms if self.tile_norm else []):
            hf.tile_module(module, tiles_of_hidden, evidence)
        if self.tile_loss:
            hf.tile_loss(model, tiles_of_logits, evidence)
        if hf.wants_router_loss(model):
            if not self.tile_loss:
                raise ValueError(
                    "a router loss (output_router_logits) over shards is computed beside the tiled loss, but tile_loss "
                    "is false; set tile_loss: true"
                )
            hf.use_router_loss(model)

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        from alst_impl import hf
        from alst_impl.ops.memory.offload import HostOffload

        offload = HostOffload(placement, overlap=self.overlap) if self.offload else None
        hf.checkpoint_layers(model, offload)


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check_sharded(
    config: TrainConfig, sp: int, method: str, cp: int = 1, knows: Collection[str] = ()
) -> None:
    """Raise `ValueError` unless `cp` and `sp` divide the ranks and the model can be sharded exactly over both.

    `knows` are the features of models (`alst_impl.models.FEATURES`) that the method computes exactly.
    """
    for axis, degree, ranks in (("cp", cp, config.world_size), ("sp", sp, config.world_size // cp)):
        if ranks % degree:
            of = "world_size" if ranks == config.world_size else "world_size / cp"
            raise ValueError(
                f"{axis} ({degree}) must divide {of} ({ranks}) for method '{method}'; "
                f"use {axis} in {divisors(ranks)}"
            )
    fields = described(config.model, config.overrides)
    check_shardable(fields, sp, method, config.model, knows)
    check_rotary(fields, "cp", cp, config.model)


def check_shardable(
    fields: dict[str, Any], sp: int, method: str, model: str, knows: Collection[str] = ()
) -> None:
    """Raise `ValueError` unless a model with configuration `fields` can be sharded exactly over `sp`."""
    heads = field(fields, "num_attention_heads") if "num_attention_heads" in fields else sp
    if heads % sp:
        raise ValueError(
            f"num_attention_heads ({heads}) must be divisible by sp ({sp}) for method '{method}'; "
            f"use sp in {divisors(heads)}"
        )
    reason = unsupported(fields, knows)
    if reason:
        raise ValueError(
            f"model '{model}' has {reason}, which method '{method}' cannot shard exactly; "
            "use method 'baseline'"
        )
    check_rotary(fields, "sp", sp, model)


def check_rotary(fields: dict[str, Any], axis: str, parts: int, model: str) -> None:
    """Raise `ValueError` for rotary scaling by longest position if the sequence is split into several `parts`."""
    scaling = rotary_by_longest(fields)
    if scaling is not None and parts > 1:
        raise ValueError(
            f"model '{model}' has rotary scaling '{scaling}', whose frequencies depend on the longest position of "
            f"the sequence, but at {axis} ({parts}) each part sees only its own positions; use {axis}=1"
        )


def check_flash_by_name(config: TrainConfig, method: str) -> None:
    """Raise `ValueError` unless PyTorch's flash operators can run the attention, because `method` uses their log-sum-exp."""
    if not load_core(config.attention).by_operator:
        raise ValueError(
            f"method '{method}' calls PyTorch's flash operators, but attention is '{config.attention}'; use sdpa, "
            "sdpa_flash, flash_attention_3 or flash_attention_4"
        )


def check_attends(config: TrainConfig) -> None:
    """Raise `ValueError` if attention has a pattern that the method does not compute."""
    pattern = load_core(config.attention).pattern
    if pattern is not None and not load_method(config.method).attends(pattern):
        raise ValueError(
            f"method '{config.method.name}' does not compute attention pattern {pattern.text}; use method 'alst'"
        )


def check_pattern(config: TrainConfig) -> None:
    """Raise `ValueError` if attention has a pattern that makes no sense for the samples, for the method or for the model."""
    pattern = load_core(config.attention).pattern
    if pattern is None:
        return
    pattern.check(config.seqlen)
    check_attends(config)
    fields = described(config.model, config.overrides)
    for name, limit in (
        ("sliding_window", window(fields)),
        ("attention_chunk_size", fields.get("attention_chunk_size")),
    ):
        if limit is not None and limit < config.seqlen:
            raise ValueError(
                f"model '{config.model}' limits the keys that a query sees itself ({name}={limit} at seqlen "
                f"{config.seqlen}), and attention pattern {pattern.text} does not join other limits; use a model without, "
                "or leave the pattern out"
            )


def counted(evidence: dict[str, int], promise: str) -> int:
    """The count that a promise names: of one counter, or of several that stand for each other ("exchanges/gathers")."""
    return sum(evidence[name] for name in promise.split("/"))


def layouts(config: TrainConfig) -> list[Layout]:
    """The plan of every micro-batch of a run."""
    return load_method(config.method).plan([config.seqlen], config.world_size)


def step_samples(config: TrainConfig) -> int:
    """Samples of an optimizer step, over all ranks and micro-batches."""
    return config.batch_size * config.accumulation * len(layouts(config))


def check_method(config: TrainConfig) -> None:
    """Raise `ValueError` unless the method can train on all that the source of `config` may give it."""
    source = load_source(config.data.source)
    source.check(config)
    check_pattern(config)
    for seqlen in source.seqlens(config.seqlen):
        load_method(config.method).check(config.model_copy(update={"seqlen": seqlen}))


def load_method(spec: Spec) -> Method:
    """The method that `spec` names."""
    return load("alst_impl.methods", Method, spec)
