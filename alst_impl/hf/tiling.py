"""Runs modules, and the head with the loss, in tiles of the sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from alst_impl.hf import router
from alst_impl.hf.instances import bound, set_forward
from alst_impl.hf.structure import (
    decoder_layers,
    decoder_name,
    decoder_of,
    head_name,
    returned_values,
)
from alst_impl.ops.memory.loss import TokenLoss, tiled_loss
from alst_impl.ops.memory.tiling import run_as, tiled
from alst_impl.placement import Evidence

Tiles = Callable[[Tensor], int]
"""Number of tiles for hidden states [B, S, ..., E]."""


def tile_module(
    module: nn.Module, tiles: Tiles, evidence: Evidence, *, recompute: bool = True
) -> None:
    """Make `module`'s forward run in tiles of the sequence. For modules that map [B, S, ..., E] token-wise.

    Without `recompute`, the activations of all tiles are kept for backward. A call with fewer axes or further
    arguments runs untiled, which is as exact.

    A query or key norm may get [B, H, S, D]. It normalizes each head separately, so tiling over heads is
    exact too.
    """
    rest = returned_values(module) - 1
    vars(module)["tiling"] = _Tiling(module.forward, tiles, evidence, recompute, rest)
    run_as(module, bound(module, _tiled_forward))


@dataclass(frozen=True)
class _Tiling:
    """State of a tiled module's forward."""

    stock: Callable[..., Any]
    tiles: Tiles
    evidence: Evidence
    recompute: bool
    rest: int
    """Number of further values that the module returns and its layer drops."""


