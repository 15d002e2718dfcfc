"""Unmodified transformers models from published configurations, and their initial weights.

The configurations are data beside this file, copied from the models' published `config.json`. Models are
built on the meta device. An engine fills them module by module, so no process ever holds more than its shard
and one module.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alst_impl.config import LoraConfig, TrainConfig
from alst_impl.extras import require
from alst_impl.models.stored import check_weights
from alst_impl.models.weights import Initializer, holders
from alst_impl.plugin import nearest, squeezed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def names() -> list[str]:
    """Names of the published configurations."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def canonical(model: str) -> str:
    """The name or path by which `published` finds `model`.

    A name of the hub is a path into the local cache, if it is there. Otherwise case, spaces, `-`, `_` and an
    organisation before the name are forgiven. A path, and a name that is not known, are returned as they are.
    """
    organisation, _, name = model.rpartition("/")
    if Path(model).exists() or model.startswith(("/", ".", "~")) or "/" in organisation:
        return model
    if organisation:
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # not a name that the hub allows
            cached = try_to_load_from_cache(model, "config.json")
            if isinstance(cached, str):
                return cached
    return {squeezed(each): each for each in names()}.get(squeezed(name), model)


def published(model: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of `model` as plain data, without importing torch.

    `model` is a name in this folder, a path to a `config.json`, or a folder that holds one. Raises
    `ValueError` for an unknown model or an override of a key that the configuration does not have.
    """
    path = Path(__file__).parent / f"{model}.json"
    if model not in names():
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            near = nearest(model.rpartition("/")[2], names())
            raise ValueError(
                f"unknown model '{model}'; {near}, a path to a config.json, or a hub name that the local cache has"
            )
    config = _read(path)
    for key in overrides or {}:
        if key not in config:
            raise ValueError(
                f"override '{key}' is not a field of model '{model}' ({config['model_type']}); "
                f"its fields are {', '.join(sorted(config))}"
            )
    fields = {**config, **(overrides or {})}
    if not isinstance(fields["model_type"], str):
        raise ValueError(f"model_type = {fields['model_type']!r}: must be a name, such as llama")
    _check_sizes(model, fields)
    if Path(model).is_dir() and model not in names():
        check_weights(Path(model))
    return fields


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        named = isinstance(config["model_type"], str)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file that can be read") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        named = False
    if not named:
        raise ValueError(
            f"{path} is not a model configuration: no JSON object with the name of a 'model_type'"
        )
    return config


def _check_sizes(model: str, fields: dict[str, Any]) -> None:
    """Raise `ValueError` for a size that no model has: transformers would build it for hours, or fail anywhere."""
    for holder in (fields, fields.get("text_config")):
        if not isinstance(holder, dict):
            continue
        for key in COUNTED:
            value, most = holder.get(key), MOST_LAYERS if key in LAYERS else LARGEST
            if value is None or isinstance(value, list | dict):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(
                    f"{key} = {value!r} in the configuration of model '{model}': must be a whole number from 1 to {most:,}"
                )
        heads, shared = (holder.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise ValueError(
                f"num_attention_heads ({heads}) must be divisible by num_key_value_heads ({shared}) in the configuration "
                f"of model '{model}'; use a divisor"
            )


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""Names of the number of layers in configurations."""
COUNTED = (
    *LAYERS,
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "head_dim", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "max_position_embeddings"),
)
"""Fields that count something, by their usual names."""
MOST_LAYERS, LARGEST = 1_024, 2**31 - 1


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Sizes that every decoder has, by the names that most configurations give them."""
DERIVED = (*SIZES, "num_key_value_heads", "head_dim", "sliding_window", "layer_types")
"""What `described` reads from a configuration object."""


def described(model: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """As `published`, with the sizes of the text model under their usual names.

    Some configurations name them otherwise (`n_embd`), nest them (`text_config`), or leave them to the defaults of
    their class. transformers, and so torch, is imported for these alone. Raises `ValueError` as `published` does.
    """
    fields = published(model, overrides)
    if all(key in fields for key in SIZES):
        return fields
    text = _configuration(model, fields).get_text_config(decoder=True)
    found = {key: value for key in DERIVED if (value := getattr(text, key, None)) is not None}
    return {**text.to_dict(), **fields, **found}


def field(fields: dict[str, Any], key: str) -> int:
    """The size `fields[key]`. Raises `ValueError` naming `key` if it is missing or not a positive integer."""
    if key not in fields:
        raise ValueError(f"the configuration of model_type '{fields['model_type']}' has no '{key}'")
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{key} = {value!r} in the configuration of model_type '{fields['model_type']}': "
            "must be a positive integer"
        )
    return value


FEATURES = {
    "softcap": "soft-capped attention logits",
    "sinks": "attention sinks",
    "chunks": "chunked attention",
    "mixers": "layers that mix tokens otherwise than by attention",
    "bidirectional": "bidirectional attention",
    "dropout": "attention dropout",
    "layerdrop": "layers that are skipped at random, which each rank would choose alone",
    "router loss": "a router loss, which shards would each compute alone",
    "shared keys": "layers that use other layers' keys and values, which checkpoints cut off from their gradients",
}
"""Features of a model that a method has to know, because it changes the training otherwise."""
_FIELDS = {
    "attn_logit_softcapping": "softcap",
    "attention_chunk_size": "chunks",
    "linear_conv_kernel_dim": "mixers",
    "mamba_d_state": "mixers",
    "use_bidirectional_attention": "bidirectional",
    "attention_dropout": "dropout",
    "attention_probs_dropout_prob": "dropout",
    "attn_pdrop": "dropout",
    "decoder_layerdrop": "layerdrop",
    "layerdrop": "layerdrop",
    "output_router_logits": "router loss",
    "num_kv_shared_layers": "shared keys",
}
"""Configuration fields that, when set, turn a feature on."""
_OFF = {
    "dropout": ": kernels, tiles and rings draw no masks of attention weights; 0 turns it off",
    "layerdrop": "; 0 turns it off",
}
"""Features that a user may do without, and how."""
_LAYERS = {"full_attention": None, "sliding_attention": None, "chunked_attention": "chunks"}
"""Known entries of `layer_types`; all others are mixers."""


def features(fields: dict[str, Any]) -> dict[str, str]:
    """Features of `FEATURES` that the configuration turns on, each with the field that says so."""
    found = {
        feature: f"{key}={fields[key]!r}{_OFF.get(feature, '')}"
        for key, feature in _FIELDS.items()
        if fields.get(key)
    }
    if fields["model_type"] == "gpt_oss":
        found["sinks"] = "model_type=gpt_oss"
    for index, kind in enumerate(fields.get("layer_types") or []):
        feature = _LAYERS.get(kind, "mixers")
        if feature is not None:
            found.setdefault(feature, f"{kind} in layer {index} of layer_types")
    return found


def unsupported(fields: dict[str, Any], known: Collection[str] = ()) -> str | None:
    """A feature of this configuration that a method does not know, in words; None if it knows all. `known` are its."""
    for feature, where in features(fields).items():
        if feature not in known:
            return f"{FEATURES[feature]} ({where})"
    return None


def rotary_by_longest(fields: dict[str, Any]) -> str | None:
    """The rotary scaling type if its frequencies depend on a forward pass's longest position, else None.

    A configuration may have one scaling per layer type. Older configurations call longrope "su" or "yarn",
    but only longrope has two sets of factors.
    """
    found = [fields.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    found += [each for scaling in found for each in scaling.values() if isinstance(each, dict)]
    for scaling in found:
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        if "dynamic" in kind or kind == "longrope" or "long_factor" in scaling:
            return kind
    return None


def window(fields: dict[str, Any]) -> int | None:
    """Sliding window of the layers that have one: the keys a query sees, itself included. None without a window."""
    on = fields.get("use_sliding_window", True)
    size: int | None = fields.get("sliding_window") if on else None
    return size


def has_weights(model: str) -> bool:
    """Whether `model` is a folder with real weights."""
    return Path(model).is_dir() and any(Path(model).glob("*.safetensors"))


def hf_config(config: TrainConfig) -> PreTrainedConfig:
    """The transformers configuration of a run. No code that came with a model is ever executed."""
    return _configuration(config.model, published(config.model, config.overrides))


def _configuration(model: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of `model` with all its `fields`."""
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = copy.deepcopy(fields)  # transformers keeps nested ones
    fields.pop("auto_map", None)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model '{model}': the installed transformers does not know model_type '{model_type}'"
        )
    with _telling(model, "refuses its configuration"):
        return AutoConfig.for_model(model_type, **fields)


