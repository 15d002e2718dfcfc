"""Samples as a pure function of (seed, global sample id).

Legend: B batch, S sequence, P sequence-parallel degree.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alst_impl.config import DataConfig
from alst_impl.layout import IGNORE_INDEX, Layout
from alst_impl.sources.base import Reader, Source, Tokens, load_source

Sequence = tuple[Tensor, Tensor, Tensor, tuple[int, ...]]
"""input_ids, labels *unshifted* and position_ids, int64 [S] each, and document lengths. One token more than `Batch` has
if the last position has a label."""


@dataclass(frozen=True)
class Batch:
    """Tokens of one micro-batch, whole or one rank's shard; all int64 [B, S] or [B, S/P]."""

    input_ids: Tensor
    shift_labels: Tensor
    """Label of each position, already shifted, so no rank needs its neighbour's first token."""
    position_ids: Tensor
    layout: Layout
    """Which of the samples' tokens these are."""

    def model_inputs(self) -> dict[str, object]:
        """Keyword arguments for a Hugging Face causal model's `forward`, including labels for a loss."""
        inputs: dict[str, object] = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "labels": self.shift_labels,  # asks for a loss; `shift_labels` is what it reads
            "shift_labels": self.shift_labels,
        }
        if not self.layout.trivial:
            inputs["layout"] = self.layout
        return inputs

    def num_valid(self) -> Tensor:
        """Number of labels that are not ignored, int64 scalar."""
        return (self.shift_labels != IGNORE_INDEX).sum()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            shift_labels=self.shift_labels.to(device),
            position_ids=self.position_ids.to(device),
        )


def _all(valid: np.ndarray) -> None:
    """Mask nothing."""


def _suffix(valid: np.ndarray) -> None:
    """Mask the first 60 %, like a prompt longer than one shard."""
    valid[: int(len(valid) * 0.6)] = False


def _first_half(valid: np.ndarray) -> None:
    """Mask the second half: the last rank has no label at any degree from 2 on."""
    valid[len(valid) // 2 :] = False


def _border(valid: np.ndarray) -> None:
    """Keep only labels around the middle: the border of two shards at every even degree."""
    middle = len(valid) // 2
    valid[: max(middle - 2, 0)] = False
    valid[middle + 2 :] = False


def _imbalance(valid: np.ndarray) -> None:
    """Keep one label in a hundred in the first half, and all in the second."""
    half = len(valid) // 2
    valid[:half] &= np.arange(half) % 100 == min(50, half // 2)


def _none(valid: np.ndarray) -> None:
    """Mask every label."""
    valid[:] = False


LABEL_MASKS: dict[str, Callable[[np.ndarray], None]] = {
    "none": _all,
    "prefix": _suffix,
    "rank": _first_half,
    "border": _border,
    "imbalance": _imbalance,
    "all": _none,
}
"""Label masks by name. Each clears entries of a bool array over positions of the shifted labels, in place."""

UNEVEN_FRACTIONS = (1.0, 0.1, 0.5)
"""Fraction of its labels that sample i keeps in an accumulated step, by i modulo 3."""


# Some distributions ship without the tests, and installed packages differ between machines.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def _sources(root: Path) -> list[Path]:
    """Python sources below `root`. Skipped folders are not even listed, because they may be huge."""
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


@dataclass(frozen=True)
class Corpus:
    """A deterministic source of samples: sample `i` depends on (`seed`, `i`) and on the fields here alone."""

    config: DataConfig
    seqlen: int
    """Tokens of a sample, in one sequence or in several shorter ones (`alst_impl.sources`)."""
    seed: int
    vocab_size: int
    uneven: bool = False
    """Give samples unequal numbers of labels, for accumulated steps."""
    step_samples: int = 1
    """Samples of an optimizer step over all ranks and micro-batches. A source may give them sequences of one length."""

    @cached_property
    def files(self) -> list[Path]:
        """The corpus as a sorted list of files."""
        if self.config.corpus == "python-stdlib":
            found = _sources(Path(sysconfig.get_paths()["stdlib"]))
        else:
            root = Path(self.config.corpus)
            if not root.exists():
                raise ValueError(
                    f"corpus '{root}' does not exist; use 'python-stdlib' or a text file or folder"
                )
            found = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
        found = sorted(p for p in found if p.stat().st_size > 0)
        if not found:
            raise ValueError(
                f"corpus '{self.config.corpus}' holds no text; name a file or folder with some"
            )
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        """None for bytes."""
        if self.config.tokenizer == "bytes":
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.config.tokenizer, local_files_only=True)

    def encode(self, text: bytes) -> Tokens:
        """Tokens of `text`: int64 [N]."""
        if self._tokenizer is None:
            return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        ids = self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)
        return np.array(ids, dtype=np.int64)

    @property
    def end_of_text(self) -> int:
        """The token after a document: the tokenizer's own, or a zero byte, which is in no text."""
        if self._tokenizer is None:
            return 0
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer '{self.config.tokenizer}' has no end-of-text token (eos_token), which ends each document; "
                "use one that has"
            )
        return int(self._tokenizer.eos_token_id)

    @cached_property
    def _source(self) -> Source:
        return load_source(self.config.source)

    @property
    def packed(self) -> bool:
        """Whether samples hold several documents."""
        return self.config.packed or self._source.packs

    @cached_property
    def _read(self) -> Reader:
        return self._source.reader(self)

    def rows(self, index: int) -> list[Sequence]:
        """The sequences of sample `index`."""
        return [self._row(index, *row) for row in self._read(index)]

    def lengths(self, index: int) -> tuple[int, ...]:
        """Lengths of the documents of sample `index`, in order. Reads no text if the source knows them without."""
        return self._source.lengths(self, index)

    def _row(self, index: int, tokens: Tokens, lengths: tuple[int, ...]) -> Sequence:
        if tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"token {tokens.max()} of tokenizer '{self.config.tokenizer}' is outside the model's "
                f"vocabulary of {self.vocab_size}; use the model's own tokenizer"
            )
        positions = np.concatenate([np.arange(n) for n in lengths])
        valid = np.ones(len(tokens), dtype=bool)  # over positions of the shifted labels
        seqlen = len(tokens) - self._source.tokens_beyond
        LABEL_MASKS[self.config.mask](valid[:seqlen])
        if self.uneven:
            kept = max(int(seqlen * UNEVEN_FRACTIONS[index % 3]), 2)
            valid[: seqlen - kept] = False
        labels = np.where(np.roll(valid, 1), tokens, IGNORE_INDEX)
        labels[positions == 0] = IGNORE_INDEX  # a document's first token has nothing to predict it
        return (
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            lengths,
        )

    def batch(self, indices: Iterable[int]) -> Batch:
        """The whole, unsharded batch of samples `indices`, on the CPU."""
        rows = [row for index in indices for row in self.rows(index)]
        ids, labels, positions, lengths = zip(*rows, strict=True)
        seqlen = len(ids[0]) - self._source.tokens_beyond
        shifted = torch.nn.functional.pad(torch.stack(labels), (0, 1), value=IGNORE_INDEX)[:, 1:]
        return Batch(
            input_ids=torch.stack(ids)[:, :seqlen].contiguous(),
            shift_labels=shifted[:, :seqlen].contiguous(),
            position_ids=torch.stack(positions)[:, :seqlen].contiguous(),
            layout=Layout(seqlen, documents=lengths if self.packed else None),
        )
