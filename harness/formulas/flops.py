"""FLOPs of one training step by two definitions, and the model dimensions that they use.

A multiply and an add count as two. Legend: N parameters, S tokens of a sequence, L layers, H query
heads, D head dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alst_impl.config import Frozen
from alst_impl.models import field, window
from alst_impl.ops.attention.patterns.base import Pattern, pairs_of
from alst_impl.ops.attention.variant import visible_pairs

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of routed experts of a layer in configurations."""
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names of the number of experts that a token is routed to."""


class Shape(Frozen):
    """Model dimensions that the formulas use."""

    num_parameters: int
    """All parameters, tied ones counted once."""
    num_lookup_parameters: int
    """Parameters of the input embedding, a lookup without a matrix product; 0 if the head shares it."""
    num_idle_parameters: int = 0
    """Parameters of the experts that a token is not routed to."""
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    windows: Mapping[int, int] = {}
    """Sliding window -> number of layers that have it. All other layers see the whole sequence."""


def shape_of(
    fields: Mapping[str, Any], num_parameters: int, num_expert_parameters: int = 0
) -> Shape:
    """The shape of a model from its Hugging Face configuration and its number of parameters, those of routed
    experts among them.
    """
    fields = dict(fields)
    hidden, heads = field(fields, "hidden_size"), field(fields, "num_attention_heads")
    tied = bool(fields.get("tie_word_embeddings"))
    return Shape(
        num_parameters=num_parameters,
        num_lookup_parameters=0 if tied else field(fields, "vocab_size") * hidden,
        num_idle_parameters=_idle(fields, num_expert_parameters),
        num_layers=field(fields, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=fields.get("head_dim") or hidden // heads,
        windows=_windows(fields),
    )


def _idle(fields: Mapping[str, Any], num_expert_parameters: int) -> int:
    experts, routed = (_first(fields, names) for names in (EXPERTS, ROUTED))
    if not num_expert_parameters or not experts or routed is None:
        return 0
    return num_expert_parameters * (experts - routed) // experts


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def _windows(fields: dict[str, Any]) -> dict[int, int]:
    size = window(fields)
    if size is None:
        return {}
    kinds = fields.get("layer_types")
    whole = field(fields, "num_hidden_layers")
    layers = whole if kinds is None else kinds.count("sliding_attention")
    return {size: layers} if layers else {}


def paper_formula(shape: Shape, seqlen: int) -> float:
    """FLOPs of one sequence as the paper counts them: 2 c N S + 4 c L E S^2 with c = 4.

    c counts forward, recomputed forward, and backward twice. Attention is not halved for causality.
    Source: arctic_training/metrics.py at 9d33fd2 in snowflakedb/ArcticTraining.
    """
    passes = 4
    linear = 2 * passes * shape.num_parameters * seqlen
    return float(linear + 4 * passes * shape.num_layers * shape.hidden_size * seqlen**2)


def model_causal(
    shape: Shape,
    documents: Sequence[int],
    frozen: float = 0.0,
    pattern: Pattern | None = None,
) -> float:
    """FLOPs that training on one sequence of `documents` (their lengths) requires, without recomputation and
    without masked scores.

    6 (N - lookup - idle) S + 12 L H D pairs: three passes. Attention has two matrix products over the visible
    query-key pairs, with a `pattern` only over its own. The share `frozen` of the parameters has no gradient, which saves them one pass.
    """
    linear = linear_forward(shape, sum(documents)) * (3 - frozen)
    return float(linear + 3 * attention_forward(shape, documents, pattern))


def linear_forward(shape: Shape, seqlen: int) -> int:
    """FLOPs of the parameters' matrix products in one forward pass, of experts only of those that are routed to."""
    active = shape.num_parameters - shape.num_lookup_parameters - shape.num_idle_parameters
    return 2 * active * seqlen


def attention_forward(
    shape: Shape, documents: Sequence[int], pattern: Pattern | None = None
) -> int:
    """FLOPs of causal attention in one forward pass: q k^T and p v over visible pairs, within `documents`.

    With a `pattern`, which no window of a layer joins, these are its pairs.
    """
    if pattern is not None:
        seen = shape.num_layers * sum(pairs_of(pattern, length) for length in documents)
        return 4 * shape.num_heads * shape.head_dim * seen
    windowed = sum(shape.windows.values())
    pairs = (shape.num_layers - windowed) * sum(visible_pairs(length) for length in documents)
    for size, layers in shape.windows.items():
        pairs += layers * sum(visible_pairs(length, size) for length in documents)
    return 4 * shape.num_heads * shape.head_dim * pairs
