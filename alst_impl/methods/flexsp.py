"""FlexSP: groups of several sequence-parallel degrees side by side, chosen for each global batch (arXiv:2412.01523).

The documents of a step's samples, of all ranks and micro-batches together, are planned anew: each goes whole into one
group of ranks, which packs its documents and runs Ulysses over them. Parameters are sharded over all ranks, so groups
change from one micro-batch to the next and move no weights. All ranks run equally many micro-batches; one that a plan
leaves idle runs a token without a label, to take its part in the engine's collectives.

Every rank makes the same plan, from lengths that the seed fixes and with the same release of scipy, while the step before it
trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, PrivateAttr

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.config import Tokens as Length
from alst_impl.engines.base import load_engine
from alst_impl.layout import IGNORE_INDEX, Layout, make_mesh
from alst_impl.methods.base import Tiled, check_shardable, divisors, step_samples
from alst_impl.models import described, rotary_by_longest
from alst_impl.models import field as field_of
from alst_impl.planners.base import Cluster, Groups, Lengths, Plan, Seconds, load_planner
from alst_impl.sources.base import load_source

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch, Corpus
    from alst_impl.placement import Placement


class Speeds(Frozen):
    """What a plan takes the devices to reach. Only their ratios decide. Round numbers of H100 with NVLink."""

    flops: float = Field(default=4e14, gt=0)
    """FLOP/s of a device."""
    node: int = Field(default=8, ge=1)
    """Devices whose links are fast."""
    within: float = Field(default=3e11, gt=0)
    """Bytes per second that a device of a node exchanges with others of it."""
    beyond: float = Field(default=4e10, gt=0)
    """Bytes per second that a device exchanges with those of other nodes."""

    def exchanging(self, devices: int) -> float:
        """Bytes per second that each of `devices` exchanges with the others."""
        return self.within if devices <= self.node else self.beyond


@dataclass(frozen=True)
class Work:
    """Seconds of a group (`alst_impl.planners.base.Cost`), from a model's dimensions and `Speeds`."""

    quadratic: float
    """FLOPs per squared token."""
    linear: float
    """FLOPs per token."""
    exchanged: float
    """Bytes of all-to-alls per token."""
    gathered: float
    """Bytes of parameters that each device gathers in a micro-batch."""
    devices: int
    speeds: Speeds

    @property
    def fixed(self) -> float:
        """Gathers of parameters, as if no computation hid them."""
        return self.gathered / self.speeds.exchanging(self.devices) if self.devices > 1 else 0.0

    def seconds(self, lengths: Lengths, degree: int) -> Seconds:
        """Computation, and all-to-alls of what is not the device's own already."""
        tokens = lengths.astype(np.float64)
        computing = (self.quadratic * tokens**2 + self.linear * tokens) / self.speeds.flops
        sent = self.exchanged * tokens * (degree - 1) / degree
        return (computing + sent / self.speeds.exchanging(degree)) / degree


def work_of(model: PreTrainedModel, config: TrainConfig, speeds: Speeds) -> Work:
    """The work of `model`. Every layer counts as full causal attention, and every expert as used."""
    fields = described(config.model, config.overrides)
    heads, layers = (
        field_of(fields, f"num_{what}") for what in ("attention_heads", "hidden_layers")
    )
    width = fields.get("head_dim") or field_of(fields, "hidden_size") // heads
    shared = fields.get("num_key_value_heads") or heads
    parameters = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = sum(p.numel() for p in {*embedding.parameters()} - {*head.parameters()})
    forwards, itemsize = 2 if config.checkpoint else 1, model.dtype.itemsize
    passes = forwards + 2  # backward counts twice
    return Work(
        # q k^T and p v over half of all pairs, at two FLOPs per product
        quadratic=passes * 2 * layers * heads * width,
        linear=passes * 2 * (parameters - looked_up),
        # queries, keys, values and outputs, in each forward and in backward
        exchanged=(forwards + 1) * layers * 2 * (heads + shared) * width * itemsize,
        gathered=2 * parameters * itemsize,
        devices=config.world_size,
        speeds=speeds,
    )


Place = tuple[int, slice]
"""The sample of a document, and where in it the document is."""
Planned = tuple[Plan, list[Place]]
"""The plan of a step, and the places of its documents."""


