"""FLOPs of one training step by two definitions, and the model dimensions that they use.

A multiply and an add count as two. Legend: N parameters, S tokens of a sequence, L layers, H query
heads, D head dim, E hidden size.
"""

from __future__ import annotations

from typing import Any

from alst_impl.config import Frozen
from alst_impl.models import field


class Shape(Frozen):
    """Model dimensions that the formulas use."""

    num_parameters: int
    """All parameters, tied ones counted once."""
    num_lookup_parameters: int
    """Parameters of the input embedding, a lookup without a matrix product; 0 if the head shares it."""
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int


def shape_of(fields: dict[str, Any], num_parameters: int) -> Shape:
    """The shape of a model from its Hugging Face configuration and its number of parameters."""
    hidden, heads = field(fields, "hidden_size"), field(fields, "num_attention_heads")
    tied = bool(fields.get("tie_word_embeddings"))
    return Shape(
        num_parameters=num_parameters,
        num_lookup_parameters=0 if tied else field(fields, "vocab_size") * hidden,
        num_layers=field(fields, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=fields.get("head_dim") or hidden // heads,
    )


def paper_formula(shape: Shape, seqlen: int) -> float:
    """FLOPs of one sequence as the paper counts them: 2 c N S + 4 c L E S^2 with c = 4.

    c counts forward, recomputed forward, and backward twice. Attention is not halved for causality.
    Source: arctic_training/metrics.py at 9d33fd2 in snowflakedb/ArcticTraining.
    """
    passes = 4
    linear = 2 * passes * shape.num_parameters * seqlen
    return float(linear + 4 * passes * shape.num_layers * shape.hidden_size * seqlen**2)


def model_causal(shape: Shape, seqlen: int) -> float:
    """FLOPs that training on one sequence requires, without recomputation and without masked scores.

    6 (N - lookup) S + 12 L H D S (S + 1) / 2: three passes. Attention has two matrix products over
    the visible query-key pairs.
    """
    return float(linear_forward(shape, seqlen) * 3 + attention_forward(shape, seqlen) * 3)


def linear_forward(shape: Shape, seqlen: int) -> int:
    """FLOPs of the parameters' matrix products in one forward pass."""
    return 2 * (shape.num_parameters - shape.num_lookup_parameters) * seqlen


def attention_forward(shape: Shape, seqlen: int) -> int:
    """FLOPs of causal attention in one forward pass: q k^T and p v over visible pairs."""
    pairs = seqlen * (seqlen + 1) // 2
    return 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
