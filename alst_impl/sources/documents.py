"""Whole documents, whose lengths are those of the text: as many random files as fill a sample, and the last is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from alst_impl.config import TrainConfig
from alst_impl.sources.base import Reader, Row, Source

if TYPE_CHECKING:
    from alst_impl.data import Corpus


class Documents(Source):
    """Sample `i` depends on the run's seed and `i` alone."""

    packs: ClassVar[bool] = True

    def check(self, config: TrainConfig) -> None:
        if config.data.documents != 1:
            raise ValueError(
                f"documents is {config.data.documents}, but source 'documents' packs as many as fill a sample; leave "
                "documents out"
            )

    def lengths(self, corpus: Corpus, index: int) -> tuple[int, ...]:
        ((_, lengths),) = self.reader(corpus)(index)
        return lengths

    def reader(self, corpus: Corpus) -> Reader:
        def read(index: int) -> list[Row]:
            rng = np.random.default_rng([corpus.seed, index])
            found, left = [], corpus.seqlen
            while left:
                file = corpus.files[int(rng.integers(len(corpus.files)))]
                found.append(corpus.encode(file.read_bytes())[:left])
                left -= len(found[-1])
            return [(np.concatenate(found), tuple(len(each) for each in found if len(each)))]

        return read
