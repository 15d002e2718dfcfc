"""An enabled model in common training loops: exact, or refused with a one-line error."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import (
    LAUNCHER,
    METHODS,
    batches,
    enabled,
    gradients_of,
    sgd,
    stock_gradients,
    stock_model,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_same_gradients

from alst_impl import LongSequence, enable

if TYPE_CHECKING:
    from conftest import Ranks


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
    # Sums: right under a factor of 1, refused under engines that average.
    model, alst = enabled(2, reduction="sum")
    shard_layers(model)
    with pytest.raises(ValueError, match="reduction 'sum' needs 1"):
        alst.shard(batch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    model(**alst.shard(batch)).loss.backward()
    assert_same_gradients(gradients_of(model), stock_gradients(stock_model(), [batch]))
    model, alst = enabled(2, reduction="sum")
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="DistributedDataParallel averages"):
        wrapped(**alst.shard(batch))
    model, alst = enabled(2, stock_model(torch.float32), reduction="sum")
    zero(model, 3)
    with pytest.raises(ValueError, match="the engine averages them"):
        alst.shard(batch)


def test_engines_that_do_not_average_over_all_ranks_are_refused(ranks: Ranks) -> None:
    """`fully_shard` over dp only, and an average where sums are wanted or the other way, are refused."""
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


# -- data -----------------------------------------------------------------------------------------


def wrong_data(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Body of a rank: wrong inputs that common loops give to the ranks of one sample."""
    from accelerate import Accelerator

    os.environ.update(LAUNCHER)
    data = batches()
    model = stock_model()
    alst = enable(model, **options)
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
    model = stock_model()
    alst = enable(model, **options)
    model(**alst.shard(data[0])).loss.backward()
    with pytest.raises(ValueError, match="accumulated gradients need one count"):
        alst.shard(data[1])


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options.get("method", "alst"))
def test_ranks_of_one_sample_agree_on_it(ranks: Ranks, options: dict[str, Any]) -> None:
    """Different samples or labels, a loader that splits samples, a call without `shard`, missing
    gradients of others and a step without its count are refused under every method.
    """
    ranks(2)(wrong_data, options)
