"""The tiled loss is the model's loss."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import config_of

from alst_impl import hf, models
from alst_impl.ops.memory.loss import tiled_loss
from alst_impl.placement import no_evidence

HIDDEN, VOCAB = 6, 11


class Head(nn.Linear):
    """A projection to the vocabulary, in fp64."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(HIDDEN, VOCAB, bias=False, dtype=torch.float64)


def token_loss(head: nn.Module, hidden: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """Sum of token losses over `count`."""
    logits = head(hidden).flatten(0, 1)
    return cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100) / count


def data(valid: list[int] | None = None, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels (valid only at positions `valid`, by default everywhere), and the
    number of valid labels.
    """
    torch.manual_seed(2)
    hidden = torch.randn(2, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCAB, (2, length))
    if valid is not None:
        masked = [i for i in range(length) if i not in valid]
        labels[:, masked] = -100
    return hidden, labels, (labels != -100).sum().clamp(min=1)


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    """Gradients of hidden states and head, for a total loss that includes `loss`."""
    head.zero_grad()
    hidden.grad = None
    (loss * 3.5).backward()
    assert hidden.grad is not None
    return [hidden.grad, *(p.grad.clone() for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "valid", [None, [8], [0, 1, 2, 7], []], ids=["all", "last", "uneven", "none"]
)
@pytest.mark.parametrize("num_tiles", [1, 2, 4, 9, 20])
def test_tiled_loss_equals_the_whole_under_any_upstream_gradient(
    num_tiles: int, valid: list[int] | None
) -> None:
    """Also if tiles have unequal numbers of labels, or none."""
    head = Head()
    hidden, labels, count = data(valid)
    fn = functools.partial(token_loss, head)
    whole = fn(hidden, labels, count)
    expected = gradients(whole, hidden, head)
    loss = tiled_loss(fn, hidden, labels, count, num_tiles)
    found = gradients(loss, hidden, head)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-14)
    assert len(found) == len(expected) == 2
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


def test_ignored_labels_alone_give_zero_and_not_nan() -> None:
    """A rank without labels contributes exactly zero."""
    head = Head()
    hidden, labels, count = data([])
    loss = tiled_loss(functools.partial(token_loss, head), hidden, labels, count, 4)
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(loss, hidden, head))


def test_a_second_backward_raises() -> None:
    """The gradients are formed once, in forward, and are freed by the first backward."""
    head = Head()
    hidden, labels, count = data()
    loss = tiled_loss(functools.partial(token_loss, head), hidden, labels, count, 2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


def test_without_gradients_only_the_loss_is_computed() -> None:
    """Evaluation forms no gradient."""
    head = Head()
    hidden, labels, count = data()
    fn = functools.partial(token_loss, head)
    with torch.no_grad():
        loss = tiled_loss(fn, hidden, labels, count, 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, fn(hidden, labels, count).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_tiles", [1, 3, 50])
@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("tiny-llama", {}),
        ("tiny-gemma3", {}),  # tied weights
        ("tiny-gemma3", {"final_logit_softcapping": 2.0}),
    ],
    ids=["untied", "tied", "softcap"],
)
def test_a_models_own_loss_is_tiled_exactly(
    model: str, overrides: dict[str, object], num_tiles: int
) -> None:
    """With head, soft cap and tied weights, loss and every gradient equal those of the stock model."""
    config = config_of(model=model, overrides=overrides, dtype="float64")
    ids = torch.randint(260, (2, 13), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = -100
    count = (labels[:, 1:] != -100).sum()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)

    def run(tile: bool) -> tuple[Tensor, dict[str, Tensor]]:
        instance = models.materialize(config)
        evidence = no_evidence()
        if tile:
            hf.tile_loss(instance, lambda _: num_tiles, evidence)
        loss = instance(
            input_ids=ids,
            labels=labels,
            shift_labels=shifted,
            num_items_in_batch=count,
            use_cache=False,
        ).loss
        (loss * 0.25).backward()
        assert evidence["tiles"] == (min(num_tiles, 13) if tile else 0)
        return loss.detach(), {
            k: p.grad for k, p in instance.named_parameters() if p.grad is not None
        }

    (loss, ours), (stock_loss, truth) = run(tile=True), run(tile=False)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)  # the model's own loss is fp32
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_the_soft_cap_is_part_of_the_tiled_loss() -> None:
    """A cap in the range of the logits changes the loss."""

    def loss(cap: float | None) -> float:
        config = config_of(
            model="tiny-gemma3", overrides={"final_logit_softcapping": cap}, dtype="float64"
        )
        model = models.materialize(config)
        hf.tile_loss(model, lambda _: 2, no_evidence())
        ids = torch.arange(20)[None]
        with torch.no_grad():
            out = model(input_ids=ids, shift_labels=ids, num_items_in_batch=torch.tensor(20))
        return float(out.loss)

    assert abs(loss(None) - loss(0.1)) > 1e-3
