"""The interface of a source. Imports no torch, because sweeps check sources while they expand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.plugin import load

if TYPE_CHECKING:
    from alst_impl.data import Corpus

Tokens = NDArray[np.int64]
Row = tuple[Tokens, tuple[int, ...]]
"""Tokens of one sequence, and the lengths of its documents."""
Reader = Callable[[int], list[Row]]
"""The sequences of a sample, by its id."""


class Source(Frozen):
    """A way to cut samples from a corpus; its options are its fields.

    A sample has `seqlen` tokens, in one sequence or in several shorter ones of equal length.
    """

    tokens_beyond: ClassVar[int] = 0
    """Tokens of a row after its sequence. With 1, the last position of a sequence has a label, too."""
    packs: ClassVar[bool] = False
    """Whether a sample holds several documents, of lengths that only the text tells."""

    def check(self, config: TrainConfig) -> None:
        """Raise `ValueError` for settings that cannot work. The message gives the values, the rule and the fix."""

    def seqlens(self, seqlen: int) -> list[int]:
        """The lengths that sequences of a sample of `seqlen` tokens may have, ascending."""
        return [seqlen]

    def lengths(self, corpus: Corpus, index: int) -> tuple[int, ...]:
        """Lengths of the documents of sample `index`, in order."""
        return corpus.config.lengths(corpus.seqlen, corpus.seed, index)

    @abstractmethod
    def reader(self, corpus: Corpus) -> Reader:
        """What reads the samples of `corpus`: what a source defines."""


def load_source(spec: Spec) -> Source:
    """The source that `spec` names."""
    return load("alst_impl.sources", Source, spec)
