"""What every script of the league trains: options, samples, and the gradients that are compared.

A script is started once per GPU, as `torchrun --nproc-per-node 8 trl/train.py --model FOLDER --seqlen 131072` does,
with this folder on the Python path. It trains in the way its stack documents, and takes from here only what has to be
the same for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Case:
    """One training run."""

    model: str
    """Folder of a transformers model: `config.json` and weights. Without `samples` all weights are zero, in a sparse
    file, so that a script may also make random ones from `config.json`."""
    seqlen: int
    """Tokens of one sample. Ranks of a sequence-parallel group share them."""
    steps: int
    """Optimizer steps. Adam's states exist from the first update on, hence two by default."""
    accumulation: int
    """Micro-batches of one sample per step."""
    states: str
    """Where optimizer states are: `device` or `host`."""
    packed: bool
    """Whether samples consist of several documents. Their `position_ids` start anew at each of them."""
    samples: Path | None
    """Samples of the only step under the gate: int64 [N, S] `input_ids`, `labels` (not shifted, -100 is ignored) and
    `position_ids`. None: blank ones."""
    gradients: Path | None
    """File for loss and gradients of the first step."""

    @property
    def gated(self) -> bool:
        """Whether gradients are compared: in fp32 on the CPU, over gloo."""
        return self.samples is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return torch.float32 if self.gated else torch.bfloat16

    @property
    def device(self) -> str:
        """Type of the device."""
        return "cpu" if self.gated else "cuda"

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @cached_property
    def rank(self) -> int:
        """This rank."""
        return int(os.environ.get("RANK", "0"))

    def rows(self, count: int) -> list[dict[str, Tensor]]:
        """`count` samples: int64 [S] `input_ids`, `labels` and `position_ids` each."""
        if self.samples is None:
            ids = torch.zeros(self.seqlen, dtype=torch.int64)
            blank = {
                "input_ids": ids,
                "labels": ids.clone(),
                "position_ids": torch.arange(self.seqlen),
            }
            return [blank] * count
        held = load_file(self.samples)
        found = len(held["input_ids"])
        if found != count:
            sys.exit(f"--samples {self.samples}: has {found} samples, a step takes {count}")
        return [{name: rows[i] for name, rows in held.items()} for i in range(count)]

    def save(self, loss: float, gradients: Mapping[str, Tensor]) -> None:
        """Write the step's loss and its whole gradients, by transformers' names, on rank 0. Does nothing without `gradients`."""
        if self.gradients is None or self.rank:
            return
        held = {name: each.detach().cpu().contiguous() for name, each in gradients.items()}
        save_file({**held, "loss": torch.tensor(loss, dtype=torch.float64)}, self.gradients)


def read_case(argv: list[str] | None = None) -> Case:
    """The run that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder with config.json and weights")
    parser.add_argument("--seqlen", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--states", choices=["device", "host"], default="device")
    parser.add_argument("--packed", action="store_true", help="samples hold several documents")
    parser.add_argument("--samples", type=Path, help="safetensors file; without it, blank samples")
    parser.add_argument("--gradients", type=Path, help="file for loss and gradients of a step")
    return Case(**vars(parser.parse_args(argv)))


def refuse(reason: str) -> None:
    """End with exit code 2 and one line: the stack cannot do what was asked."""
    print(reason, file=sys.stderr)
    sys.exit(2)
