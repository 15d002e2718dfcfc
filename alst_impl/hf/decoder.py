"""Makes unmodified Hugging Face decoder layers run as `alst_impl.ops.layerwise`.

A layer whose parts are known (`alst_impl.hf.known`) projects the heads of one group at a time. Any other layer
runs as it is, on tiles, around a tap in place of its attention (`alst_impl.hf.tap`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from alst_impl import hf
from alst_impl.hf import known
from alst_impl.hf.tap import NO_ATTENTION, Tap, measure, refuse_cache, refuse_parts
from alst_impl.layout import Layout, reached
from alst_impl.ops.layerwise.in_place import in_place
from alst_impl.ops.layerwise.layer import Layerwise
from alst_impl.ops.layerwise.parts import Call, Decoder
from alst_impl.ops.memory.offload import HostOffload
from alst_impl.ops.memory.tiling import run_as

Prepare = Callable[[Decoder], Layerwise]
"""Makes a decoder layer ready to run."""


def run_layers(model: PreTrainedModel, shards: int, prepare: Prepare) -> None:
    """Make the decoder layers of `model` run as what `prepare` makes of them. Changes the instances only.

    `shards` ranks share each sample. Raises `ValueError` for a part that layers may not have. A layer of unknown
    parts is prepared at its first call.
    """
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "method 'layerwise' computes experts by tile and has no router loss, but output_router_logits is true; set "
            "it to false, or use method 'alst'"
        )
    layers = hf.decoder_layers(model)
    taps = [Tap(layer) for layer in layers]
    of_module = {m: tap for layer, tap in zip(layers, taps, strict=True) for m in layer.modules()}
    # Layers whose parts are known never call it. But with it, transformers builds no mask, and a mask is refused.
    attentions = hf.attention_modules(model)
    hf.use_attentions(model, [of_module[module] for module in attentions])
    for layer, tap in zip(layers, taps, strict=True):
        refuse_parts(layer)
        if not any(module in attentions for module in layer.modules()):
            tap.refuse(NO_ATTENTION)
        parts = known.read(layer)
        run_as(layer, _Unread(tap, shards, prepare) if parts is None else _forward(prepare(parts)))


def all_known(model: PreTrainedModel) -> bool:
    """Whether the parts of all decoder layers are known, so that they read no hidden states but the layer's before."""
    return all(known.read(layer) is not None for layer in hf.decoder_layers(model))


def run_in_place(norm: nn.Module, size: int, offload: HostOffload) -> None:
    """Make `norm` run in tiles of at most `size` rows and overwrite its input. Changes the instance only."""
    stock = norm.forward

    def forward(hidden_states: Tensor) -> Tensor:
        local = hidden_states.shape[1]
        return in_place(stock, hidden_states, -(-local // -(-local // size)), offload)

    run_as(norm, forward)


def _forward(layer: Layerwise) -> Any:
    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        layout: Layout | None = None,
        **others: Any,
    ) -> Tensor:
        refuse_cache(others)
        layout = reached(layout, hidden_states.shape[1], layer.groups.degree)
        return layer(hidden_states, Call(layout, (), {"position_embeddings": position_embeddings}))

    return forward


class _Unread:
    """The forward of a layer of unknown parts, which its first call prepares."""

    def __init__(self, tap: Tap, shards: int, prepare: Prepare) -> None:
        self._tap, self._shards, self._prepare = tap, shards, prepare
        self._layer: Layerwise | None = None

    def __call__(self, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        """As the layer's own forward. Raises `ValueError` for arguments that tiles cannot have."""
        tap = self._tap
        hidden, args, kwargs = tap.without_hidden(args, kwargs)
        layout = reached(layout or tap.noted_layout(), tap.length(hidden), self._shards)
        call = Call(layout, args, kwargs)
        tap.refuse_arguments(call)
        if self._layer is None:
            self._layer = self._prepare(measure(tap, hidden, call))
        return tap.returned(self._layer(hidden, call))
