"""The forward of an enabled model: takes what `LongSequence.shard` returns, and refuses unsafe calls."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from alst_impl import hf, safeguards
from alst_impl.hf import router
from alst_impl.hf.tiling import check_adds_up
from alst_impl.layout import Layout
from alst_impl.ops import draws
from alst_impl.safeguards import StepLabels

Reduction = Literal["mean", "sum"]
"""How gradients are combined over ranks: an engine's average, or a sum."""


class Shard:
    """What `shard` passes to the model's forward beside tensors, in a class that engines pass on unchanged."""

    def __init__(
        self, num_labels: int, num_items: int, divisor: Tensor | None, layout: Layout
    ) -> None:
        self.num_labels, self.num_items = num_labels, num_items
        self.divisor = divisor
        """The loss is divided by it, int64 scalar; None for a forward without a loss."""
        self.layout = layout


@dataclass
class Guard:
    """What an enabled model's forward needs for its checks."""

    inner: Callable[..., Any]
    """The model's forward with the method, a bound method."""
    shards: int
    """Ranks that share a sample."""
    scale: int
    """Factor of each loss: all ranks if gradients are averaged, 1 if they are summed."""
    whole_loss: bool
    """Whether the model computes its loss from all logits of a shard at once."""
    parts: list[str] | None
    """Names of the modules in decoder layers that the method computes with itself; None if it calls them."""
    changed: list[nn.Module]
    """Modules inside the model whose forward the method replaced."""
    labels: StepLabels = field(default_factory=StepLabels)
    stock: bool = False
    """Whether the stock forward runs instead."""


def guard(model: PreTrainedModel, new: Callable[[Callable[..., Any]], Guard]) -> Guard:
    """Put a `Guard`, made by `new` from the present forward, around `model`'s forward and its updates. Local."""
    made = new(model.forward)
    vars(model)["guard"] = made
    # Under torch.compile the checks and hooks of our forward still run as they stand.
    hf.set_forward(model, torch.compiler.disable(_forward, recursive=False))
    handle = register_optimizer_step_pre_hook(partial(_before_update, weakref.ref(model)))
    weakref.finalize(model, handle.remove)
    return made


def own_forwards(model: PreTrainedModel) -> list[nn.Module]:
    """The modules inside `model` that have a forward of their own beside their class's."""
    return [
        module for module in model.modules() if module is not model and "forward" in vars(module)
    ]


def part_names(model: PreTrainedModel) -> list[str]:
    """Names of all modules in the decoder layers."""
    layers = hf.decoder_layers(model)
    return [f"{i}.{name}" for i, layer in enumerate(layers) for name, _ in layer.named_modules()]


@contextmanager
def stock_forward(model: PreTrainedModel) -> Iterator[None]:
    """Context in which `model` and all its modules run transformers' own forwards. Local."""
    made: Guard = vars(model)["guard"]
    ours = [(m, vars(m).pop("forward")) for m in made.changed if "forward" in vars(m)]
    made.stock = True
    router.forget(model)
    try:
        with hf.stock_attention(model):
            yield
    finally:
        made.stock = False
        for module, forward in ours:
            vars(module)["forward"] = forward


def _forward(model: PreTrainedModel, *args: Any, shard: Shard | None = None, **kwargs: Any) -> Any:
    made: Guard = vars(model)["guard"]
    if made.stock:
        return type(model).forward(model, *args, **kwargs)
    if shard is None:
        _check_unsharded(made, kwargs)
        return made.inner(*args, **kwargs)
    if "num_items_in_batch" in kwargs:
        raise ValueError(
            "num_items_in_batch comes beside alst.shard(...), which counts labels itself; call "
            "model(**alst.shard(...)) alone (in a Trainer: class MyTrainer(LongSequenceTrainer, Trainer))"
        )
    _check_engine(made)
    if not shard.layout.trivial:
        kwargs["layout"] = shard.layout
    of_rank = draws.of_rank(shard.layout, kwargs["input_ids"].device)
    noise = _noise_of_whole(model, shard.layout)
    if shard.divisor is None:
        with noise, hf.noting_layout(model, shard.layout), of_rank:
            return made.inner(*args, **kwargs)
    whole_loss = _whole_loss(model) if made.whole_loss else nullcontext()
    with whole_loss, noise, hf.noting_layout(model, shard.layout), of_rank:
        output = made.inner(*args, **kwargs, num_items_in_batch=shard.divisor)
    output.loss = output.loss * made.scale
    made.labels.watch(output.loss, shard.num_labels, shard.num_items)
    return output


