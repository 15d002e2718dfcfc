"""Unmodified transformers models from published configurations, and their initial weights.

The configurations are data beside this file, copied from the models' published `config.json`. Models are
built on the meta device. An engine fills them module by module, so no process ever holds more than its shard
and one module.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alst_impl.config import LoraConfig, TrainConfig
from alst_impl.extras import require
from alst_impl.plugin import nearest, squeezed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
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
    try:
        config = json.loads(path.read_text())
        model_type = config["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not a model configuration: no JSON object with a 'model_type'"
        ) from None
    for key in overrides or {}:
        if key not in config:
            raise ValueError(
                f"override '{key}' is not a field of model '{model}' ({model_type}); "
                f"its fields are {', '.join(sorted(config))}"
            )
    return {**config, **(overrides or {})}


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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = copy.deepcopy(fields)  # transformers keeps nested ones
    fields.pop("auto_map", None)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model '{model}': the installed transformers does not know model_type '{model_type}'"
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"model '{model}': transformers refuses its configuration: {said}"
        ) from None


def build(config: TrainConfig) -> tuple[PreTrainedModel, Initializer]:
    """The stock model on the meta device, and the initializer of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' grouped experts have no fp64 kernel; its eager loop does.
    experts = {"experts_implementation": "eager"} if config.dtype == "float64" else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config(config),
            dtype=getattr(torch, config.dtype),
            **experts,
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
            for holder, key in _holders(model, parameter):
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


ADAPTER, FROZEN = ".lora_", ".base_layer"
"""Parts of the paths of modules that peft adds, and of modules that peft moves."""


@dataclass(frozen=True)
class Initializer:
    """Initial weights as a function of (seed, module path) only, so they are the same under every sharding.

    Both matrices of an adapter are drawn like any projection. If one started at zero, the gradient of the
    other would be zero.
    """

    seed: int
    weights: str | None = None
    """Folder with real weights; None draws them as transformers does."""

    def values(self, model: PreTrainedModel, path: str, module: nn.Module) -> dict[str, Tensor]:
        """CPU values of the parameters and buffers that `module` itself holds, by name.

        Draws in fp32 and rounds to each tensor's dtype, so all dtypes start from the same model.
        """
        import torch

        if self.weights is not None and ADAPTER not in path:
            source = self._loaded.get_submodule(path.replace(FROZEN, ""))
            stored = {**source._parameters, **source._buffers}
            return _as_held({k: v.detach() for k, v in stored.items() if v is not None}, module)
        # Runs the model's own `_init_weights` on a copy of the module with real tensors.
        shell = copy.copy(module)
        shell.__dict__["_parameters"] = {
            name: None if p is None else torch.nn.Parameter(torch.full(p.shape, torch.nan))
            for name, p in module._parameters.items()
        }
        shell.__dict__["_buffers"] = {
            name: None if b is None else torch.full(b.shape, torch.nan)
            for name, b in module._buffers.items()
        }
        digest = hashlib.sha256(f"{self.seed}/{path}".encode()).digest()
        owner = _owner(model, path)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            owner._init_weights(shell)
            for name, value in [*shell._parameters.items(), *shell._buffers.items()]:
                # The constructor initializes it, or the module around it. Its distribution is free, so that of
                # most weights serves. A module's persistent state, such as a factor, would lose its meaning.
                if value is not None and value.isnan().any() and name in module._parameters:
                    value.normal_(std=getattr(owner.config, "initializer_range", None) or 0.02)
        drawn = {
            k: v.detach()
            for k, v in {**shell._parameters, **shell._buffers}.items()
            if v is not None
        }
        for name, value in drawn.items():
            # NaN means that `_init_weights` did not set the tensor: its constructor did.
            if value.isnan().any():
                drawn[name] = _constructed(model).get_buffer(f"{path}.{name}".lstrip("."))
        return _as_held(drawn, module)

    def fill(self, model: PreTrainedModel, part: nn.Module, device: torch.device) -> None:
        """Replace meta tensors of `part` and its submodules by real ones on `device`, keeping ties."""
        import torch

        inside = set(part.modules())
        for path, module in model.named_modules():
            if module not in inside or not _has_meta(module):
                continue
            values = self.values(model, path, module)
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    real = torch.nn.Parameter(values[name].to(device), parameter.requires_grad)
                    for holder, key in _holders(model, parameter):
                        holder._parameters[key] = real
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = values[name].to(device)

    @cached_property
    def _loaded(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        # Weights are read from safetensors, which maps the file: pages of other shards stay on disk.
        return AutoModelForCausalLM.from_pretrained(
            str(self.weights), local_files_only=True, use_safetensors=True
        )


def _constructed(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with the buffers that its constructors compute, and parameters on the meta device. Kept on `model`."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    if "constructed" not in vars(model):
        hook = register_module_parameter_registration_hook(to_meta)
        try:
            vars(model)["constructed"] = [type(model)(copy.deepcopy(model.config))]
        finally:
            hook.remove()
    constructed: PreTrainedModel = vars(model)["constructed"][0]
    return constructed


def _as_held(values: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """`values`, each in the dtype of the tensor of that name in `module`."""
    held = {**module._parameters, **module._buffers}
    return {k: value.to(t.dtype) for k, value in values.items() if (t := held[k]) is not None}


def _has_meta(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(t is not None and t.is_meta for t in tensors)


def _holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every (module, name) that holds `parameter`: more than one where weights are tied."""
    return [
        (module, name)
        for module in model.modules()
        for name, held in module._parameters.items()
        if held is parameter
    ]


def _owner(model: PreTrainedModel, path: str) -> Any:
    """The innermost transformers model around `path`: its `_init_weights` applies there."""
    from transformers import PreTrainedModel

    owner: nn.Module = model
    module: nn.Module = model
    for name in path.split(".") if path else []:
        module = getattr(module, name)
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner
