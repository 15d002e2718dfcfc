"""transformers' Trainer around an enabled model: exact, or refused with a one-line error."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from small import LAUNCHER, batches, enabled, stock_gradients, stock_model
from training import assert_same_gradients

from alst_impl import LongSequenceTrainer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Ranks


def samples() -> list[dict[str, Any]]:
    """Four samples."""
    return [
        {"input_ids": ids, "labels": labels}
        for batch in batches()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def options(folder: str, **others: Any) -> Any:
    """Arguments of a trainer that takes one step of plain SGD, whose update is the gradient."""
    from transformers import TrainingArguments

    os.environ.update(LAUNCHER)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        **others,
    }
    return TrainingArguments(
        folder,
        use_cpu=True,
        report_to=[],
        optim="sgd",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )


def long_trainer() -> type[Any]:
    """Trainer on long sequences."""
    from transformers import Trainer

    return type("LongTrainer", (LongSequenceTrainer, Trainer), {})


def in_trainer(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: transformers' Trainer around an enabled model."""
    from transformers import Trainer

    def trainer(kind: type[Any], model: Any, accumulation: int) -> Any:
        arguments = options(folder, gradient_accumulation_steps=accumulation)
        return kind(model, arguments, train_dataset=samples())

    with pytest.raises(ValueError, match="is not enabled; call enable"):
        trainer(long_trainer(), stock_model(), 1).train()
    model, _ = enabled(2)
    with pytest.raises(ValueError, match="called without a shard"):
        trainer(Trainer, model, 1).train()

    model, alst = enabled(2)

    class Sharding(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**alst.shard(inputs)).loss

    with pytest.raises(ValueError, match="got different samples"):
        trainer(Sharding, model, 1).train()

    # Without a count for the step.
    class SameSamples(Sharding):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(cast("Any", samples()), batch_size=2)

    with pytest.raises(ValueError, match="accumulated gradients need one count"):
        trainer(SameSamples, model, 2).train()

    model, alst = enabled(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    right = trainer(long_trainer(), model, 2)
    right.train()
    truth = stock_gradients(stock_model(), batches())
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    assert_same_gradients(moved, truth)
    stock = stock_model()
    labels = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches())
    losses = [float(stock(**b, num_items_in_batch=labels).loss) for b in batches()]
    assert right.state.log_history[0]["loss"] == pytest.approx(sum(losses), abs=1e-3)


def test_transformers_trainer_is_exact_or_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Refused: the plain Trainer, one that shards its own samples, one that accumulates without a
    count. Exact: one with all settings.
    """
    ranks(2)(in_trainer, str(tmp_path))


def smoothed(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Label smoothing."""
    return {"label_smoothing_factor": 0.1}, {}


def own_loss(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A loss function of logits."""
    return {}, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}


def grouped(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples of similar lengths."""
    return {"train_sampling_strategy": "group_by_length"}, {}


def streamed(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A data set without a length."""

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(samples())

    return {}, {"train_dataset": Stream()}


REFUSED = {
    smoothed: "label_smoother computes a loss from logits",
    own_loss: "compute_loss_func computes a loss from logits",
    grouped: "deals out samples by rank",
    streamed: "has no index",
}


def unsupported(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: options that cannot be exact."""
    for case, match in REFUSED.items():
        model, _ = enabled(2)
        settings, parts = case(folder)
        trainer = long_trainer()(
            model, options(folder, **settings), **{"train_dataset": samples(), **parts}
        )
        with pytest.raises(ValueError, match=match):
            trainer.train()
    from transformers import Trainer

    class OwnLoss(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).logits.sum()

    kind = type("LongTrainer", (LongSequenceTrainer, OwnLoss), {})
    with pytest.raises(ValueError, match=r"OwnLoss\.compute_loss computes a loss from logits"):
        kind(enabled(2)[0], options(folder), train_dataset=samples()).train()
    model, alst = enabled(2)
    trainer = long_trainer()(model, options(folder), eval_dataset=samples())
    with pytest.raises(ValueError, match="need logits of whole samples"):
        trainer.predict(samples())
    stock = stock_model().eval()
    with torch.no_grad():
        losses = [float(stock(**{k: v[None] for k, v in s.items()}).loss) for s in samples()]
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert alst.shards == 2


def test_options_that_need_whole_samples_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Smoothed labels, losses of logits, samples dealt out by rank, streams and predictions; evaluation is exact."""
    ranks(2)(unsupported, str(tmp_path))


def stops_and_goes_on(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: three epochs of two steps, without and with a break in the second epoch."""
    trained = []
    for steps in ((6,), (3, 6)):
        for last in steps:
            model, _ = enabled(2)
            settings = {"max_steps": last, "save_strategy": "steps", "save_steps": 3}
            arguments = options(f"{folder}/{len(steps)}", learning_rate=0.1, **settings)
            trainer = long_trainer()(model, arguments, train_dataset=samples())
            trainer.train(resume_from_checkpoint=last != steps[0])
        trained.append({name: p.detach() for name, p in model.named_parameters()})
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert not all(torch.equal(epochs[0], order) for order in epochs[1:])
    before = dict(stock_model().named_parameters())
    changes = [{n: before[n].detach() - p for n, p in each.items()} for each in trained]
    assert_same_gradients(changes[1], changes[0])


def test_a_trainer_resumes_within_an_epoch(ranks: Ranks, tmp_path: Path) -> None:
    """The order of samples is that of its epoch, also after the break."""
    ranks(2)(stops_and_goes_on, str(tmp_path))


def under_zero(rank: int, world_size: int, folder: str, stage: int) -> dict[str, Any]:
    """Body of a rank: Trainer with DeepSpeed. Returns the gradients, from the update of SGD."""
    import deepspeed

    rate = 1000.0  # the change of a weight is its gradient, without rounding beside the weight
    zero = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    settings = {"deepspeed": zero, "gradient_accumulation_steps": 2, "learning_rate": rate}
    arguments = options(folder, **settings)
    model, _ = enabled(2, stock_model(torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    long_trainer()(model, arguments, train_dataset=samples()).train()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: (before[name] - p.detach()) / rate for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_with_deepspeed_has_the_gradients_of_the_stock_model(
    ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    """Two micro-batches under ZeRO 2 and 3, which average over ranks."""
    truth = stock_gradients(stock_model(), batches())
    for ours in ranks(2)(under_zero, str(tmp_path), stage):
        assert_same_gradients(ours, truth)
