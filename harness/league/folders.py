"""Model folders that a script's `from_pretrained` reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alst_impl.models import published

BYTES = 2
"""Of one weight in bf16."""
ALIGNMENT = 8
"""The header of a safetensors file is padded to multiples of this many bytes."""


def hollow_model(folder: Path, model: str) -> None:
    """Write `config.json` of the published `model`, and bf16 weights that are all zero.

    The weights are a sparse file: it takes no room on a disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = published(model)
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    path.write_text(
        json.dumps({**fields, "architectures": [type(whole).__name__], "dtype": "bfloat16"})
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in whole.named_parameters():  # tied weights once
        begin, end = end, end + BYTES * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
