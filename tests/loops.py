"""What the scripts of `experiments/loops` need in tests: a model, its tokenizer, text, and arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SCRIPTS = Path(__file__).parents[1] / "experiments" / "loops"
SEQLEN, VOCABULARY = 41, 120
LENGTHS = (400, 90, 30, 200, 60, 120, 45, 300)
"""Characters of the documents. Most are shorter than a sample, so counts of labels differ."""


def make_folder(folder: Path) -> tuple[Path, Path]:
    """A folder with a tiny model and its tokenizer, and one with documents of Python's own library."""
    text = Path(os.__file__).read_text()
    places = [3000 + 500 * i for i in range(len(LENGTHS))]
    data, model = folder / "data", folder / "model"
    data.mkdir()
    for i, (start, length) in enumerate(zip(places, LENGTHS, strict=True)):
        (data / f"{i}.txt").write_text(text[start : start + length])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(model)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=0,
        pad_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(model)
    return model, data


def arguments(folders: tuple[Path, Path], output: Path, **settings: Any) -> list[str]:
    """Arguments of a script."""
    model, data = folders
    values = {"model": model, "data": data, "output": output, "seqlen": SEQLEN, **settings}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]