def _check_unsharded(made: Guard, kwargs: dict[str, Any]) -> None:
    stock = "for evaluation or generate(), use `with alst.disabled():`"
    if made.shards > 1:
        raise ValueError(
            f"the model shares each sample between {made.shards} ranks and was called without a shard; "
            f"call model(**alst.shard(batch)); {stock}"
        )
    if kwargs.get("past_key_values") is not None:
        raise ValueError(f"an enabled model has no key/value cache; {stock}")
    positions = kwargs.get("position_ids")
    restart = positions is not None and bool((positions.diff(dim=-1) != 1).any())
    if restart or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "position_ids restart or cu_seq_lens_q is given, but only alst.shard(batch) keeps packed documents apart; "
            f"call model(**alst.shard(batch)); {stock}"
        )


def _check_engine(made: Guard) -> None:
    averages = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
    if averages and made.scale == 1 and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "reduction 'sum' leaves gradients to be summed over ranks, but DistributedDataParallel averages them; "
            "use enable(..., reduction='mean')"
        )


@contextmanager
def _noise_of_whole(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Context in which NEFTune's noise, alpha / sqrt(tokens x hidden size), is as strong as on whole samples."""
    embedding: Any = model.get_input_embeddings()
    alpha: float | None = getattr(embedding, "neftune_noise_alpha", None)
    if alpha is None:
        yield
        return
    tokens = layout.local if layout.part is None else layout.local // layout.part.count
    embedding.neftune_noise_alpha = alpha * (tokens / layout.length) ** 0.5
    try:
        yield
    finally:
        embedding.neftune_noise_alpha = alpha


@contextmanager
def _whole_loss(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model's loss function gets no layout, and is checked to be a sum over tokens."""
    stock = model.loss_function
    own = vars(model).get("_loss_function")
    accepted = inspect.signature(stock).parameters
    named = "shift_labels" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if not named:
        raise ValueError(
            f"loss function '{getattr(stock, '__name__', stock)}' takes no shift_labels, but a shard's labels are "
            "shifted already, across its borders; give it a parameter shift_labels and use that"
        )

    def loss(logits: Tensor, labels: Tensor, *sizes: Any, **kwargs: Any) -> Any:
        kwargs.pop("layout", None)

        def of_tokens(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
            told = {**kwargs, "shift_labels": labels, "num_items_in_batch": count}
            found: Tensor = stock(logits, labels, *sizes, **told)
            return found

        if not stock.__module__.startswith("transformers."):
            check_adds_up(stock, of_tokens, logits.detach(), kwargs["num_items_in_batch"])
        return stock(logits, labels, *sizes, **kwargs)

    vars(model)["_loss_function"] = loss
    try:
        yield
    finally:
        vars(model).pop("_loss_function")
        if own is not None:
            vars(model)["_loss_function"] = own


def _before_update(
    reference: weakref.ref[PreTrainedModel], optimizer: torch.optim.Optimizer, *_: Any
) -> None:
    """Before any optimizer of the process steps: check that this model's gradients are those of a whole step."""
    model = reference()
    if model is None:
        return
    labels: StepLabels = vars(model)["guard"].labels
    if safeguards.owns(optimizer, model) or (safeguards.is_deepspeed(model) and labels.complete):
        labels.finish()
