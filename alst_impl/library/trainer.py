"""Long sequences in transformers' Trainer, and in trainers that inherit from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from alst_impl.library.enabling import enabled

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput
    from transformers.training_args import TrainingArguments

    from alst_impl.library.sequence import LongSequence
else:
    Trainer = object


class _Batches(BatchSampler):
    """Batches of indices whose order changes with the epoch, also under what skips batches on resuming."""

    sampler: DistributedSampler[Any]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.sampler.set_epoch(epoch)


class _Loader(DataLoader[Any]):
    """A loader of `_Batches`."""

    batch_sampler: _Batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`."""
        self.batch_sampler.set_epoch(epoch)


OF_THE_MODEL = {
    "transformers.trainer.Trainer.compute_loss",
    "trl.trainer.sft_trainer.SFTTrainer.compute_loss",
}
"""Losses of trainers that are the model's own, so that `LongSequenceTrainer.compute_loss` may replace them."""


class LongSequenceTrainer(Trainer):
    """Mixin for transformers' `Trainer`, TRL's `SFTTrainer` and others that inherit from it.

        class MyTrainer(LongSequenceTrainer, Trainer): ...

        args = TrainingArguments(...)  # starts the process group
        enable(model, sp=2)
        MyTrainer(model, args, train_dataset=dataset).train()

    Ranks that share samples get the same ones, labels are counted over the whole step, and training losses are
    the stock model's. Evaluation averages the losses of batches of whole samples; a number of samples that does
    not divide into batches gives a warning. Raises `ValueError` for trainers and options that replace the
    model's own loss, or that need logits of whole samples.
    """

    loss_is_scaled_for_ga = True  # by the labels of the whole step

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.ddp_find_unused_parameters is None:
            # For a model in peft's wrapper Trainer lets DDP search, which finds all of a checkpointed layer unused.
            self.args.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # An evaluation before the first step marks the bare model as prepared, so accelerate would leave out DDP.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy ('{strategy}') deals out samples by rank, but ranks share samples; use "
                "'random' or 'sequential'"
            )
        loader, drop_last = super().get_train_dataloader(), self.args.dataloader_drop_last
        return self._by_sample(
            loader, self._train_batch_size, shuffle=strategy == "random", drop_last=drop_last
        )

    def get_eval_dataloader(
        self, eval_dataset: str | Dataset[Any] | None = None
    ) -> DataLoader[Any]:
        loader = super().get_eval_dataloader(eval_dataset)
        size = self.args.eval_batch_size * (self.args.world_size // self._alst.shards)
        if isinstance(loader.dataset, Sized) and len(loader.dataset) % size:
            warnings.warn(
                f"{len(loader.dataset)} samples do not divide into batches of {size}: ranks repeat samples and the last "
                "batch weighs as much as the others in eval_loss; use a multiple",
                stacklevel=2,
            )
        return self._by_sample(loader, self.args.eval_batch_size, shuffle=False, drop_last=False)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return int(super().get_total_train_batch_size(args) // self._alst.shards)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._alst.count(batches)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The scaled loss of this rank's shard of `inputs`, whole samples. Collective."""
        self._check_loss()
        outputs = model(**self._alst.shard(inputs, num_items=num_items_in_batch))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean loss over all labels of a batch of all ranks, and no logits. Collective."""
        if not prediction_loss_only:
            raise ValueError(
                "predictions (compute_metrics, predict) need logits of whole samples, but each rank holds a part; "
                "use prediction_loss_only=True, or predict in `with alst.disabled():`"
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        assert isinstance(loss, Tensor), "outputs were not asked for"
        return loss.new_tensor(self._alst.reduce_loss(loss)), None, None

    @property
    def _alst(self) -> LongSequence:
        assert isinstance(self.model, nn.Module), "Trainer made or got a model"
        return enabled(self.model)

    def _check_loss(self) -> None:
        """Raise `ValueError` unless the trainer's loss is the model's own."""
        theirs = super().compute_loss
        replaced = [
            o for o in ("compute_loss_func", "label_smoother") if getattr(self, o) is not None
        ]
        if f"{theirs.__module__}.{theirs.__qualname__}" not in OF_THE_MODEL:
            replaced.append(theirs.__qualname__)
        if (loss_type := getattr(self.args, "loss_type", "nll")) != "nll":
            replaced.append(f"loss_type '{loss_type}'")
        if replaced:
            raise ValueError(
                f"{replaced[0]} computes a loss from logits of whole samples, but each rank holds a part; leave it out "
                "and set model.loss_function, a sum over tokens divided by num_items_in_batch"
            )

    def _by_sample(
        self, loader: DataLoader[Any], size: int, *, shuffle: bool, drop_last: bool
    ) -> DataLoader[Any]:
        """A loader as `loader`, which deals samples out by rank, that gives ranks which share samples the same."""
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                f"{type(loader.dataset).__name__} has no index, so Trainer would deal its samples out by rank, but "
                "ranks share samples; use a dataset with a length"
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = self._alst.sampler(
            loader.dataset, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        return _Loader(
            loader.dataset,
            batch_sampler=_Batches(sampler, size, drop_last=drop_last),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=False,  # shard() reads whole samples on the host, and sends a part of them
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
            multiprocessing_context=loader.multiprocessing_context,
        )
