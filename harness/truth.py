"""The truth: gradients of a stock transformers model, run whole, in one process, in fp64.

    python truth.py (MODEL_FOLDER SAMPLES.safetensors GRADIENTS.safetensors DTYPE)...

DTYPE is `float64` for the truth; in another one the same program tells what that dtype alone loses.
Stands alone on purpose: whatever it shared with the code it judges could be wrong in both. The
folder was written by `save_pretrained`; with adapters it holds `config.json`, `lora.json` (arguments of
peft's `LoraConfig`) and `adapted.safetensors` (all weights by name). Samples hold `input_ids`, `labels` (not shifted, -100 is
ignored) and `position_ids`, int64 [N, S], of every micro-batch of one optimizer step on all ranks.
Writes the gradient of each parameter, tied ones once, and `loss`: the sum of all token losses over
the number of labels.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ADAPTED, LORA = "adapted.safetensors", "lora.json"
"""Weights of a model with adapters, and arguments of peft's `LoraConfig`."""


def gradients(
    folder: str, samples: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Gradients in `dtype` by parameter name, and `loss` in fp64."""
    return gradients_of(_model(folder, dtype), samples)


def gradients_of(model: Any, samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of a model that is there, in its own dtype."""
    dtype = model.dtype
    model.train()
    count = max(int((samples["labels"][:, 1:] != -100).sum()), 1)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, positions in zip(
        samples["input_ids"], samples["labels"], samples["position_ids"], strict=True
    ):
        # Without an attention mask, transformers finds packed documents by their positions.
        logits = model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False
        ).logits
        assert logits.dtype == dtype
        # Transformers forms a loss in fp32 at least.
        wide = logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(
            wide, labels[1:], ignore_index=-100, reduction="sum"
        )
        loss = losses / count
        loss.backward()
        total += loss.detach()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {**found, "loss": total}


def _model(folder: str, dtype: torch.dtype) -> Any:
    """The model in `folder`; with adapters where a configuration of peft lies beside its weights."""
    # Grouped matrix products of experts know no fp64.
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
    """Compute, and write `output` in one piece."""
    found = gradients(folder, load_file(samples), getattr(torch, dtype))
    partial = f"{output}.{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
    os.replace(partial, output)


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 4):
        main(*sys.argv[first : first + 4])
