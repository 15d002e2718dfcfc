"""An enabled model that generates, is copied, or gets another head, loss or adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import torch.distributed as dist
from small import batches, enabled, gradients_of, stock_gradients, stock_model
from torch import Tensor, nn
from training import assert_same_gradients

if TYPE_CHECKING:
    from conftest import Ranks


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


def strict(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """A loss function that takes what it uses and nothing else."""
    assert shift_labels is not None
    flat = logits.float().view(-1, vocab_size), shift_labels.view(-1)
    return 3 * nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def unshifted(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """A loss function that shifts labels itself."""
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch


def whole_losses(rank: int, world_size: int) -> None:
    """Body of a rank: users' loss functions on all logits of a shard at once."""
    data = batches()[:1]
    for loss in (strict, tenfold):
        stock, (model, alst) = stock_model(), enabled(2, tile_loss=False)
        model.loss_function = loss
        labels = data[0]["labels"]
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        logits = stock(input_ids=data[0]["input_ids"]).logits
        loss(
            logits,
            labels,
            50,
            num_items_in_batch=(shifted != -100).sum(),
            shift_labels=shifted.contiguous(),
        ).backward()
        model(**alst.shard(data[0])).loss.backward()
        alst.reduce_gradients()
        assert_same_gradients(gradients_of(model), gradients_of(stock))
        assert model.loss_function is loss
    model.zero_grad()
    model.loss_function = mean_of_its_own
    with pytest.raises(ValueError, match="'mean_of_its_own' is not a sum over tokens"):
        model(**alst.shard(data[0]))
    model.loss_function = unshifted
    with pytest.raises(ValueError, match="'unshifted' takes no shift_labels"):
        model(**alst.shard(data[0]))


def test_a_loss_without_tiles_gets_its_own_arguments(ranks: Ranks) -> None:
    """A strict signature works; a loss that is no sum over tokens, or that shifts labels, is refused."""
    ranks(2)(whole_losses)


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
    truth = stock_gradients(adapted_model(), data)
    for method in ("alst", "layerwise"):
        adapted = adapted_model()
        _, alst = enabled(2, adapted, method=method)
        adapted(**alst.shard(data[0])).loss.backward()
        alst.reduce_gradients()
        assert_same_gradients(gradients_of(adapted), truth)
        with pytest.raises(ValueError, match="enabled already"):
            enabled(2, adapted)
    model, alst = enabled(2, method="layerwise")
    adapt_head(model)
    with pytest.raises(ValueError, match="were replaced after enable"):
        alst.shard(data[0])
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
