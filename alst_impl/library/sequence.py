"""What `enable` returns: everything that a training loop calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedModel

from alst_impl import safeguards
from alst_impl.data import Batch
from alst_impl.hf import router
from alst_impl.layout import IGNORE_INDEX
from alst_impl.library.batches import check_tokens, labels_of, read, shifted
from alst_impl.library.guard import Guard, Reduction, Shard, part_names, stock_forward
from alst_impl.library.setting import SHARED, Setting
from alst_impl.placement import Evidence

DRAWN = 2**40
"""Bound of the numbers of which each rank draws one for a micro-batch; int64 holds their sum over ranks."""
TOLD_NAMES = 3
"""Maximum number of parameters that a warning names."""


@dataclass(frozen=True)
class LongSequence:
    """A model whose samples are each shared by several ranks of `mesh`."""

    model: PreTrainedModel
    """The transformers model itself, inside any wrapper of peft."""
    mesh: DeviceMesh
    """All ranks: `dp` ranks hold different samples, the ranks of the other axes share each sample."""
    device: torch.device
    """Where `shard` puts its tensors."""
    reduction: Reduction
    evidence: Evidence
    """Counts of what the method did on this rank."""
    _setting: Setting
    _guard: Guard

    def __deepcopy__(self, _: dict[int, Any]) -> LongSequence:
        """This object: a copy of the model runs on the same ranks."""
        return self

    def shard(
        self, batch: Mapping[str, Any], *, num_items: Tensor | int | None = None
    ) -> dict[str, Any]:
        """This rank's keyword arguments for `model(...)`, from a collator's batch of whole samples. Collective.

        `batch` holds int64 tensors [B, S] on any device. `labels` are *not* shifted; -100 is ignored. An
        `attention_mask` may pad right. Where `position_ids` restart, or at offsets `cu_seq_lens_q`, a packed
        document begins. `num_items` is the number of valid labels of the whole optimizer step, as `count`
        returns it; a step of several micro-batches needs it.

        The `.loss` of that call is scaled for `reduction`: its mean (or sum) over all ranks is the stock model's
        loss, and the mean (or sum) of the gradients is the stock model's gradient.
        Masks of dropout follow from a number that it draws from each rank's generator (`alst_impl.ops.draws`).

        Raises `ValueError` on all ranks if the batch cannot be sharded exactly, if ranks that share a sample hold
        different ones, if `num_items` is wrong for the step, if parameters differ between ranks, if the
        engine combines gradients otherwise, or if the method cuts the samples into `chunks`.
        """
        local, num_labels, declared = self._cut(batch, num_items, limit=1)
        return _inputs(local, Shard(num_labels, declared, _divisor(local, declared), local.layout))

    def chunks(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Any],
        *,
        num_items: Tensor | int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `shard`, for one chunk of the samples after another; for methods without chunks, once. Collective.

            for inputs in alst.chunks(model, batch, num_items=alst.count(batches)):
                model(**inputs).loss.backward()

        `model` is what the loop calls: the model, or an engine's wrapper. The first iteration calls it without gradients for
        the keys and values of all chunks but the last. Losses of the chunks add up to that of the batch.

        Samples have as many chunks on all ranks, those of the longest sample.

        Raises `ValueError` as `shard` does, if a chunk's backward did not run before the next chunk, or under
        DeepSpeed, which counts backwards.
        """
        local, num_labels, declared = self._cut(batch, num_items, limit=None)
        method, divisor = self._setting.method, _divisor(local, declared)
        *earlier, last = method.chunks(local)
        if earlier and safeguards.is_deepspeed(self.model):
            raise ValueError(
                f"DeepSpeed counts backward passes, but this batch has one for each of {len(earlier) + 1} chunks; use "
                "fully_shard or DDP, or a chunk as long as the samples"
            )
        if not torch.is_grad_enabled():
            with method.leaving(self.model, keep=False):
                for chunk in (*earlier, last):
                    yield _inputs(chunk, Shard(0, declared, divisor, chunk.layout))
            return
        with method.leaving(self.model, keep=True) as arguments, torch.no_grad():
            for chunk in earlier:
                inputs = _inputs(chunk, Shard(0, declared, None, chunk.layout))
                del inputs["labels"], inputs["shift_labels"]
                model(**inputs, **arguments)
        labels, before = self._guard.labels, self._guard.labels.backwards
        for number, chunk in enumerate((last, *reversed(earlier))):
            if labels.backwards != before + number:
                raise ValueError(
                    f"{labels.backwards - before} backward passes ran for chunks up to {number}, but each chunk has exactly one "
                    "before the next: for inputs in alst.chunks(model, batch): model(**inputs).loss.backward()"
                )
            # A step without its last backward has too few labels.
            counted = 0 if chunk.layout.part and chunk.layout.part.index else num_labels
            yield _inputs(chunk, Shard(counted, declared, divisor, chunk.layout))

    def sampler(
        self,
        dataset: Dataset[Any],
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> DistributedSampler[Any]:
        """Indices of this rank's samples for a `DataLoader`: the same on ranks that share samples. Local.

        Call its `set_epoch(epoch)` before each epoch, for another order. Every rank gets equally many: the last
        ones repeat the first, or are dropped. Raises `ValueError` for a dataset without a length.
        """
        if not isinstance(dataset, Sized):
            raise ValueError(
                f"{type(dataset).__name__} has no length, so its samples cannot be dealt out by index; let it "
                f"yield every {self._setting.groups}th sample, from alst.mesh.get_local_rank('dp') on"
            )
        return DistributedSampler(
            dataset,
            num_replicas=self._setting.groups,
            rank=self._setting.group_of(dist.get_rank()),
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )

    def count(self, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """Valid labels of one optimizer step on all ranks, int64 scalar: the `num_items` of `shard`. Collective.

        `batches` are this rank's micro-batches of the step, whole, as `shard` takes them.
        """
        valid = [int((shifted(labels_of(batch)) != IGNORE_INDEX).sum()) for batch in batches]
        total = torch.tensor(valid, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return (total // self.shards).sum()  # whose ranks hold the same samples

    def reduce_loss(self, loss: Tensor) -> float:
        """The mean loss over all valid labels of all ranks, for logs. Collective, and waits for the device.

        `loss` is the loss of a step: the sum of its micro-batches' losses.
        """
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total) / self._averaged

    def reduce_gradients(self) -> None:
        """Combine every gradient over all ranks, by `reduction`; for a model without an engine. Collective.

        A gradient that is missing on some ranks counts as zero there. A parameter without a gradient on any
        rank is left alone, and a warning names it. Raises `ValueError` for a sharded model.
        """
        if safeguards.is_sharded(self.model):
            raise ValueError(
                "reduce_gradients() is for replicated parameters; fully_shard and DeepSpeed reduce "
                "gradients themselves: leave the call out"
            )
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name in self._without_gradient(named):
            del named[name]
        for parameter in named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self._averaged

    def forget(self) -> None:
        """Call this after dropping gradients without an optimizer step. Local."""
        self._guard.labels.forget()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the model is the stock one, to generate or to evaluate whole samples. Local.

        Each rank computes its own input. Parameters that an engine shards are still gathered at each call, so
        all ranks make equally many calls (`generate(synced_gpus=True)`).
        """
        with stock_forward(self.model):
            yield

    @property
    def shards(self) -> int:
        """Number of ranks that share each sample."""
        return self._setting.shards

    def _cut(
        self, batch: Mapping[str, Any], num_items: Tensor | int | None, limit: int | None
    ) -> tuple[Batch, int, int]:
        """This rank's shard of `batch`, its valid labels on all ranks, and those of the step. Collective.

        `limit` is the number of chunks that the samples may have; None if any.
        """
        self._check_model()
        refusal, whole, passes = None, None, 1
        try:
            whole = read(batch)
            self._setting.check_layout(whole.layout)
            router.check_batch(self.model, batch)
            check_tokens(self.model, batch)
            passes = self._setting.passes(whole.layout.length, limit)
        except ValueError as error:
            refusal = error
        num_labels, drawn = self._agreed(whole, num_items, refusal)
        assert whole is not None, "a refusal was raised"
        declared = num_labels if num_items is None else int(num_items)
        _expect(self._guard, self.model, num_labels, declared)
        layout = self._setting.method.layout(whole.layout.length)
        if self._setting.method.longest_chunk():
            # Engines wait for each other in every pass.
            most = torch.tensor(passes, device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            layout = replace(layout, passes=int(most))
        group = self._setting.group_of(dist.get_rank())
        named = f"{drawn}/{group}" if self._setting.draws else None
        layout = replace(layout, mesh=self.mesh, draws=named)
        local = self._setting.method.shard(whole, layout).to(self.device)
        return local, num_labels, declared

    @property
    def _averaged(self) -> int:
        """Number of ranks that gradients are averaged over; 1 if they are summed."""
        return self.mesh.size() if self.reduction == "mean" else 1

    def _check_model(self) -> None:
        """Raise `ValueError` if engines combine gradients otherwise, or if parts were replaced. Local."""
        safeguards.check_sharding(self.model, self.mesh.size(), self._averaged)
        if self._guard.parts is not None and self._guard.parts != part_names(self.model):
            raise ValueError(
                f"modules of the decoder layers of {type(self.model).__name__} were replaced after enable(), but "
                f"method '{self._setting.name}' computes with those that it found; add adapters and the like "
                "before enable()"
            )

    def _without_gradient(self, named: dict[str, torch.nn.Parameter]) -> list[str]:
        """Names of parameters that have no gradient on any rank, with a warning. Collective."""
        have = torch.tensor([p.grad is not None for p in named.values()], device=self.device).int()
        missing = (have == 0).sum()
        dist.all_reduce(missing)
        if int(missing) == 0:
            return []
        dist.all_reduce(have)
        without = [name for name, n in zip(named, have.tolist(), strict=True) if n == 0]
        if without:
            warnings.warn(
                f"{len(without)} trainable parameters have no gradient on any rank: "
                f"{', '.join(without[:TOLD_NAMES])}{', ...' if len(without) > TOLD_NAMES else ''}; "
                "they are not part of the loss",
                stacklevel=3,
            )
        return without

    def _agreed(
        self, whole: Batch | None, num_items: Tensor | int | None, refusal: ValueError | None
    ) -> tuple[int, int]:
        """Valid labels of this micro-batch on all ranks, and a random number that is the same on all of them.

        Raises `ValueError` on all ranks if what must be the same differs. Collective.
        """
        name, parameter = safeguards.witness(self.model)
        valid, seen = (0, 0) if whole is None else (whole.num_valid(), safeguards.digest(whole))
        shared = [axis for axis in SHARED if axis in (self.mesh.mesh_dim_names or ())]
        sample = torch.tensor([seen], device=self.device)
        other = sum(_differ(sample, self.mesh.get_group(axis)) for axis in shared)
        declared = sample.new_tensor([-1 if num_items is None else int(num_items)])
        fingerprint = safeguards.fingerprint(parameter).to(self.device).view(1)
        apart, counts = _differ(torch.cat([fingerprint, declared]), None).tolist()
        # All ranks raise, so none waits for another.
        drawn = int(torch.randint(DRAWN, ())) if self._setting.draws else 0
        told = sample.new_tensor([int(valid), refusal is not None, drawn, 0])
        told[3:] = other
        dist.all_reduce(told)
        labels, refused, drawn, samples = told.tolist()
        if refusal is not None:
            raise refusal
        if refused:
            raise ValueError("another rank refused its batch; its message says why")
        if samples:
            raise ValueError(
                f"the {self.shards} ranks of a group that shares samples got different samples; give them "
                "the same batches: DataLoader(..., sampler=alst.sampler(dataset)), no accelerator.prepare(loader), "
                "and in a Trainer class MyTrainer(LongSequenceTrainer, Trainer)"
            )
        if apart:
            raise ValueError(
                f"parameter '{name}' differs between the {self.mesh.size()} ranks: gradients were not reduced "
                "over all of them; call alst.reduce_gradients() before optimizer.step(), or wrap the "
                "model in DDP, fully_shard or DeepSpeed over all ranks"
            )
        if counts:
            raise ValueError(
                f"num_items ({num_items}) differs between ranks; pass alst.count(all micro-batches of the step), "
                "which counts over all ranks"
            )
        return int(labels) // self.shards, int(drawn)  # whose ranks hold the same samples


def _divisor(local: Batch, declared: int) -> Tensor:
    """What the losses of a step with `declared` labels are divided by."""
    return torch.tensor(max(declared, 1), device=local.input_ids.device)


def _inputs(local: Batch, told: Shard) -> dict[str, Any]:
    """Keyword arguments of the model for the shard, or the chunk of it, `local`."""
    inputs = local.model_inputs()
    inputs.pop("layout", None)
    return {**inputs, "use_cache": False, "shard": told}


def _expect(guard: Guard, model: PreTrainedModel, num_labels: int, declared: int) -> None:
    """Tell `guard` of a micro-batch with `num_labels` of `declared` labels, if gradients are computed."""
    if not torch.is_grad_enabled():
        return
    if not safeguards.is_sharded(model) and all(p.grad is None for p in model.parameters()):
        guard.labels.forget()  # gradients were dropped, as a scaler does after an overflow
    guard.labels.expect(num_labels, declared)


def _differ(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Which of `values` (int64 [N]) differ between ranks of `group`, as int64 [N]. Collective."""
    bounds = torch.stack([values, -values])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds[0], -bounds[1]
    return (largest != smallest).long()
