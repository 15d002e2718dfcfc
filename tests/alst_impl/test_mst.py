"""Mini-sequences train exactly, even at indivisible lengths. The original implementation does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import (
    assert_same_gradients,
    config_of,
    corpus_of,
    ratio_and_cosine,
    run_steps,
    truth_of,
)

from alst_impl import models
from alst_impl.config import TrainConfig

if TYPE_CHECKING:
    from conftest import Ranks


def trained(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Any]:
    """Body of a rank: the first step of each run."""
    return [run_steps(rank, world_size, config) for config in configs]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_loss_and_gradients_are_those_of_the_unsplit_model(ranks: Ranks, dtype: str) -> None:
    """Equal with more mini-sequences than tokens, one token over, one token short, and the paper's numbers."""
    configs = [
        config_of(method={"name": "mst", **options}, seqlen=seqlen, dtype=dtype, **more)
        for seqlen, options, more in (
            (3, {"tiles": 8}, {}),
            (65, {"tiles": 8}, {}),
            (63, {"tiles": 8}, {"data": {"mask": "prefix"}}),
            (67, {"tiles": 8}, {"checkpoint": False, "batch_size": 2}),
            (300, {}, {}),
            (300, {"recompute": False}, {}),
            (67, {"tiles": 8, "recompute": False}, {"checkpoint": False}),
        )
    ]
    for config, run in zip(configs, ranks(1)(trained, configs)[0], strict=True):
        truth = truth_of(config)
        assert run.losses[0] == pytest.approx(truth.losses[0], rel=1e-6)
        assert_same_gradients(run.gradients, truth.gradients)


def test_numbers_of_mini_sequences_follow_the_paper(ranks: Ranks) -> None:
    """An MLP takes `hidden_size` tokens at a time. The head takes vocabulary over `hidden_size` mini-sequences."""
    config = config_of(
        method="mst", seqlen=300, checkpoint=False
    )  # hidden size 128, vocabulary 260
    (run,) = ranks(1)(trained, [config])[0]
    assert (
        run.evidence["tiles"] == 2 * 3 + 3
    )  # two layers of ceil(300 / 128), a head of ceil(260 / 128)


def test_the_named_attention_runs(ranks: Ranks) -> None:
    """The name in a record has to be that of the kernel that ran."""
    named = config_of(method="mst", model="tiny-mistral", seqlen=200, attention="sdpa_flash")
    with pytest.raises(AssertionError, match="'sdpa_flash' does not support a sliding window"):
        ranks(1)(trained, [named])


# -- the original implementation ------------------------------------------------------------------


class _OriginalHead(torch.autograd.Function):
    """Writes the weight's gradient itself and also returns it to autograd, which adds it again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, labels, weight)
        return F.cross_entropy(
            (hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum"
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        hidden, labels, weight = ctx.saved_tensors
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            loss = _OriginalHead.forward(ctx, inputs[0], labels, inputs[1])
        grad_hidden, grad_weight = torch.autograd.grad(loss, inputs, grads[0])
        weight.grad = grad_weight if weight.grad is None else weight.grad + grad_weight
        return grad_hidden, None, grad_weight.clone()


def original(config: TrainConfig, num_mini_sequences: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the original head, with mini-sequences of `length // num_mini_sequences` tokens."""
    model = models.materialize(config).train()
    batch = corpus_of(config).batch([0])
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    size = batch.input_ids.shape[1] // num_mini_sequences
    total = torch.zeros((), dtype=hidden.dtype)
    for i in range(num_mini_sequences):
        part = slice(i * size, (i + 1) * size)
        head = model.get_output_embeddings().weight
        total = total + _OriginalHead.apply(hidden[:, part], batch.shift_labels[:, part], head)
    loss = total / batch.num_valid()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def test_the_originals_dropped_tokens_are_caught() -> None:
    """8 mini-sequences of 8 tokens drop three of 67 tokens. Two of their labels still count in the
    mean. Measured: loss 5.353 instead of 5.518, gradients 0.96 to 1.00 times as long.
    """
    config = config_of(seqlen=67, dtype="float64")
    truth = truth_of(config)
    loss, gradients = original(config, 8)
    assert loss / truth.losses[0] == pytest.approx(64 / 66, rel=0.01)
    del gradients["lm_head.weight"]  # also wrong because of the doubled head
    expected = {name: g for name, g in truth.gradients.items() if name != "lm_head.weight"}
    with pytest.raises(AssertionError, match=r"ratio 0\.9"):
        assert_same_gradients(gradients, expected)


def test_the_originals_doubled_head_is_caught() -> None:
    """At a divisible length the loss and all gradients but the head's are right. The head's is twice as large."""
    config = config_of(seqlen=64, dtype="float64")
    truth = truth_of(config)
    loss, gradients = original(config, 8)
    assert loss == pytest.approx(truth.losses[0], rel=1e-6)
    ratio, cosine = ratio_and_cosine(gradients["lm_head.weight"], truth.gradients["lm_head.weight"])
    assert ratio == pytest.approx(2, rel=1e-6)
    assert cosine == pytest.approx(1, rel=1e-9)
    with pytest.raises(AssertionError) as caught:
        assert_same_gradients(gradients, truth.gradients)
    assert str(caught.value).splitlines()[0].startswith("lm_head.weight: ratio ")
    assert "model." not in str(caught.value)
