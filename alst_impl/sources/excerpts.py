"""Excerpts of random files, each from a random place on: one to a sample, or several packed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alst_impl.sources.base import Reader, Row, Source, Tokens

if TYPE_CHECKING:
    from alst_impl.data import Corpus


class Excerpts(Source):
    """Sample `i` depends on the run's seed and `i` alone. `DataConfig.documents` says how many documents it packs."""

    def reader(self, corpus: Corpus) -> Reader:
        def read(index: int) -> list[Row]:
            rng = np.random.default_rng([corpus.seed, index])
            lengths = corpus.config.drawn_lengths(corpus.seqlen, rng)
            return [(np.concatenate([_excerpt(corpus, n, rng) for n in lengths]), lengths)]

        return read


def _excerpt(corpus: Corpus, length: int, rng: np.random.Generator) -> Tokens:
    """`length` tokens from consecutive files, starting at a random place in a random file."""
    index = int(rng.integers(len(corpus.files)))
    text = corpus.files[index].read_bytes()
    tokens = corpus.encode(text[int(rng.integers(max(len(text) // 2, 1))) :])
    while len(tokens) < length:
        index = (index + 1) % len(corpus.files)
        tokens = np.concatenate([tokens, corpus.encode(corpus.files[index].read_bytes())])
    return tokens[:length]