@contextmanager
def _telling(model: str, what: str) -> Iterator[None]:
    """Whatever transformers raises about a configuration, said in one line with `model`."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"model '{model}': transformers {what}: {said}") from None
    except kinds as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"model '{model}': transformers {what}: {said}; mend its config.json"
        ) from None


def build(config: TrainConfig) -> tuple[PreTrainedModel, Initializer]:
    """The stock model on the meta device, and the initializer of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' grouped experts have no fp64 kernel; its eager loop does.
    experts = {"experts_implementation": "eager"} if config.dtype == "float64" else {}
    stock = hf_config(config)
    with torch.device("meta"):
        with _telling(config.model, "cannot build it"):
            model = AutoModelForCausalLM.from_config(
                stock, dtype=getattr(torch, config.dtype), **experts
            )
        if config.lora is not None:
            add_adapters(model, config.lora)
    _to_meta(model)
    return model, Initializer(config.seed, config.model if has_weights(config.model) else None)


def _to_meta(model: PreTrainedModel) -> None:
    """Move parameters that a constructor made elsewhere (with `torch.normal`) to the meta device, keeping ties.

    They would differ between ranks.
    """
    import torch

    for parameter in list(model.parameters()):
        if not parameter.is_meta:
            moved = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            for holder, key in holders(model, parameter):
                holder._parameters[key] = moved


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freeze `model` and add adapters to it, in place, on the current default device.

    Raises `ValueError` for a target that `model` lacks: peft adapts the others without it.
    """
    require("lora", "lora", "peft")
    import peft

    held = dict(model.named_modules())
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in held):
            last = {name.rpartition(".")[2] for name, module in held.items() if _is_matrix(module)}
            raise ValueError(
                f"adapters for {list(lora.targets)}: the model has no '{target}'; use some of {', '.join(sorted(last))}"
            )
    wanted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
    )
    try:
        peft.inject_adapter_in_model(wanted, model)
    except ValueError as error:
        raise ValueError(f"adapters for {list(lora.targets)}: {error}") from None


def _is_matrix(module: nn.Module) -> bool:
    """Whether `module` multiplies by one matrix, as a linear layer does, also transformers' own kind."""
    return type(module).__name__ in ("Linear", "Conv1D")


def materialize(config: TrainConfig) -> PreTrainedModel:
    """The whole stock model with its initial weights, on the CPU."""
    import torch

    model, initializer = build(config)
    initializer.fill(model, model, torch.device("cpu"))
    return model
