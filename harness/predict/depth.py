"""Layers of a model: their number, whether they are alike, and the same model with fewer of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from alst_impl import hf
from alst_impl.config import TrainConfig
from alst_impl.models import LAYERS, build, published


def at_depth(config: TrainConfig, num_layers: int) -> TrainConfig:
    """The same run of a model with `num_layers` layers."""
    fields = published(config.model, config.overrides)
    name = next((each for each in LAYERS if each in fields), None)
    if name is None:
        raise ValueError(
            f"the configuration of '{config.model}' ({fields['model_type']}) does not say how many layers it has, as "
            f"{' or '.join(LAYERS)}; add it, or take the configuration of its text model"
        )
    # Lists with one entry per layer are truncated, too.
    cut = {
        key: value[:num_layers]
        for key, value in fields.items()
        if isinstance(value, list) and len(value) == fields[name]
    }
    overrides = {**config.overrides, **cut, name: num_layers}
    return config.model_copy(update={"overrides": overrides})


@dataclass(frozen=True)
class Structure:
    """Number of parameters and uniformity of layers of a model."""

    num_parameters: int
    """All parameters, tied ones counted once."""
    num_expert_parameters: int
    """Those of routed experts."""
    num_trained_parameters: int
    """Those that the optimizer updates: all without adapters."""
    layers_alike: bool
    """Whether every decoder layer holds modules and parameters of the same types and shapes."""


def structure(config: TrainConfig) -> Structure:
    """The structure of the model of `config`, from the model itself."""
    fields = json.dumps(
        [published(config.model, config.overrides), str(config.lora)], sort_keys=True
    )
    if fields not in _STRUCTURES:
        model, _ = build(config)
        kinds = {_kind(layer) for layer in hf.decoder_layers(model)}
        types = set(published(config.model, config.overrides).get("layer_types") or ())
        _STRUCTURES[fields] = Structure(
            num_parameters=sum(p.numel() for p in model.parameters()),
            num_expert_parameters=sum(p.numel() for p in hf.expert_parameters(model)),
            num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers_alike=len(kinds) == 1 and len(types) <= 1,
        )
    return _STRUCTURES[fields]


_STRUCTURES: dict[str, Structure] = {}
"""Cache by configuration. A search needs the same structure at every length."""


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple(type(module) for module in layer.modules())
    return modules, tuple((name, p.shape) for name, p in layer.named_parameters())
