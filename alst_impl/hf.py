"""The only file that knows the inside of a Hugging Face model.

Nothing here edits modelling code or a class: changes are made on instances, so other models of the
process are untouched. Structure is found by what modules are, not by which model they belong to.
Legend: B batch, S sequence, P sequence-parallel degree, H heads, D head dim, E hidden size.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isclose
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from alst_impl.ops.loss import TokenLoss, tiled_loss
from alst_impl.ops.offload import HostOffload, checkpoint
from alst_impl.ops.tiling import run_as, tiled
from alst_impl.placement import Evidence

ATTENTION = "alst"
"""Name of our attention in transformers' registry. Transformers builds no mask for a name it does not
know one for, which is what keeps S x S masks away."""
Attention = Callable[..., Tensor]
"""(query [B, H, S/P, D], key and value [B, K, S/P, D], scale=, window=, documents=) -> [B, H, S/P, D]."""

# -- changes on instances -------------------------------------------------------------------------


def bound(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(module, ...)` as a method of this instance with the signature of the class's own forward.

    `copy.deepcopy` binds a method to the copy, and callers that look for a model's arguments
    (transformers' Trainer) find them.
    """

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    vars(method)["__signature__"] = inspect.signature(type(module).forward)
    return MethodType(method, module)


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module(...)` call `forward(module, ...)`, on this instance alone."""
    vars(module)["forward"] = bound(module, forward)


# -- structure ------------------------------------------------------------------------------------


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The repeated decoder layers, in order."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that transformers can checkpoint")
    return layers


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call transformers' attention interface."""
    found = [
        child
        for layer in decoder_layers(model)
        for child in layer.modules()
        if hasattr(child, "is_causal") and hasattr(child, "scaling")
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module that uses transformers' attention interface"
        )
    return found


def token_wise_modules(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """(MLPs, norms): what works on one token at a time, norms of queries and keys and the final one included.

    Raises `ValueError` for a layer without an MLP.
    """
    attention = set(attention_modules(model))
    mlps, norms = [], []
    for layer in decoder_layers(model):
        children = [
            m
            for m in layer.children()
            if m not in attention and next(m.parameters(), None) is not None
        ]
        of_layer = [m for m in children if "Norm" not in type(m).__name__]
        if not of_layer:
            raise ValueError(
                f"{type(layer).__name__} has no MLP beside its attention: nothing to tile"
            )
        mlps += of_layer
        of_heads = [m for part in layer.children() if part in attention for m in part.children()]
        norms += [m for m in children + of_heads if "Norm" in type(m).__name__]
    return mlps, norms + final_norms(model)


def final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norm between the decoder layers and the head, where there is one."""
    return [m for m in model.base_model.children() if "Norm" in type(m).__name__]


def head_name(model: PreTrainedModel) -> str:
    """Attribute of `model` that holds the projection to the vocabulary."""
    head = model.get_output_embeddings()
    for name, child in model.named_children():
        if child is head:
            return name
    raise ValueError(
        f"{type(model).__name__} has no output embedding among its children: no loss to tile"
    )


# -- stages of a pipeline -------------------------------------------------------------------------


class _Elsewhere(nn.Module):
    """Stands for what another stage has: passes hidden states on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Border(nn.Module):
    """Stands for the first or last layer where another stage has it: hidden states come in or leave here."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        """What to pass on in place of what comes."""
        self.seen: Tensor | None = None
        """What came."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.given is None else self.given

    def clear(self) -> None:
        """Hold nothing."""
        self.given = self.seen = None


def keep_stage(model: PreTrainedModel, kept: range) -> None:
    """Leave `model` the decoder layers in `kept`, with the embedding before the first and the head after the last.

    Names of parameters stay. Without the first layer, `model(hidden=, ...)` takes hidden states
    [B, S, E] in place of token ids; without the last it returns hidden states. Whatever the model does
    to embeddings before its layers is done on the first stage alone, whatever it does after them on the
    last. Raises `ValueError` for tied embeddings, which two stages would have to share.
    """
    layers = list(decoder_layers(model))
    first, last = kept.start == 0, kept.stop == len(layers)
    if not (first and last):
        _refuse_tied(model)
    stack = _stack(model, layers)
    for index in set(range(len(layers))) - set(kept):
        stack[index] = _Border() if index in (0, len(layers) - 1) else _Elsewhere()
    if not first:
        _replace(model, model.get_input_embeddings())
    if not last:
        for module in [*final_norms(model), model.get_output_embeddings()]:
            _replace(model, module)
    whole = model.forward

    def forward(hidden: Tensor | None = None, **kwargs: Any) -> Tensor | CausalLMOutputWithPast:
        ends = [end for end in (stack[0], stack[-1]) if isinstance(end, _Border)]
        try:
            if hidden is not None:
                ends[0].given = hidden
                kwargs["inputs_embeds"] = hidden
            if last:
                return whole(**kwargs)  # type: ignore[no-any-return]
            model.base_model(**kwargs)
            out = ends[-1].seen
            assert out is not None, "the last layer is another stage's"
            return out
        finally:
            for end in ends:
                end.clear()

    if not (first and last):
        vars(model)["forward"] = forward


def _refuse_tied(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ValueError(
            f"{type(model).__name__} shares one weight between embedding and head, which stages of a "
            "pipeline would each have; use a model without tied embeddings"
        )


def _stack(model: PreTrainedModel, layers: list[nn.Module]) -> nn.ModuleList:
    """The list that holds all decoder layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and list(module) == layers:
            return module
    raise ValueError(f"the decoder layers of {type(model).__name__} are not one list")


def _replace(model: PreTrainedModel, part: nn.Module) -> None:
    """Put a stand-in where `part` is."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is part:
                setattr(module, name, _Elsewhere())


# -- attention ------------------------------------------------------------------------------------


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is not supported under sequence parallelism; pad right, mask the labels, "
            "and pass no attention_mask"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: tuple[tuple[int, ...], ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S/P, D] in, [B, S/P, H, D] out."""
    attend: Attention | None = getattr(module, "alst_attention", None)
    if attend is None:  # a model that merely shares a configuration object with a wrapped one
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_mask(attention_mask)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries meet {key.shape[2]} keys: a key/value cache is not supported in "
            "training; generate with the stock model, `with alst.disabled(): model.generate(...)`"
        )
    for name in ("s_aux", "softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention with '{name}' is not supported here; use method 'baseline' with attention 'sdpa', "
                "which leaves the choice to transformers"
            )
    if dropout:
        raise ValueError(
            f"attention_dropout ({dropout}) is not supported here; set it to 0 in the model's configuration"
        )
    out = attend(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        documents=documents,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


def use_attention(model: PreTrainedModel, attention: Attention) -> None:
    """Route every attention module of `model`, and of no other model, through `attention`."""
    use_attentions(model, [attention] * len(attention_modules(model)))


def use_attentions(model: PreTrainedModel, attentions: Sequence[Attention]) -> None:
    """As `use_attention`, with one for each attention module, in order."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:  # its own copy: two models may have been built from one object
            vars(module)["config"] = copy.deepcopy(config, memo)
    vars(model)["stock_attention"] = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    for module, attention in zip(attention_modules(model), attentions, strict=True):
        vars(module)["config"]._attn_implementation = ATTENTION
        vars(module)["alst_attention"] = attention

    def refuse_mask(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Transformers builds no mask for our attention, so a padding mask would be lost in silence.
        if base.config._attn_implementation == ATTENTION:  # type: ignore[union-attr]
            _refuse_mask(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))

    model.base_model.register_forward_pre_hook(refuse_mask, with_kwargs=True)


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, attention of `model` is the one it had before `use_attention`, masks included."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    ours = [c for c in configs.values() if c._attn_implementation == ATTENTION]
    try:
        for config in ours:
            config._attn_implementation = vars(model)["stock_attention"]
        yield
    finally:
        for config in ours:
            config._attn_implementation = ATTENTION


# -- tiling ---------------------------------------------------------------------------------------

Tiles = Callable[[Tensor], int]
"""Number of tiles for hidden states [B, S, ..., E]."""


def tile_module(
    module: nn.Module, tiles: Tiles, evidence: Evidence, *, recompute: bool = True
) -> None:
    """Make `module`'s forward run in tiles of the sequence. For modules that map [B, S, ..., E] token-wise.

    Without `recompute`, backward has what forward made in all tiles.

    Norms of queries and keys may see [B, H, S, D]: they work on every head alone, so tiles of heads do.
    """
    vars(module)["tiling"] = _Tiling(module.forward, tiles, evidence, recompute)
    run_as(module, bound(module, _tiled_forward))


@dataclass(frozen=True)
class _Tiling:
    """What a tiled module's forward works with."""

    stock: Callable[..., Tensor]
    tiles: Tiles
    evidence: Evidence
    recompute: bool


def _tiled_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    if hidden_states.dim() < 3:
        raise ValueError(
            f"{type(module).__name__} is called on {hidden_states.dim()} axes, not on "
            "[batch, sequence, ..., hidden]: it cannot be tiled along the sequence"
        )
    tiling: _Tiling = vars(module)["tiling"]
    count = min(tiling.tiles(hidden_states), hidden_states.shape[1])
    tiling.evidence.tiles += count
    if tiling.recompute:
        return tiled(tiling.stock, hidden_states, count)
    rows = -(-hidden_states.shape[1] // count)
    tiles = [tiling.stock(tile) for tile in hidden_states.split(rows, dim=1)]
    return torch.cat(tiles, dim=1)


class _Given(nn.Module):
    """Stands for a decoder whose output is already there; the widest of transformers' outputs."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class _Projection(nn.Module):
    """The head's own projection, without the hooks that engines hang on the head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = [head]  # in a list, so that the head stays registered in one place only
        self._stock = type(head).forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self._stock(self._head[0], hidden)  # type: ignore[no-any-return]


@dataclass
class _TiledLoss:
    """What a model's and its head's forward work with where the loss is tiled."""

    tiles: Tiles
    evidence: Evidence
    overwrite: bool
    adds_up: Callable[..., Any] | None = None
    """The loss function that was found to be a sum over tokens."""


def tile_loss(
    model: PreTrainedModel, tiles: Tiles, evidence: Evidence, *, overwrite: bool = False
) -> None:
    """Make `model(..., shift_labels=, num_items_in_batch=)` compute logits and loss in tiles.

    What follows the decoder (head, logit scale, soft-cap, loss) is the model's own code: each tile goes
    through the class's forward, with the decoder's output given. Without labels the model returns
    logits as always. Head and loss function are looked up at each call: both may be replaced later. The
    loss is computed inside the head's call, so that an engine that gathers parameters around a module's
    call gathers the head's once for all tiles. `overwrite` as in `tiled_loss`.
    """
    head_name(model)  # refuses a model without a head now, not at the first step
    vars(model)["tiled_loss"] = _TiledLoss(tiles, evidence, overwrite)
    set_forward(model, _forward_with_tiled_loss)


def _forward_with_tiled_loss(
    model: PreTrainedModel, *args: Any, **kwargs: Any
) -> CausalLMOutputWithPast:
    shift_labels, count = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
    if shift_labels is None or count is None:
        return type(model).forward(model, *args, **kwargs)  # type: ignore[no-any-return]
    for key in ("labels", "shift_labels", "num_items_in_batch"):
        kwargs.pop(key, None)
    name = head_name(model)
    head: nn.Module = getattr(model, name)
    if "stock_forward" not in vars(head):
        vars(head)["stock_forward"] = head.forward
        set_forward(head, _head_forward)
    hidden = model.base_model(*args, **kwargs).last_hidden_state
    wanted = _LossOfHead(
        _epilogue(model, name, head), shift_labels, count, vars(model)["tiled_loss"]
    )
    return CausalLMOutputWithPast(loss=head(hidden, wanted))


class _LossOfHead:
    """What a head's call is given to compute the loss, in one object that engines pass on as it is."""

    def __init__(
        self, epilogue: PreTrainedModel, labels: Tensor, count: Tensor, tiled: _TiledLoss
    ) -> None:
        self.epilogue, self.labels, self.count, self.tiled = epilogue, labels, count, tiled


def _head_forward(
    head: nn.Module, hidden: Tensor, wanted: _LossOfHead | None = None, **kwargs: Any
) -> Tensor:
    if wanted is None:
        return vars(head)["stock_forward"](hidden, **kwargs)  # type: ignore[no-any-return]
    tiled, token_loss = wanted.tiled, partial(_token_loss, wanted.epilogue)
    loss_function = wanted.epilogue.loss_function
    if loss_function is not tiled.adds_up:
        if not loss_function.__module__.startswith("transformers."):
            _check_adds_up(loss_function, token_loss, hidden, wanted.count)
        tiled.adds_up = loss_function
    num_tiles = min(tiled.tiles(hidden), hidden.shape[1])
    tiled.evidence.tiles += num_tiles
    return tiled_loss(
        partial(_reach, token_loss, head),
        hidden,
        wanted.labels,
        wanted.count,
        num_tiles,
        overwrite=tiled.overwrite,
    )


@torch.no_grad()
def _check_adds_up(
    loss_function: Callable[..., Any], token_loss: TokenLoss, hidden: Tensor, count: Tensor
) -> None:
    """Raise `ValueError` unless tiles of a loss add up: a sum over tokens divided by `num_items_in_batch`."""
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
    """`model` with its decoder's output given: a shallow copy that owns no parameter."""
    # Not `copy.copy`, which fully_shard's classes refuse.
    epilogue: PreTrainedModel = object.__new__(type(model))
    vars(epilogue).update(vars(model))
    vars(epilogue)["_modules"] = {model.base_model_prefix: _Given(), name: _Projection(head)}
    return epilogue


def _token_loss(epilogue: PreTrainedModel, hidden: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    output = type(epilogue).forward(
        epilogue,
        inputs_embeds=hidden,
        labels=labels,
        shift_labels=labels,
        num_items_in_batch=count,
        use_cache=False,
    )
    loss: Tensor = output.loss
    return loss


def _reach(fn: Callable[..., Tensor], _: nn.Module, *args: Tensor) -> Tensor:
    """`fn(*args)`; the module beside it is there for its parameters to be discovered."""
    return fn(*args)


# -- checkpointing --------------------------------------------------------------------------------


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
