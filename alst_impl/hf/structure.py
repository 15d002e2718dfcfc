"""Finds the parts of a Hugging Face model by module type and attributes, not by the model's name."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


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
    """(MLPs, norms): all modules that work on one token at a time, with query, key and final norms."""
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
    """The norm between the decoder layers and the head, if there is one."""
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
