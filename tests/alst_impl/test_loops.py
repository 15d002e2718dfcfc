"""An enabled model in common training loops: exact, or refused with a one-line error."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import peft
import pytest
import torch
import torch.distributed as dist
from small import batches, stock_gradients, stock_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_same_gradients

from alst_impl import LongSequence, LongSequenceTrainer, enable

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Ranks


def enabled(sp: int, model: Any = None, **options: Any) -> tuple[Any, LongSequence]:
    """A small model under ALST, over `sp` ranks."""
    model = stock_model() if model is None else model
    mesh = init_device_mesh("cpu", (dist.get_world_size() // sp, sp), mesh_dim_names=("dp", "sp"))
    return model, enable(model, mesh, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all parameters with a gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def whole(gradient: Any) -> Tensor:
    """The full gradient, even if `fully_shard` has sharded it."""
    tensor: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Full gradients by name."""
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


# -- engines --------------------------------------------------------------------------------------


def shard_layers(model: Any) -> None:
    """`fully_shard` as its documentation shows it."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def zero(model: Any, stage: int, accumulation: int = 1) -> Any:
    """DeepSpeed around `model`."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=sgd(model), config=settings, dist_init_required=False
    )
    return engine


def under_engines(rank: int, world_size: int) -> None:
    """Body of a rank: one sample on two ranks under every engine, two micro-batches per step."""
    from deepspeed.utils import safe_get_full_grad

    data, truth = batches(), stock_gradients(stock_model(), batches())
    for engine in ("none", "ddp", "fully_shard", "zero1", "zero2", "zero3"):
        of_zero = engine.startswith("zero")
        model, alst = enabled(2, stock_model(torch.float32 if of_zero else torch.float64))
        called = model
        if engine == "ddp":
            called = DistributedDataParallel(model)
        elif engine == "fully_shard":
            shard_layers(model)
        elif of_zero:
            called = zero(model, int(engine[-1]), len(data))
        count = alst.count(data)
        for batch in data:
            inputs = alst.shard(batch, num_items=count)
            loss = called(**inputs).loss
            called.backward(loss, scale_wrt_gas=False) if of_zero else loss.backward()
            if of_zero and batch is not data[-1]:
                called.step()
        if engine == "none":
            alst.reduce_gradients()
        ours = (
            {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
            if of_zero
            else gradients_of(model)
        )
        try:
            assert_same_gradients(ours, truth)
        except AssertionError as error:
            raise AssertionError(f"{engine}: {error}") from None


def test_gradients_are_the_stock_models_under_every_engine(ranks: Ranks) -> None:
    """The model alone and under DDP, fully_shard and ZeRO 1 to 3 has the true gradients, not 1/world of them."""
    ranks(2)(under_engines)


def sharded_over_some(rank: int, world_size: int) -> None:
    """Body of a rank: engines that do not average over all ranks."""
    batch = batches()[0]
    model, alst = enabled(2)
    fully_shard(model, mesh=alst.mesh["dp"])
    with pytest.raises(ValueError, match="sharded over 1 of 2 ranks"):
        alst.shard(batch)
    model, alst = enabled(2)
    shard_layers(model)
    model.set_gradient_divide_factor(1.0)
    with pytest.raises(ValueError, match="set_gradient_divide_factor"):
        alst.shard(batch)
    with pytest.raises(ValueError, match="leave the call out"):
        alst.reduce_gradients()


def test_engines_that_do_not_average_over_all_ranks_are_refused(ranks: Ranks) -> None:
    """`fully_shard` over dp only and `fully_shard` with sums are refused."""
    ranks(2)(sharded_over_some)


# -- accumulation ---------------------------------------------------------------------------------


def accumulate(rank: int, world_size: int) -> None:
    """Body of a rank: micro-batches with counts that are not their step's count."""
    data = batches()

    def micro_step(alst: LongSequence, model: Any, batch: dict[str, Tensor], **count: Any) -> None:
        model(**alst.shard(batch, **count)).loss.backward()

    # Each micro-batch has its own mean, under any wrapper that holds the gradients.
    for wrap in (lambda m: m, DistributedDataParallel, lambda m: shard_layers(m) or m):
        model, alst = enabled(2)
        called = wrap(model)
        micro_step(alst, called, data[0])
        with pytest.raises(ValueError, match="accumulated gradients need one count"):
            micro_step(alst, called, data[1])
    model, alst = enabled(2, stock_model(torch.float32))
    engine = zero(model, 2, 2)
    engine.backward(engine(**alst.shard(data[0])).loss, scale_wrt_gas=False)
    engine.step()
    with pytest.raises(ValueError, match="accumulated gradients need one count"):
        alst.shard(data[1])
    # DeepSpeed divides again after the count, unless it is told not to.
    model, alst = enabled(2, stock_model(torch.float32))
    engine = zero(model, 2, 2)
    count = alst.count(data)
    for batch in data:
        engine.backward(engine(**alst.shard(batch, num_items=count)).loss)
        if batch is data[0]:
            engine.step()
    with pytest.raises(ValueError, match="scale_wrt_gas=False"):
        engine.step()
    # A step with dropped gradients does not count towards the next one.
    model, alst = enabled(2)
    micro_step(alst, model, data[0])
    model.zero_grad()
    micro_step(alst, model, data[1])
    alst.reduce_gradients()
    sgd(model).step()
    # The count is doubled, as if summed over the two ranks. Then the loss is divided again.
    model, alst = enabled(2)
    for batch in data:
        micro_step(alst, model, batch, num_items=2 * count)
    alst.reduce_gradients()
    with pytest.raises(ValueError, match=f"was {2 * count}, but .* hold {count} labels"):
        sgd(model).step()
    model, alst = enabled(2)
    for batch in data:
        (model(**alst.shard(batch, num_items=count)).loss / 2).backward()
    alst.reduce_gradients()
    with pytest.raises(ValueError, match=r"multiplied by 0\.5 before backward"):
        sgd(model).step()
    with pytest.raises(ValueError, match="differs between ranks"):
        alst.shard(data[0], num_items=count + rank)
    with pytest.raises(ValueError, match=r"num_items \(3\) is less than"):
        alst.shard(data[0], num_items=3)


def test_labels_of_a_step_are_counted(ranks: Ranks) -> None:
    """Micro-batches with unequal numbers of labels need one count for the step. Otherwise the update is refused."""
    ranks(2)(accumulate)


LAUNCHER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""Variables that accelerate requires, although the group already exists."""


# -- data -----------------------------------------------------------------------------------------


def wrong_data(rank: int, world_size: int) -> None:
    """Body of a rank: wrong inputs that common loops give to the ranks of one sample."""
    from accelerate import Accelerator

    os.environ.update(LAUNCHER)
    data = batches()
    model, alst = enabled(2)
    with pytest.raises(ValueError, match="got different samples"):
        alst.shard(data[rank])
    other = {**data[0], "labels": data[0]["labels"].clone()}
    other["labels"][0, 3] = -100 if rank else 5
    with pytest.raises(ValueError, match="got different samples"):
        alst.shard(other)
    with pytest.raises(ValueError, match="called without a shard"):
        model(**data[0])
    samples = [{"input_ids": b["input_ids"][0], "labels": b["labels"][0]} for b in data]
    loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(samples))
    with pytest.raises(ValueError, match="got different samples"):
        alst.shard(next(iter(loader)))
    # Gradients that were not averaged make the parameters differ between ranks.
    model(**alst.shard(data[0])).loss.backward()
    sgd(model).step()
    model.zero_grad()
    with pytest.raises(ValueError, match="gradients were not reduced"):
        alst.shard(data[0])


def test_ranks_of_one_sample_agree_on_it(ranks: Ranks) -> None:
    """Different samples or labels, a loader that splits samples, a call without `shard` and a
    missing average are refused.
    """
    ranks(2)(wrong_data)


def in_trainer(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: transformers' Trainer around an enabled model."""
    from transformers import Trainer, TrainingArguments

    os.environ.update(LAUNCHER)
    data = [
        {"input_ids": ids, "labels": labels}
        for batch in batches()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]

    def trainer(kind: type[Trainer], model: Any, accumulation: int) -> Trainer:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            report_to=[],
            save_strategy="no",
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            disable_tqdm=True,
            logging_steps=1,
        )
        return kind(model, arguments, train_dataset=data)

    class LongSequential(LongSequenceTrainer, Trainer):
        """Trainer on long sequences."""

    with pytest.raises(ValueError, match="is not enabled; call enable"):
        trainer(LongSequential, stock_model(), 1).train()
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
            return torch.utils.data.DataLoader(cast("Any", data), batch_size=2)

    with pytest.raises(ValueError, match="accumulated gradients need one count"):
        trainer(SameSamples, model, 2).train()

    model, alst = enabled(2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    right = trainer(LongSequential, model, 2)
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


# -- changes after enable -------------------------------------------------------------------------


def generates(rank: int, world_size: int) -> None:
    """Body of a rank: generation with an enabled model."""
    prompt = batches()[0]["input_ids"][:1, :7]
    expected = stock_model().eval().generate(prompt, max_new_tokens=8, do_sample=False)
    model, alst = enabled(world_size)
    model.eval()
    match = "called without a shard" if world_size > 1 else "key/value cache"
    with pytest.raises(ValueError, match=match):
        model.generate(prompt, max_new_tokens=8, do_sample=False)
    with alst.disabled():
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
        padded = torch.nn.functional.pad(prompt, (3, 0))
        mask = (torch.arange(10) >= 3).long()[None]
        with_mask = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert torch.equal(with_mask[:, 3:], expected)
    model.train()
    model(**alst.shard(batches()[0])).loss.backward()
    alst.reduce_gradients()
    assert_same_gradients(gradients_of(model), stock_gradients(stock_model(), batches()[:1]))


@pytest.mark.parametrize("sp", [1, 2])
def test_generation_is_the_stock_models_or_refused(ranks: Ranks, sp: int) -> None:
    """Inside `disabled`, tokens are the stock model's, also with padding. Outside, generation is
    refused with one line.
    """
    ranks(sp)(generates)


def tenfold(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """A user's loss function: ten times the usual loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return 10 * ForCausalLMLoss(logits, labels, vocab_size, **kwargs)


def mean_of_its_own(
    logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor, **_: Any
) -> Tensor:
    """A loss function that ignores the count."""
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), shift_labels.view(-1))


def set_loss(model: Any) -> None:
    """Another loss function."""
    model.loss_function = tenfold


def adapters(*targets: str, saved: tuple[str, ...] = ()) -> peft.LoraConfig:
    """Adapters of `q_proj` and `targets` with fixed initial values that are not zero."""
    torch.manual_seed(3)
    return peft.LoraConfig(
        r=2,
        target_modules=["q_proj", *targets],
        modules_to_save=list(saved),
        init_lora_weights=False,
    )


def adapt_head(model: Any) -> None:
    """Also put LoRA on the head."""
    peft.get_peft_model(model, adapters("lm_head"))


def save_head(model: Any) -> None:
    """Also train the full head beside LoRA, as for new tokens."""
    peft.get_peft_model(model, adapters(saved=("lm_head",)))


def resize(model: Any) -> None:
    """Add three tokens to the vocabulary."""
    torch.manual_seed(4)
    model.resize_token_embeddings(53)


def adapted_model() -> Any:
    """A model in peft's wrapper."""
    model = stock_model()
    return peft.get_peft_model(model, adapters())


CHANGES: list[Callable[[Any], None]] = [set_loss, adapt_head, save_head, resize]


def changed_afterwards(rank: int, world_size: int) -> None:
    """Body of a rank: head and loss function are replaced after `enable`."""
    data = batches()[:1]
    for change in CHANGES:
        expected = stock_model()
        change(expected)
        truth = stock_gradients(expected, data)
        model, alst = enabled(2, tiles=3)
        change(model)
        model(**alst.shard(data[0])).loss.backward()
        alst.reduce_gradients()
        try:
            assert_same_gradients(gradients_of(model), truth)
        except AssertionError as error:
            raise AssertionError(f"{change.__name__}: {error}") from None
    expected, adapted = adapted_model(), adapted_model()
    _, alst = enabled(2, adapted)
    adapted(**alst.shard(data[0])).loss.backward()
    alst.reduce_gradients()
    assert_same_gradients(gradients_of(adapted), stock_gradients(expected, data))
    with pytest.raises(ValueError, match="enabled already"):
        enabled(2, adapted)
    model, alst = enabled(2, tiles=3)
    model.loss_function = mean_of_its_own
    with pytest.raises(ValueError, match="'mean_of_its_own' is not a sum over tokens"):
        model(**alst.shard(data[0]))


def test_a_head_or_loss_replaced_after_enable_is_the_one_that_trains(ranks: Ranks) -> None:
    """Another loss function, LoRA on the head, a saved head and resized embeddings train. A loss
    that ignores the count is refused.
    """
    ranks(2)(changed_afterwards)


def copied(rank: int, world_size: int) -> None:
    """Body of a rank: a copy of an enabled model."""
    data = batches()[0]
    model, alst = enabled(2, tiles=3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    twin(**alst.shard(data)).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    for p in twin.parameters():
        dist.all_reduce(p.grad)
        p.grad /= world_size
    assert_same_gradients(gradients_of(twin), stock_gradients(stock_model(), [data]))


def test_a_copy_computes_with_its_own_weights(ranks: Ranks) -> None:
    """Tests `copy.deepcopy` of an enabled model, as for averaged or reference weights."""
    ranks(2)(copied)


def unused(rank: int, world_size: int) -> None:
    """Body of a rank: a parameter that the loss does not use."""
    model, alst = enabled(2)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model(**alst.shard(batches()[0])).loss.backward()
    with pytest.warns(UserWarning, match=r"1 trainable parameters have no gradient .* extra"):
        alst.reduce_gradients()
    assert model.extra.grad is None
    model.extra.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alst.reduce_gradients()


def test_a_parameter_without_gradient_is_named(ranks: Ranks) -> None:
    """Its gradient stays None, and a warning names it."""
    ranks(2)(unused)
