"""Activation checkpointing of decoder layers."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from alst_impl.ops.memory.offload import HostOffload, checkpoint


def stock_checkpointing(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Checkpoint every decoder layer with PyTorch's own, by transformers' name for it."""
    # The first name is transformers' from 5.23 on, which warns about the second.
    named = getattr(model, "activation_checkpointing_enable", None)
    enable = named or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def checkpoint_layers(model: PreTrainedModel, offload: HostOffload | None) -> None:
    """Checkpoint every decoder layer with ours in place of PyTorch's, through transformers' own switch.

    The switch goes on turning ours on and off, whoever uses it: a trainer that asks for PyTorch's gets ours.
    """

    def run_checkpointed(layer: Callable[..., Any], hidden_states: Tensor, *args: Any) -> Tensor:
        return checkpoint(lambda x: layer(x, *args), hidden_states, offload)

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
    """transformers' `_set_gradient_checkpointing` with `ours` whatever function comes."""
    if enable and gradient_checkpointing_func is not ours:
        warnings.warn(
            "layers stay checkpointed by ALST, all of them and with its offload: checkpointing that is turned on "
            "again changes nothing; leave it out (Trainer: gradient_checkpointing=False), or enable ALST with "
            "checkpoint=False",
            stacklevel=2,
        )
    type(part)._set_gradient_checkpointing(part, enable=enable, gradient_checkpointing_func=ours)