@dataclass(frozen=True)
class _Ahead:
    """A plan that is made while an earlier step trains."""

    corpus: Corpus
    step: int
    planned: Future[Planned]


@dataclass(frozen=True)
class _Running:
    """What a run of the method keeps from step to step."""

    meshes: dict[int, DeviceMesh]
    """All ranks in groups of each degree."""
    cluster: Cluster
    work: Work
    planning: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "plan"))
    ahead: list[_Ahead] = field(default_factory=list)
    """At most one."""


class Flexsp(Tiled):
    """Everything inside a group is as in ALST. A step has as many samples as ALST's at the same `sp`."""

    knows: ClassVar[frozenset[str]] = frozenset({"softcap", "sinks"})
    sp: int = Field(default=1, ge=1)
    """Ranks of the largest groups, a power of two."""
    planner: Spec = Spec(name="flexsp")
    """File in `alst_impl/planners/` and its options."""
    tokens: Length | None = None
    """Tokens that a rank holds in a micro-batch. None: as many as one of a largest group holds of `batch_size` samples."""
    speeds: Speeds = Speeds()
    """What a plan takes the devices to reach."""
    _running: _Running | None = PrivateAttr(default=None)

    def require(self) -> None:
        load_planner(self.planner).require()

    def layout(self, length: int) -> Layout:
        """That of the largest groups."""
        return Layout(length, sp=self.sp)

    def cluster(self, config: TrainConfig) -> Cluster:
        """The ranks, what they hold, and the degrees of groups."""
        tokens = self.tokens or config.batch_size * self.layout(config.seqlen).local
        powers = range(self.sp.bit_length())
        return Cluster(config.world_size, tokens, tuple(2**power for power in powers))

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        powers = [n for n in divisors(config.world_size) if not n & (n - 1)]
        if self.sp not in powers:
            raise ValueError(
                f"sp ({self.sp}) must be a power of two that divides world_size ({config.world_size}) for method "
                f"'flexsp', whose other groups are halves of the largest; use sp in {powers}"
            )
        fields = described(config.model, config.overrides)
        check_shardable(fields, self.sp, "flexsp", config.model, self.knows)
        scaling = rotary_by_longest(fields)
        if scaling is not None:
            raise ValueError(
                f"model '{config.model}' has rotary scaling '{scaling}', whose frequencies depend on the longest position "
                "of what runs together, which a plan changes; use method 'alst'"
            )
        cluster = self.cluster(config)
        degree = load_planner(self.planner).model_dump().get("degree") or self.sp
        if degree not in cluster.degrees:
            raise ValueError(
                f"planner '{self.planner.name}' makes groups of degree {degree}, but method 'flexsp' at sp ({self.sp}) has "
                f"those of {list(cluster.degrees)}; use one of them, or a larger sp"
            )
        if config.seqlen > degree * cluster.tokens:
            raise ValueError(
                f"no group can hold a document of seqlen ({config.seqlen}) tokens: the largest has {degree} ranks, which "
                f"hold {cluster.tokens} tokens each; use tokens={-(-config.seqlen // degree)}, or a larger sp"
            )
        if load_source(config.data.source).tokens_beyond:
            raise ValueError(
                f"source '{config.data.source.name}' gives the sequences of a step one length, so there is nothing to "
                "plan; use method 'alst'"
            )
        if load_engine(config.engine).updates_in_backward:
            raise ValueError(
                "update_in_backward updates in every backward, but method 'flexsp' runs as many micro-batches as a plan "
                "has; use update_in_backward: false"
            )

    def check_played(self, config: TrainConfig) -> None:
        if config.data.packed or load_source(config.data.source).packs:
            raise ValueError(
                "a forecast plays one rank for all, but of packed documents method 'flexsp' makes a plan for each step, "
                "which decides what rank is the fullest; leave documents and source out: it then plays a full rank"
            )
        if self.tokens is not None:
            raise ValueError(
                f"a forecast plays a rank that samples fill, but tokens ({self.tokens}) does not follow from their length; "
                f"leave tokens out, and use a seqlen of {self.tokens * self.sp} (tokens x sp)"
            )

    def promises(self, config: TrainConfig) -> set[str]:
        # It depends on the plan.
        return super().promises(config) - {"local_seqlen"}

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl.ops.attention.cores.base import load_core

        cluster = self.cluster(config)
        meshes = {self.sp: mesh}
        for degree in cluster.degrees[:-1]:
            groups = [Layout(1, sp=degree)] * (cluster.devices // degree)
            meshes[degree] = make_mesh(groups, mesh.device_type)
        self._running = _Running(meshes, cluster, work_of(model, config, self.speeds))
        core = load_core(config.attention)
        self.attach(model, lambda: core, None, placement)

    def micro_batches(
        self, config: TrainConfig, corpus: Corpus, mesh: DeviceMesh, step: int
    ) -> list[Batch]:
        """As `Method.micro_batches`, of the plan of `step`. Begins to plan the next step."""
        running = self._running
        assert running is not None, "apply comes first"
        plan, found = self._planned(running, corpus, step, step_samples(config))
        documents, rank, batches = _Documents(corpus, found), mesh.get_rank(), []
        for number, groups in enumerate(plan.micro_batches):
            degree, members, first = group_of(groups, rank) or (1, (), rank)
            layout = Layout(1, sp=degree, mesh=running.meshes[degree])
            named = replace(layout, draws=f"{config.seed}/{step}/{number}/{first}")
            batches.append(documents.packed(members, named) if members else idle(named))
        return batches

    def finish_planning(self) -> None:
        """Wait until the plan that was begun is made."""
        assert self._running is not None, "apply comes first"
        for each in self._running.ahead:
            each.planned.result()

    def _planned(self, running: _Running, corpus: Corpus, step: int, count: int) -> Planned:
        """The plan of `step`, of `count` samples; the next one's is begun."""
        planner = load_planner(self.planner)

        def plan(number: int) -> Planned:
            found = places(corpus, range(number * count, (number + 1) * count))
            lengths = [place.stop - place.start for _, place in found]
            return planner.plan(lengths, running.cluster, running.work), found

        own = [a.planned for a in running.ahead if a.corpus is corpus and a.step == step]
        (planned,) = own or [running.planning.submit(plan, step)]
        running.ahead[:] = [_Ahead(corpus, step + 1, running.planning.submit(plan, step + 1))]
        return planned.result()


def group_of(groups: Groups, rank: int) -> tuple[int, tuple[int, ...], int] | None:
    """Degree, documents and first rank of the group of `rank`; None if it is idle."""
    first = 0
    for group in groups:
        if rank < first + group.degree:
            return group.degree, group.documents, first
        first += group.degree
    return None


def places(corpus: Corpus, samples: Iterable[int]) -> list[Place]:
    """The places of all documents of `samples`, in order."""
    found = list[Place]()
    for sample in samples:
        lengths = corpus.lengths(sample)
        ends = accumulate(lengths)
        found += [(sample, slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    return found


@dataclass(frozen=True)
class _Documents:
    """The documents of a step. Only samples that are asked for are read."""

    corpus: Corpus
    places: Sequence[Place]
    read: dict[int, Batch] = field(default_factory=dict)

    def packed(self, members: Sequence[int], layout: Layout) -> Batch:
        """This rank's shard of documents `members`, one after another in a sample of their own: [1, s]."""
        import torch

        from alst_impl.data import Batch

        chosen = [self.places[number] for number in members]
        for sample in {sample for sample, _ in chosen} - self.read.keys():
            self.read[sample] = self.corpus.batch([sample])
        lengths = tuple(place.stop - place.start for _, place in chosen)

        def joined(name: str) -> Tensor:
            parts = [getattr(self.read[sample], name)[:, place] for sample, place in chosen]
            return torch.cat(parts, dim=1)

        whole = Batch(
            joined("input_ids"),
            joined("shift_labels"),
            joined("position_ids"),
            Layout(sum(lengths), documents=(lengths,)),
        )
        return replace(layout, length=sum(lengths)).cut(whole)


def idle(layout: Layout) -> Batch:
    """A token without a label, for a rank that has no documents: [1, 1]."""
    import torch

    from alst_impl.data import Batch

    token = torch.zeros(1, 1, dtype=torch.int64)
    labels = torch.full_like(token, IGNORE_INDEX)
    return Batch(token, labels, token, replace(layout, documents=((1,),)))
