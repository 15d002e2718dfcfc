"""The load-balancing loss of routers, over the tokens of all ranks that share a sample.

Source: Switch Transformers (arXiv:2101.03961, equations 4 to 6), as transformers' `load_balancing_loss_func` computes
it: experts x sum over experts of (share of tokens sent to it x mean probability), over the tokens of all layers.
The shares are counts without a gradient. So the gradient of every router's probabilities is the same vector over
experts, which is known when all layers have run forward, and is added where a router runs under autograd: also when
backward recomputes it, in a tile or in a checkpointed layer. No router logits are kept.
Legend: T tokens of a router's call, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from alst_impl.hf.structure import names_in_forward
from alst_impl.layout import IGNORE_INDEX, Layout
from alst_impl.ops.autograd import apply

USED = {
    "load_balancing_loss_func",
    "num_experts",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "router_logits",
}
"""What a model's forward uses if its loss is the one computed here."""


@dataclass
class RouterStatistics:
    """Sums over the tokens of one forward, and then the gradient that they give each probability."""

    counts: Tensor
    """Tokens sent to each expert, fp32 [E]."""
    probabilities: Tensor
    """Sum of the routers' probabilities, fp32 [E]."""
    tokens: int = 0
    """Tokens of all layers."""
    gradient: Tensor | None = None
    """Of the sum of probabilities, fp32 [E], for a loss gradient of 1; None while forward runs."""
    factor: Tensor | None = None
    """Gradient of the loss, known when backward begins."""


@dataclass
class _RouterLoss:
    """State of a model's router loss."""

    num_experts: int
    top_k: int
    coefficient: float
    configured: tuple[bool, float | None] | None
    """As `_configured` returned it."""
    current: RouterStatistics | None = field(default=None)


def wants_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model's configuration asks for a router loss."""
    return bool(getattr(model.config, "output_router_logits", False))


def use_router_loss(model: PreTrainedModel) -> None:
    """Make the routers of `model` count for `start` and `finish`. Changes the instances only.

    Raises `ValueError` for a model whose router loss is another one.
    """
    recorder = (getattr(model, "_can_record_outputs", None) or _recorders(model)).get(
        "router_logits"
    )
    if recorder is None or not names_in_forward(model) >= USED:
        raise ValueError(
            f"{type(model).__name__} has a router loss that is not transformers' load_balancing_loss_func over its "
            "router logits, so shards would each compute their own; set output_router_logits: false"
        )
    own: Any = model
    coefficient = own.router_aux_loss_coef
    state = _RouterLoss(own.num_experts, own.num_experts_per_tok, coefficient, _configured(model))
    vars(model)["router_loss"] = state
    for module in model.modules():
        if isinstance(module, recorder.target_class):
            vars(module)["router_loss"] = (state, recorder.index)
            module.register_forward_hook(_count)


