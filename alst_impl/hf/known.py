"""Reads the parts of an unmodified Hugging Face decoder layer, for `alst_impl.ops.layerwise.known`.

They are those of a layer that computes norm, attention, residual, norm, MLP, residual. A layer with any other
part computes something else, and its parts stay unknown.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.layerwise.known import Heads, Known

LAYER = {
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
    "mlp",
    "resid_attn_dropout",
    "resid_mlp_dropout",
}
"""Allowed modules of a layer. The last two are Phi-3's dropouts, which must have p=0."""
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
FUSED = {"qkv_proj", "o_proj"}
"""Allowed modules of an attention, with separate or with fused projections. The norms are per head."""
MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
"""Allowed modules of an MLP. Any token-wise module would work, but not experts: their routing depends on values."""
LAYER_FIELDS = {"hidden_size", "config", "layer_idx", "layer_type", "attention_type"}
ATTENTION_FIELDS = {
    "alst_attention",
    "attention_dropout",
    "config",
    "head_dim",
    "hidden_size",
    "is_causal",
    "layer_idx",
    "layer_type",
    "limits_of_mask",
    "noted_layout",
    "num_attention_heads",
    "num_heads",
    "num_key_value_groups",
    "num_key_value_heads",
    "scaling",
    "sliding_window",
}
"""Allowed plain attributes: those that do not change the result, and those that are read here.
Others, such as a multiplier or a soft-cap, make the layer one of unknown parts."""
_OF_MODULES = {
    *vars(nn.Module()),
    "_gradient_checkpointing_func",
    "_is_hf_initialized",
    "gradient_checkpointing",
}


class _UnknownPartError(Exception):
    """A module has another part, which the message names."""


def read(layer: nn.Module) -> Known | None:
    """The parts of `layer`; None if it has others."""
    try:
        return _parts(layer)
    except _UnknownPartError:
        return None


def _parts(layer: nn.Module) -> Known:
    attention = _child(layer, "self_attn")
    fused = hasattr(attention, "qkv_proj")
    _check_others(layer, LAYER, LAYER_FIELDS)
    _check_others(attention, FUSED if fused else SEPARATE, ATTENTION_FIELDS)
    _check_others(_child(layer, "mlp"), MLP, None)
    for name in ("head_dim", "scaling"):
        if not hasattr(attention, name):
            raise _UnknownPartError(f"no '{name}'")
    dim = attention.head_dim
    query, key, value = _projections(attention, dim, fused=fused)
    before = _child(layer, "input_layernorm")
    after, mlp = _child(layer, "post_attention_layernorm"), _child(layer, "mlp")
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise _UnknownPartError("a rotary embedding that its module does not define")

    def feed_forward(residual: Tensor) -> Tensor:
        out: Tensor = mlp(after(residual))
        return out

    return Known(
        module=layer,
        before=before,
        query=query,
        key=key,
        value=value,
        rotate=rotate,
        output=_child(attention, "o_proj"),
        feed_forward=feed_forward,
        variant=Variant(attention.scaling, _window(attention)),
    )


def _child(module: nn.Module, name: str) -> Any:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise _UnknownPartError(f"no '{name}'")
    return child


def _check_others(module: nn.Module, modules: set[str], fields: set[str] | None) -> None:
    """Raise for a child not in `modules`, any own parameter, or an attribute not in `fields`."""
    for name, child in module.named_children():
        if name not in modules:
            raise _UnknownPartError(f"'{name}' ({type(child).__name__})")
    for name, _ in module.named_parameters(recurse=False):
        raise _UnknownPartError(f"parameter '{name}'")
    if fields is None:
        return
    for name, value in vars(module).items():
        if name not in _OF_MODULES | fields and value is not None:
            raise _UnknownPartError(f"'{name}' ({value!r})")


def _projections(attention: Any, dim: int, *, fused: bool) -> tuple[Heads, Heads, Heads]:
    config = attention.config
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if fused:
        linear = _linear(attention, "qkv_proj")
        first_value = (num_heads + num_kv_heads) * dim
        return (
            Heads(linear, 0, num_heads, dim),
            Heads(linear, num_heads * dim, num_kv_heads, dim),
            Heads(linear, first_value, num_kv_heads, dim),
        )
    return (
        Heads(_linear(attention, "q_proj"), 0, num_heads, dim, _norm(attention, "q_norm", dim)),
        Heads(_linear(attention, "k_proj"), 0, num_kv_heads, dim, _norm(attention, "k_norm", dim)),
        Heads(_linear(attention, "v_proj"), 0, num_kv_heads, dim),
    )


def _linear(attention: nn.Module, name: str) -> nn.Linear:
    linear = _child(attention, name)
    if type(linear) is not nn.Linear:  # an adapter or a quantized one computes something else
        raise _UnknownPartError(f"'{name}' ({type(linear).__name__}, not nn.Linear)")
    return linear


def _norm(attention: nn.Module, name: str, dim: int) -> nn.Module | None:
    norm: nn.Module | None = getattr(attention, name, None)
    if norm is not None and any(p.numel() != dim for p in norm.parameters()):
        raise _UnknownPartError(f"'{name}' over more than one head")
    return norm


def _window(attention: Any) -> int | None:
    """The sliding window: the attention's own attribute, or else the configuration's (Mistral, Phi-3)."""
    config_window = getattr(attention.config, "sliding_window", None)
    window: int | None = getattr(attention, "sliding_window", config_window)
    return window
