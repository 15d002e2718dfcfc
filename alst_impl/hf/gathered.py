"""Runs modules that mix tokens otherwise than by the attention interface on whole sequences.

State-space layers, linear attention, convolutions, and attention with parts of its own run as they are, on the
tokens of all ranks. Every rank computes the whole module and keeps its own part of the result, which is exact for
every causal module, and costs P times the work and the memory of whole sequences in these modules.
Legend: B batch, S sequence, s = S/P.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from alst_impl.hf.attention import layer_type
from alst_impl.hf.instances import bound
from alst_impl.hf.structure import mixers, names_in_methods
from alst_impl.layout import Layout, reached
from alst_impl.ops import draws
from alst_impl.ops.attention.gather import gather
from alst_impl.ops.memory.tiling import run_as
from alst_impl.placement import Evidence

REFUSED = ("alibi", "linear_attn_mask", "position_bias", "relative_distance")
"""Arguments that a model computes from the number of tokens, so that those of shards do not make the whole's."""


def gather_mixers(model: PreTrainedModel, evidence: Evidence, shards: int | None) -> None:
    """Make the mixers of `model` run on whole sequences of `shards` ranks. Changes the instances only."""
    stock, eager = vars(model).get("stock_attention"), copy.deepcopy(model.config)
    eager._attn_implementation = "eager"
    for place, module in enumerate(mixers(model)):
        for part in module.modules():
            config = getattr(part, "config", None)
            if (
                config is not None and stock is not None
            ):  # it keeps the attention that it was made with
                vars(part)["config"] = copy.deepcopy(config)
                vars(part)["config"]._attn_implementation = stock
        gathering = _Gathering(
            module.forward, evidence, shards, _mask_function(model, module), eager, place
        )
        vars(module).update(noted_layout=None, gathering=gathering)
        run_as(module, bound(module, _gathered_forward))


@dataclass(frozen=True)
class _Gathering:
    """State of a gathered module's forward."""

    stock: Callable[..., Any]
    evidence: Evidence
    shards: int | None
    mask: Callable[..., Any] | None
    """transformers' function that makes the mask of the module; None if it needs none."""
    config: PreTrainedConfig
    """The model's, with the eager attention, which has a mask of every kind."""
    place: int
    """Number of the module among the model's, each of which runs once in a pass."""


def _gathered_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    gathering: _Gathering = vars(module)["gathering"]
    given = inspect.signature(gathering.stock).bind(*args, **kwargs)
    hidden: Tensor = next(iter(given.arguments.values()))
    passed = kwargs.pop("layout", None)
    layout = reached(passed or vars(module)["noted_layout"], hidden.shape[1], gathering.shards)
    if layout.documents is not None:
        raise ValueError(
            f"{type(module).__name__} mixes tokens and cannot tell packed documents apart; use one document per sample"
        )
    if layout.shards == 1:
        return gathering.stock(*args, **kwargs)
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} gets '{name}', which the model computes from the length of a shard; use "
                "method 'baseline'"
            )
    whole = _whole(hidden, layout)

    def of_all_ranks(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2:] == (layout.local, layout.local):
            if gathering.mask is None:
                return x  # the module passes over it
            return _checked(module, _mask(gathering, whole), x, layout)
        return whole if x is hidden else _whole(x, layout)

    args, kwargs = tree_map(of_all_ranks, (args, kwargs))
    if gathering.mask is not None and kwargs.get("attention_mask", module) is None:
        kwargs["attention_mask"] = _mask(gathering, whole)
    gathering.evidence["gathers"] += 1
    with draws.of_group(layout, hidden.device, gathering.place):
        out = gathering.stock(*args, **kwargs)
    return tree_map(lambda x: _own(x, layout), out)


def _whole(x: Any, layout: Layout) -> Any:
    """A tensor [B, s, ...] of all ranks' tokens, [B, S, ...]; ids [..., s] likewise. All else as it is.

    Padding is left out, because a module may depend on the length (top-k breaks ties by it).
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.dim() >= 2 and x.shape[1] == layout.local:
        return gather(x, layout, 1)[:, : layout.length]
    if x.shape[-1] == layout.local and not x.is_floating_point():
        return gather(x, layout, x.dim() - 1)[..., : layout.length]
    return x


def _own(x: Any, layout: Layout) -> Any:
    """This rank's tokens of a result [B, S, ...], with zeros for padding."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != layout.length:
        return x
    pad = layout.padded - layout.length
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return torch.cat([x[:, span] for span in layout.spans(layout.shard)], dim=1)


def _attends(module: nn.Module) -> bool:
    """Whether the module computes attention, and so needs a mask: state-space layers are causal by themselves."""
    return bool({"ALL_ATTENTION_FUNCTIONS", "softmax"} & names_in_methods(module))


def _mask_function(model: PreTrainedModel, module: nn.Module) -> Callable[..., Any] | None:
    """The function of transformers that makes the masks of `module`, by its layer's type; None if it needs no mask.

    Raises `ValueError` unless the model's code calls such a function.
    """
    if not _attends(module):
        return None
    called = names_in_methods(model)
    full: Callable[..., Any] = create_causal_mask
    sliding: Callable[..., Any] = create_sliding_window_causal_mask
    windows, all_keys = sliding.__name__ in called, full.__name__ in called
    if windows and (not all_keys or "sliding" in layer_type(module)):
        return sliding
    if all_keys:
        return full
    raise ValueError(
        f"{type(module).__name__} does not use transformers' attention interface, and {type(model).__name__} makes its "
        "masks by itself, so the mask of the whole sequence is not known; use method 'baseline'"
    )


def _mask(gathering: _Gathering, hidden: Tensor) -> Tensor:
    """The mask of the whole sequence, added to scores: [B, 1, S, S]."""
    assert gathering.mask is not None, "only attention gets masks"
    mask: Tensor = gathering.mask(
        config=gathering.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    return mask


def _checked(module: nn.Module, mask: Tensor, local: Tensor, layout: Layout) -> Tensor:
    """`mask` [B, 1, S, S], of the dtype of `local` [B, 1, s, s], which the model's own code made for this rank's tokens.

    Raises `ValueError` unless both hide the same keys within each chunk that the rank holds. Between two chunks
    `local` counts tokens of the shard and not of the sample, so it says nothing.
    """
    hides, start = ~local if local.dtype == torch.bool else local < 0, 0
    for span in layout.spans(layout.shard):
        rows = slice(start, start + span.stop - span.start)
        part, start = mask[..., span, span] < 0, rows.stop
        if not torch.equal(part, hides[..., rows, rows][..., : part.shape[-2], : part.shape[-1]]):
            raise ValueError(
                f"{type(module).__name__} gets a mask that is neither causal nor a sliding window, so that of the whole "
                "sequence is not known; use method 'baseline'"
            )
    return mask if local.dtype != torch.bool else mask >= 0