def check_batch(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a router loss that cannot be exact: its configuration changed, or `batch` is padded.

    `batch` is a collator's, with an `attention_mask` [B, S] or without.
    """
    state: _RouterLoss | None = vars(model).get("router_loss")
    found, asked = None if state is None else state.configured, _configured(model)
    if found != asked:
        raise ValueError(
            f"output_router_logits and router_aux_loss_coef became {asked}, but were {found} at enable(); set both in "
            "model.config before it (TRL's SFTTrainer turns a router loss on, by its option router_aux_loss_coef)"
        )
    mask = batch.get("attention_mask")
    if state is not None and mask is not None and not bool(mask.all()):
        raise ValueError(
            "a router loss (output_router_logits) counts every token of a batch, but attention_mask has padding; use "
            "samples of one length, or packed ones"
        )


def _configured(model: PreTrainedModel) -> tuple[bool, float | None] | None:
    """What the configuration says of a router loss; None if it asks for none."""
    if not wants_router_loss(model):
        return None
    return True, getattr(model.config, "router_aux_loss_coef", None)


def _recorders(model: PreTrainedModel) -> dict[str, Any]:
    """What transformers records of the model's parts."""
    for module in model.modules():
        found: dict[str, Any] | None = getattr(module, "_can_record_outputs", None)
        if found:
            return found
    return {}


def start(model: PreTrainedModel, device: torch.device) -> None:
    """Begin a forward of `model`."""
    state: _RouterLoss = vars(model)["router_loss"]
    zeros = torch.zeros(state.num_experts, device=device)
    state.current = RouterStatistics(zeros, zeros.clone())


def forget(model: PreTrainedModel) -> None:
    """Before a forward that computes the model's own router loss: routers count nothing and add no gradient."""
    if "router_loss" in vars(model):
        vars(model)["router_loss"].current = None


def finish(
    model: PreTrainedModel, loss: Tensor, labels: Tensor, count: Tensor, layout: Layout | None
) -> Tensor:
    """`loss` of this rank plus its share of the router loss, weighted by the share of the step's labels. Collective.

    labels int64 [B, s] of this rank, `count` the labels of the step. Over the ranks and micro-batches of a step the
    shares add up to the mean of the samples' router losses by label.
    """
    state: _RouterLoss = vars(model)["router_loss"]
    found = state.current
    assert found is not None, "start comes first"
    if layout is not None and layout.padded != layout.length:
        raise ValueError(
            f"a router loss counts every token of the model's input, but {layout.length} tokens over {layout.shards} "
            f"ranks are padded to {layout.padded}; use samples of a multiple of "
            f"{layout.cp * layout.chunks * layout.multiple} tokens, or set output_router_logits: false"
        )
    valid = (labels != IGNORE_INDEX).sum()
    sums = torch.cat([found.counts, found.probabilities, valid[None].to(found.counts.dtype)])
    for axis in ("sp", "cp"):
        group = None if layout is None else layout.group(axis)
        if group is not None:
            dist.all_reduce(sums, group=group)
    shards = 1 if layout is None else layout.shards
    counts, probabilities, labels_of_all = sums.split([state.num_experts, state.num_experts, 1])
    tokens = found.tokens * shards
    weight = state.coefficient * labels_of_all / count
    value = weight * state.num_experts * (counts / tokens * probabilities / tokens).sum() / shards
    # Each rank's share depends on the probabilities of all ranks, whose shares depend on this rank's.
    found.gradient = weight * state.num_experts * counts / tokens / tokens
    return apply(_Add, found, state, loss, value.squeeze(0))


class _Add(torch.autograd.Function):
    """The loss with the router loss. Notes the loss's gradient for the routers, which backward reaches later."""

    @staticmethod
    def forward(
        ctx: Any, statistics: RouterStatistics, state: _RouterLoss, loss: Tensor, value: Tensor
    ) -> Tensor:
        ctx.statistics, ctx.state = statistics, state
        return loss + value.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        if ctx.statistics is not ctx.state.current:
            raise ValueError(
                "a model with a router loss ran forward twice before backward; run backward after each forward, or set "
                "output_router_logits: false"
            )
        ctx.statistics.factor = grads[0]
        return None, None, grads[0], None


class _Attach(torch.autograd.Function):
    """A router's score, through which the sum of its probabilities gets its gradient from the router loss."""

    @staticmethod
    def forward(ctx: Any, statistics: RouterStatistics, score: Tensor, _: Tensor) -> Tensor:
        ctx.statistics = statistics
        return score.view_as(score)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        s = ctx.statistics
        assert s.gradient is not None, "the loss has been computed"
        assert s.factor is not None, "backward begins at the loss"
        return None, grads[0], s.gradient * s.factor


def _count(router: nn.Module, _: Any, output: Any) -> Any:
    """Forward hook: count in the first run, and attach the gradient wherever autograd records."""
    state, index = vars(router)["router_loss"]
    found: RouterStatistics | None = state.current
    if found is None:
        return output
    values = list(output) if isinstance(output, tuple) else [output]
    logits = values[index]
    probabilities = logits.float().softmax(dim=-1).flatten(0, -2).sum(dim=0)
    if found.gradient is None:
        chosen = logits.detach().topk(state.top_k, dim=-1).indices.flatten()
        # In int64 first: adding ones to a large fp32 number is lost.
        counts = torch.zeros_like(found.counts, dtype=torch.int64)
        found.counts += counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        found.probabilities += probabilities.detach()
        found.tokens += logits.shape[:-1].numel()
    if not torch.is_grad_enabled():
        return output
    used = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.requires_grad]
    # The logits themselves are often for the record alone.
    place = next((i for i in used if i != index), index)
    values[place] = apply(_Attach, found, values[place], probabilities)
    return tuple(values) if isinstance(output, tuple) else values[0]
