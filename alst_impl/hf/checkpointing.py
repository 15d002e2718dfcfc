"""Activation checkpointing of decoder layers."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from alst_impl.hf.attention import note_layout, noted_layout
from alst_impl.ops.memory.offload import HostOffload, checkpoint


def stock_checkpointing(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Checkpoint every decoder layer with PyTorch's checkpointing, through transformers' API."""
    # transformers 5.23 and later have the first name and warn about the second.
    named = getattr(model, "activation_checkpointing_enable", None)
    enable = named or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def checkpoint_layers(model: PreTrainedModel, offload: HostOffload | None) -> None:
    """Checkpoint every decoder layer with our checkpointing instead of PyTorch's, through transformers' switch.

    Later calls of the switch turn ours on and off: a trainer that asks for PyTorch's checkpointing gets ours.
    """

    def run_checkpointed(layer: partial[Any], hidden_states: Tensor, *args: Any) -> Any:
        # The layer gets further arguments with gradients in some models (Gemma 3n).
        part = layer.args[0] if layer.args else None
        noted = noted_layout(part) if isinstance(part, nn.Module) else None

        leaves, structure = tree_flatten((args, layer.keywords))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]

        def run(x: Tensor, *more: Tensor) -> Any:
            if (
                isinstance(part, nn.Module) and torch.is_grad_enabled()
            ):  # other samples may have run since
                note_layout(part, noted)
            if not more:
                return layer(x, *args)
            given = list(leaves)
            for place, tensor in zip(places, more, strict=True):
                given[place] = tensor
            positional, named = tree_unflatten(given, structure)
            return layer.func(*layer.args, x, *positional, **named)

        return checkpoint(run, hidden_states, offload, [leaves[place] for place in places])

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["_set_gradient_checkpointing"] = partial(_switch, part, run_checkpointed)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run_checkpointed)


def _switch(
    part: PreTrainedModel,
    ours: Callable[..., Any],
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] | None = None,
    **_: Any,
) -> None:
    """transformers' `_set_gradient_checkpointing`, with `ours` in place of the given function."""
    if enable and gradient_checkpointing_func is not ours:
        warnings.warn(
            "layers stay checkpointed by ALST, all of them and with its offload: checkpointing that is turned on "
            "again changes nothing; leave it out (Trainer: gradient_checkpointing=False), or enable ALST with "
            "checkpoint=False",
            stacklevel=2,
        )
    type(part)._set_gradient_checkpointing(part, enable=enable, gradient_checkpointing_func=ours)
