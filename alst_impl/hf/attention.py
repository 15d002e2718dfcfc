"""Our attention in transformers' registry.

Legend: B batch, S sequence, P sequence-parallel degree, H query heads, K kv heads, D head dim.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alst_impl.hf.structure import attention_modules, decoder_of, names_in_methods
from alst_impl.layout import Layout
from alst_impl.ops.attention.variant import Variant

ATTENTION = "alst"
"""Name of our attention in transformers' registry.
No mask function is registered under it, so transformers builds no S x S mask."""


HARMLESS = {
    "cache_position",
    "input_ids",
    "labels",
    "num_items_in_batch",
    "position_ids",
    "shift_labels",
}
"""Tensors that models pass to attention and that change nothing in it."""


class Attention(Protocol):
    """What a model's attention modules call, with the signature of a core attention."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout | None,
        variant: Variant,
    ) -> Tensor:
        """query [B, H, S/P, D], key and value [B, K, S/P, D] -> [B, H, S/P, D].

        `layout` is the batch's; None if it is trivial.
        """
        ...


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask is not supported: kernels and shards know causality, windows and documents, and no other mask; "
            "pad right, mask the labels and pass none, or use method 'baseline' if the model itself makes one"
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | None = None,
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
            f"attention got {query.shape[2]} queries and {key.shape[2]} keys: a key/value cache is not supported in "
            "training; generate with the stock model, `with alst.disabled(): model.generate(...)`"
        )
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in HARMLESS:
            raise ValueError(
                f"attention with '{name}' is not supported here: kernels compute scores from query and key alone; "
                "use method 'baseline' with attention 'sdpa', which leaves the choice to transformers"
            )
    if dropout:
        raise ValueError(
            f"attention dropout ({dropout}) is not supported here: kernels, tiles and rings compute weights block by "
            "block and draw no masks of them; set it to 0 in the model's configuration (attention_dropout, attn_pdrop), or use "
            "method 'baseline'"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(
            f"{type(module).__name__} is not causal, but shards and kernels are; use method 'baseline' with attention "
            "'sdpa', which leaves the mask to transformers"
        )
    shown: tuple[int | None, int | None] = vars(module).get("limits_of_mask", (None, None))
    variant = Variant(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=shown[0] if sliding_window is None else sliding_window,
        chunk=shown[1],
        softcap=softcap,
        sinks=s_aux,
    )
    out = attend(query, key, value, layout=_layout(module, layout), variant=variant)
    return out.transpose(1, 2).contiguous(), None


def layer_type(module: nn.Module) -> str:
    """The type of the attention's layer, such as "full_attention"; "" if the configuration has none."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return "" if types is None or index is None else types[index]


def _limits_of_mask(module: nn.Module, called: set[str]) -> tuple[int | None, int | None]:
    """(window, chunk) that the model's masks give the attention `module`, by its layer's type.

    Some models pass no window to attention, because their mask shows it. `called` are names in the model's code.
    """
    kind = layer_type(module)

    def limit(word: str, make: str, name: str) -> int | None:
        found: int | None = getattr(module.config, name, None)
        if word in kind and found is None:
            raise ValueError(
                f"{type(module).__name__} is of type '{kind}', but its configuration has no {name}; set it"
            )
        return found if word in kind or (not kind and make in called) else None

    window = limit("sliding", "create_sliding_window_causal_mask", "sliding_window")
    return window, limit("chunked", "create_chunked_causal_mask", "attention_chunk_size")


AttentionInterface.register(ATTENTION, _attention)


def use_attention(model: PreTrainedModel, attention: Attention) -> None:
    """Route every attention module of `model`, and of no other model, through `attention`."""
    use_attentions(model, [attention] * len(attention_modules(model)))


def use_attentions(model: PreTrainedModel, attentions: Sequence[Attention]) -> None:
    """As `use_attention`, with one attention per attention module, in order."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:  # its own copy: two models may have been built from one object
            vars(module)["config"] = copy.deepcopy(config, memo)
    vars(model)["stock_attention"] = model.config._attn_implementation
    modules, called = attention_modules(model), names_in_methods(model)
    if modules:  # else the model's masks stay those of its own attention
        model.config._attn_implementation = ATTENTION
    for module, attention in zip(modules, attentions, strict=True):
        vars(module)["config"]._attn_implementation = ATTENTION
        vars(module)["alst_attention"] = attention
        vars(module)["noted_layout"] = None
        vars(module)["limits_of_mask"] = _limits_of_mask(module, called)

    def note_call(model: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note_layout(model, kwargs.get("layout"))

    model.register_forward_pre_hook(note_call, with_kwargs=True)
    decoder_of(model).register_forward_pre_hook(_note_layout, with_kwargs=True)

    def refuse_mask(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Transformers builds no mask for our attention, so a padding mask would be ignored silently.
        if base.config._attn_implementation == ATTENTION:  # type: ignore[union-attr]
            _refuse_mask(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))

    decoder_of(model).register_forward_pre_hook(refuse_mask, with_kwargs=True)


def _note_layout(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Note the layout that the decoder is called with, if its model passes one on, for modules whose layers do not."""
    if "layout" in kwargs:
        note_layout(decoder, kwargs["layout"])
    takes = inspect.signature(decoder.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        kwargs = {name: value for name, value in kwargs.items() if name != "layout"}
    return args, kwargs


def note_layout(part: nn.Module, layout: Layout | None) -> None:
    """Note `layout` for all modules inside `part` that may not get it as an argument."""
    for module in part.modules():
        if "noted_layout" in vars(module):
            vars(module)["noted_layout"] = layout


@contextmanager
def noting_layout(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Context in which `layout` is noted for all modules of `model`; afterwards none is. Local."""
    note_layout(model, layout)
    try:
        yield
    finally:
        note_layout(model, None)


def noted_layout(part: nn.Module) -> Layout | None:
    """The layout that was noted last for modules inside `part`."""
    noted = (vars(module).get("noted_layout") for module in part.modules())
    return next((layout for layout in noted if layout is not None), None)


def _layout(module: nn.Module, passed: Layout | None) -> Layout | None:
    """The layout of a call of attention: `passed`, or else the one that was noted when its decoder was called.

    Layers that are recomputed note the one of their first run again. A pipeline runs other slices between forward and
    backward of one, so there a layer has to pass it on.
    """
    if passed is not None:
        return passed
    noted: Layout | None = vars(module).get("noted_layout")
    if noted is not None and (noted.pp > 1 or (noted.part is not None and noted.passes == 1)):
        raise ValueError(
            f"layers do not pass keyword arguments on to their {type(module).__name__}, which a pipeline needs; "
            "use method 'alst'"
        )
    return noted


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Context in which `model` uses the attention it had before `use_attention`, masks included."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    ours = [c for c in configs.values() if c._attn_implementation == ATTENTION]
    try:
        for config in ours:
            config._attn_implementation = vars(model)["stock_attention"]
        yield
    finally:
        for config in ours:
            config._attn_implementation = ATTENTION
