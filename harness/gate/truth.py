"""The truth: gradients of a stock transformers model, run in one process in fp64.

    python truth.py (MODEL_FOLDER SAMPLES.safetensors GRADIENTS.safetensors DTYPE)...

DTYPE is `float64` for the truth. With another DTYPE the result shows the loss of accuracy of that dtype alone.
This file shares no code with the code that it judges, because an error in shared code would not show.

`save_pretrained` writes MODEL_FOLDER. With adapters it holds `config.json`, `lora.json` (arguments of peft's
`LoraConfig`) and `adapted.safetensors` (all weights by name). SAMPLES hold `input_ids`, `labels` (not shifted, -100
is ignored) and `position_ids`, int64 [N, S], of every micro-batch of one optimizer step on all ranks.

GRADIENTS get the gradient of each parameter, tied ones once, and `loss`: the sum of all token losses divided by the
number of labels, and a router loss if the configuration asks for it (`output_router_logits`). A model whose step draws random numbers has no truth: exit code `REFUSED` and one line on stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

REFUSED = 3
"""Exit code for a model without a truth."""
PROBED = 4
"""Number of tokens that suffices to see whether a model draws random numbers."""
ADAPTED, LORA = "adapted.safetensors", "lora.json"
"""Weights of a model with adapters, and arguments of peft's `LoraConfig`."""


class Refused(ValueError):
    """The model has no truth."""


def gradients(
    folder: str, samples: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Gradients in `dtype` by parameter name, and `loss` in fp64, of the model in `folder`."""
    return gradients_of(_model(folder, dtype), samples)


def gradients_of(model: Any, samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `gradients`, of a loaded model in its own dtype."""
    dtype = model.dtype
    model.train()
    drawn = refusal(model, samples["input_ids"][:1, :PROBED])
    if drawn:
        raise Refused(drawn)
    count = max(int((samples["labels"][:, 1:] != -100).sum()), 1)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, positions in zip(
        samples["input_ids"], samples["labels"], samples["position_ids"], strict=True
    ):
        # Without an attention mask, transformers separates packed documents by their positions.
        output = model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False
        )
        logits = output.logits
        # Some models round their logits to fp32, for a soft-cap: their truth is then as exact as fp32.
        if logits.dtype not in (dtype, torch.float32):
            raise Refused(
                f"{type(model).__name__} computes logits in {logits.dtype}, although its weights are {dtype}: "
                "there is no truth to compare with"
            )
        # Transformers computes a loss in fp32 or wider.
        wide = logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(
            wide, labels[1:], ignore_index=-100, reduction="sum"
        )
        loss = losses / count
        router_loss = getattr(output, "aux_loss", None)
        if router_loss is not None:  # the mean over samples, by label
            share = (labels[1:] != -100).sum() / count
            loss = loss + model.router_aux_loss_coef * router_loss * share
        loss.backward()
        total += loss.detach()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {**found, "loss": total}


class _Lowest(TorchDispatchMode):
    """Sets random draws to their lowest value, so that dropout drops everything and noise is at its limit."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]  # without its overload
        if name == "aten::uniform_":
            return out.fill_(args[1] if len(args) > 1 else 0.0)
        return out.zero_() if name in ("aten::rand", "aten::bernoulli_") else out


def refusal(model: Any, ids: torch.Tensor) -> str | None:
    """Why `model` has no truth: random draws change its logits in training. None if none does.

    `ids` are int64 [1, S]. A draw that changes nothing is allowed: some models draw whether to skip a layer even
    if the probability is 0. The states of the random generators are restored.
    """
    found: list[str] = []
    before: dict[Any, Any] = {}

    def enter(module: Any, *_: Any) -> None:
        before[module] = len(found), _states()

    def leave(module: Any, *_: Any) -> None:
        count, states = before.pop(module)
        if count == len(found) and not _same(states, _states()):  # no inner module was added
            found.append(f"'{names[module]}' ({type(module).__name__})")

    names = {module: name for name, module in model.named_modules()}
    hooks = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    states = _states()
    try:
        with torch.no_grad():
            first = model(input_ids=ids, use_cache=False).logits
            if _same(states, _states()):
                return None
            for hook in hooks:
                hook.remove()
            with _Lowest():
                second = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if torch.equal(first, second):
        return None
    return (
        f"model_type '{model.config.model_type}' draws random numbers in training, in {found[0]}"
        f"{f' and {len(found) - 1} other modules' if len(found) > 1 else ''}: no two steps are the same, so "
        f"there is no truth to compare with; {_way_out(model.config)}"
    )


def _states() -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _same(a: tuple[torch.Tensor, Any], b: tuple[torch.Tensor, Any]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1]


def _way_out(config: Any) -> str:
    """What to change: the config fields that, by their names, ask for random numbers."""
    asking = [
        f"{key} ({value})"
        for key, value in sorted(config.to_dict().items())
        if any(word in key for word in ("drop", "jitter"))
        and isinstance(value, float)
        and value > 0
    ]
    fields = ", ".join(asking) or "what asks for them"
    return f"set {fields} to 0 in its config.json"


def _model(folder: str, dtype: torch.dtype) -> Any:
    """The model in `folder`, with adapters if the folder has weights of adapters."""
    # Grouped matrix products of experts do not support fp64.
    kinds = {"experts_implementation": "eager"}
    adapted = Path(folder, ADAPTED)
    if not adapted.exists():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **kinds
        )
    import peft

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kinds)
    arguments = json.loads(Path(folder, LORA).read_text())
    peft.inject_adapter_in_model(peft.LoraConfig(**arguments), model)
    model.load_state_dict(load_file(adapted), strict=False)
    return model.to(dtype)


def main(folder: str, samples: str, output: str, dtype: str) -> None:
    """Compute the gradients and write `output` atomically."""
    found = gradients(folder, load_file(samples), getattr(torch, dtype))
    partial = f"{output}.{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
    os.replace(partial, output)


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 4):
        try:
            main(*sys.argv[first : first + 4])
        except Refused as error:
            print(error, file=sys.stderr)
            sys.exit(REFUSED)