def _first(several: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    first: Tensor = several(x)[0]
    return first


def _tiled_forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    tiling: _Tiling = vars(module)["tiling"]
    if hidden_states.dim() < 3 or args or kwargs:
        return tiling.stock(hidden_states, *args, **kwargs)
    count = min(tiling.tiles(hidden_states), hidden_states.shape[1])
    tiling.evidence["tiles"] += count
    fn = partial(_first, tiling.stock) if tiling.rest else tiling.stock
    if tiling.recompute:
        out = tiled(fn, hidden_states, count)
    else:
        rows = -(-hidden_states.shape[1] // count)
        out = torch.cat([fn(tile) for tile in hidden_states.split(rows, dim=1)], dim=1)
    return (out, *[None] * tiling.rest) if tiling.rest else out


class _Output(MoeModelOutputWithPast):
    """A decoder's output in which fields of other output classes are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _StandIn(nn.Module):
    """Stand-in for a module of the model. It has the module's attributes, and owns no parameter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that the module stays registered in one place only

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"][0], name)


class _Given(_StandIn):
    """Stand-in for a decoder whose output is given. Some models call its part `decoder` instead (OPT)."""

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return _Output(last_hidden_state=inputs_embeds)


class _Projection(_StandIn):
    """The head's own projection, without the hooks that engines register on the head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        self._stock = type(head).forward

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._stock(self._module[0], hidden)
        return logits


@dataclass
class _TiledLoss:
    """State of the forwards of a model and its head for a tiled loss."""

    tiles: Tiles
    evidence: Evidence
    overwrite: bool
    release: bool
    adds_up: Callable[..., Any] | None = None
    """The loss function that was last checked to be a sum over tokens."""


def tile_loss(
    model: PreTrainedModel,
    tiles: Tiles,
    evidence: Evidence,
    *,
    overwrite: bool = False,
    release: bool = False,
) -> None:
    """Make `model(..., shift_labels=, num_items_in_batch=)` compute logits and loss in tiles.

    The model's own code computes all that follows the decoder (head, logit scale, soft-cap, loss): each tile
    runs the class's forward with the decoder's output given. Without labels the model returns logits as
    usual. Head and loss function are looked up at each call, so both may be replaced later. The loss is
    computed inside the head's call, so an engine that gathers parameters around module calls gathers the head
    once for all tiles. `overwrite` is as in `tiled_loss`. With `release`, the embeddings of tokens are freed once
    the first decoder layer has run, though the model's forward still refers to them; they are NaN from then on.
    """
    head_name(model)  # refuses a model without a head now, not at the first step
    vars(model)["tiled_loss"] = _TiledLoss(tiles, evidence, overwrite, release)
    set_forward(model, _forward_with_tiled_loss)


def _forward_with_tiled_loss(
    model: PreTrainedModel, *args: Any, **kwargs: Any
) -> CausalLMOutputWithPast:
    shift_labels, count = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
    if shift_labels is None or count is None:
        router.forget(model)
        stock: CausalLMOutputWithPast = type(model).forward(model, *args, **kwargs)
        return stock
    for key in ("labels", "shift_labels", "num_items_in_batch"):
        kwargs.pop(key, None)
    name = head_name(model)
    head: nn.Module = getattr(model, name)
    if "stock_forward" not in vars(head):
        vars(head)["stock_forward"] = head.forward
        set_forward(head, _head_forward)
    routers = "router_loss" in vars(model)
    if routers:
        router.start(model, shift_labels.device)
        kwargs["output_router_logits"] = False  # its logits are not kept
    tiled: _TiledLoss = vars(model)["tiled_loss"]
    # Embeddings that the caller gives are the caller's.
    if tiled.release and not args and kwargs.get("inputs_embeds") is None:
        _release_input(decoder_layers(model)[0])
    hidden = decoder_of(model)(*args, **kwargs).last_hidden_state
    wanted = _LossOfHead(_epilogue(model, name, head), shift_labels, count, tiled)
    loss = head(hidden, wanted)
    if routers:
        loss = router.finish(model, loss, shift_labels, count, kwargs.get("layout"))
    return CausalLMOutputWithPast(loss=loss)


def _release_input(layer: nn.Module) -> None:
    """Free the memory of the hidden states that `layer` is next called with, once it has run: they become NaN."""
    if not torch.is_grad_enabled():
        return
    given: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handles[0].remove()
        given.append(args[0] if args else kwargs["hidden_states"])

    def release(*_: Any) -> None:
        handles[1].remove()
        x = given.pop()
        x.data = x.new_full((), float("nan")).expand(x.shape)

    # Engines hand a layer other tensors with the same memory, so the caller's are noted first.
    handles = [
        layer.register_forward_pre_hook(note, prepend=True, with_kwargs=True),
        layer.register_forward_hook(release),
    ]


class _LossOfHead:
    """Arguments for the loss in a head's call, in one object that engines pass on unchanged."""

    def __init__(
        self, epilogue: PreTrainedModel, labels: Tensor, count: Tensor, tiled: _TiledLoss
    ) -> None:
        self.epilogue, self.labels, self.count, self.tiled = epilogue, labels, count, tiled


def _head_forward(
    head: nn.Module, hidden: Tensor, wanted: _LossOfHead | None = None, **kwargs: Any
) -> Tensor:
    if wanted is None:
        logits: Tensor = vars(head)["stock_forward"](hidden, **kwargs)
        return logits
    tiled, token_loss = wanted.tiled, partial(_token_loss, wanted.epilogue)
    loss_function = wanted.epilogue.loss_function
    if loss_function is not tiled.adds_up:
        if not loss_function.__module__.startswith("transformers."):
            check_adds_up(loss_function, token_loss, hidden, wanted.count)
        tiled.adds_up = loss_function
    num_tiles = min(tiled.tiles(hidden), hidden.shape[1])
    tiled.evidence["tiles"] += num_tiles
    return tiled_loss(
        partial(_reach, token_loss, head),
        hidden,
        wanted.labels,
        wanted.count,
        num_tiles,
        overwrite=tiled.overwrite,
    )


@torch.no_grad()
def check_adds_up(
    loss_function: Callable[..., Any], token_loss: TokenLoss, hidden: Tensor, count: Tensor
) -> None:
    """Raise `ValueError` unless the loss is a sum over tokens divided by `num_items_in_batch`, so that tiles add up."""
    pair, one = hidden[:1, :1].expand(1, 2, -1), count.new_ones(())
    labels = torch.zeros(1, 2, dtype=torch.int64, device=hidden.device)
    of_pair = float(token_loss(pair, labels, one))
    halved = float(token_loss(pair, labels, 2 * one))
    of_token = float(token_loss(pair[:, :1], labels[:, :1], one))
    if not all(isclose(x, of_token, rel_tol=1e-3) for x in (of_pair / 2, halved)):
        name = getattr(loss_function, "__name__", repr(loss_function))
        raise ValueError(
            f"loss function '{name}' is not a sum over tokens divided by num_items_in_batch, so its tiles "
            "and shards do not add up; have it divide by num_items_in_batch"
        )


def _epilogue(model: PreTrainedModel, name: str, head: nn.Module) -> PreTrainedModel:
    """Shallow copy of `model` whose decoder returns a given output. It owns no parameter."""
    # `copy.copy` does not work on classes that `fully_shard` creates.
    epilogue: PreTrainedModel = object.__new__(type(model))
    vars(epilogue).update(vars(model))
    given: dict[str, nn.Module] = {
        decoder_name(model): _Given(decoder_of(model)),
        name: _Projection(head),
    }
    vars(epilogue)["_modules"] = {**model._modules, **given}
    return epilogue


def _token_loss(epilogue: PreTrainedModel, hidden: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    output = type(epilogue).forward(
        epilogue,
        inputs_embeds=hidden,
        labels=labels,
        shift_labels=labels,
        num_items_in_batch=count,
        use_cache=False,
        # A router loss is added to the sum over tiles.
        **({"output_router_logits": False} if "router_loss" in vars(epilogue) else {}),
    )
    loss: Tensor = output.loss
    return loss


def _reach(fn: Callable[..., Tensor], _: nn.Module, *args: Tensor) -> Tensor:
    """`fn(*args)`. The module argument lets `parameters_of` find its parameters."""
    return fn(*args)
