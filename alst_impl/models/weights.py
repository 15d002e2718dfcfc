"""Initial weights: drawn from a seed or read from a folder, module by module."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

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
                    for holder, key in holders(model, parameter):
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


def holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
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
