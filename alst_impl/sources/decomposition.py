"""Dataset Decomposition: each document is cut into sequences of powers of two, and a step takes one length (arXiv:2405.13226).

No sequence holds tokens of two documents, so plain causal attention is exact without a mask. A sample of `seqlen` tokens
is one sequence of that length or several shorter ones, so all steps have equally many tokens.

Rules and constants are those of the authors' code, apple/ml-dataset-decomposition@9a23939.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from alst_impl.config import Tokens as Length
from alst_impl.config import TrainConfig
from alst_impl.sources.base import Reader, Row, Source, Tokens

if TYPE_CHECKING:
    from alst_impl.data import Corpus

Curriculum = Literal["uniform", "grow_linear", "grow_p2"]
CURRICULA: dict[Curriculum, Callable[[int], list[int]]] = {
    "uniform": lambda buckets: [1] * buckets,
    "grow_linear": lambda buckets: [*range(buckets, 0, -1)],
    "grow_p2": lambda buckets: [2**longer for longer in range(buckets)[::-1]],
}
"""Odds of a batch of each bucket, from the shortest, for a number of buckets. The authors' example is `grow_p2`."""


class Decomposition(Source):
    """Buckets of sequences of `shortest`, twice `shortest`, ... up to the run's `seqlen` tokens."""

    tokens_beyond: ClassVar[int] = 1

    shortest: Length = 256
    """Length of the shortest sequences, a power of two. A shorter rest of a document is dropped."""
    curriculum: Curriculum = "grow_p2"
    """How much likelier a batch of one bucket is than one of another."""
    cycles: int = Field(default=8, ge=1)
    """How often the curriculum runs, each time on other sequences, while the corpus is read once."""

    def check(self, config: TrainConfig) -> None:
        for name, length in (("seqlen", config.seqlen), ("shortest", self.shortest)):
            if length & (length - 1):
                below = 1 << (length.bit_length() - 1)
                raise ValueError(
                    f"{name} ({length}) must be a power of two for source 'decomposition', or no bucket divides the "
                    f"tokens of a step; use {below} or {2 * below}"
                )
        if self.shortest > config.seqlen:
            raise ValueError(
                f"shortest ({self.shortest}) is a bucket beyond the longest, which has seqlen ({config.seqlen}) tokens; "
                f"use shortest up to {config.seqlen}"
            )
        if config.data.packed:
            raise ValueError(
                f"documents is {config.data.documents}, but source 'decomposition' takes each sequence from one document "
                "and packs none; leave documents out"
            )

    def seqlens(self, seqlen: int) -> list[int]:
        buckets = (seqlen // self.shortest).bit_length()
        return [self.shortest << bucket for bucket in range(buckets)]

    def reader(self, corpus: Corpus) -> Reader:
        return decomposed(self, corpus).rows


@dataclass(frozen=True)
class Decomposed:
    """A corpus in buckets, in ascending order of their sequences' length, and the steps that these make."""

    text: Tokens
    """All documents, one after another."""
    lengths: list[int]
    """Tokens of a sequence of each bucket."""
    starts: list[NDArray[np.int64]]
    """Where the sequences of each bucket begin in `text`."""
    steps: tuple[int, ...]
    """Steps of each bucket in a cycle."""
    curriculum: Curriculum
    samples: int
    """Of a step, over all ranks and micro-batches."""
    seed: int

    def at(self, step: int) -> tuple[int, int]:
        """The bucket of `step`, and how many steps have taken that bucket before."""
        cycle, place = divmod(step, sum(self.steps))
        order = drawn(self.steps, self.curriculum, self.seed, cycle)
        bucket = int(order[place])
        return bucket, cycle * self.steps[bucket] + int((order[:place] == bucket).sum())

    def rows(self, index: int) -> list[Row]:
        """The sequences of sample `index`. A bucket that is used up begins again, in another order."""
        step, sample = divmod(index, self.samples)
        bucket, before = self.at(step)
        length, starts = self.lengths[bucket], self.starts[bucket]
        count = self.lengths[-1] // length
        first = (before * self.samples + sample) * count
        rows = list[Row]()
        for number in range(first, first + count):
            again, place = divmod(number, len(starts))
            start = starts[shuffled(len(starts), self.seed, bucket, again)[place]]
            rows.append((self.text[start : start + length + 1], (length + 1,)))
        return rows


def decomposed(source: Decomposition, corpus: Corpus) -> Decomposed:
    """`corpus` in the buckets of `source`. Reads all of it.

    Raises `ValueError` for a bucket without a sequence and for a cycle without a step.
    """
    end = np.array([corpus.end_of_text])
    documents = [np.append(corpus.encode(file.read_bytes()), end) for file in corpus.files]
    lengths = source.seqlens(corpus.seqlen)
    begins = [0, *accumulate(map(len, documents))]
    starts: dict[int, list[int]] = {length: [] for length in lengths}
    for number, document in enumerate(documents):
        rng, place = np.random.default_rng([corpus.seed, 0, number]), begins[number]
        for length in cut(len(document), lengths, rng):
            starts[length].append(place)
            place += length + 1
    for length in reversed(lengths):
        if not starts[length]:
            raise ValueError(
                f"no document of corpus '{corpus.config.corpus}' gives a sequence of {length} tokens, and the longest has "
                f"{max(map(len, documents))}; use a smaller seqlen or shortest, or text with such documents"
            )
    tokens = [length * len(starts[length]) for length in lengths]
    per_step = corpus.step_samples * corpus.seqlen
    if sum(tokens) < source.cycles * per_step:
        raise ValueError(
            f"corpus '{corpus.config.corpus}' gives {sum(tokens)} tokens for {source.cycles} cycles, but a step takes "
            f"{per_step}, and a cycle needs one; use fewer cycles, fewer tokens per step, or more text"
        )
    return Decomposed(
        text=np.concatenate(documents),
        lengths=lengths,
        starts=[np.array(starts[length]) for length in lengths],
        steps=tuple(shares(tokens, sum(tokens) / source.cycles, per_step)),
        curriculum=source.curriculum,
        samples=corpus.step_samples,
        seed=corpus.seed,
    )


def cut(document: int, lengths: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Lengths of the sequences of a document of so many tokens, in order. Each takes one token more, for its last label.

    A sequence has the largest power of two that the rest holds. Where that is above the longest of `lengths`, `rng`
    draws one of them, so that each bucket gets as many tokens of it. A rest that holds none is dropped.
    """
    odds = 1 / np.array(lengths)
    drawn = iter(rng.choice(lengths, size=document // lengths[0], p=odds / odds.sum()))
    found = list[int]()
    while document > lengths[0]:
        length = 1 << ((document - 1).bit_length() - 1)
        if length > lengths[-1]:
            length = int(next(drawn))
        found.append(length)
        document -= length + 1
    return found


def shares(tokens: Sequence[int], wanted: float, unit: int) -> list[int]:
    """Units of each bucket in a cycle of `wanted` tokens, in proportion to the `tokens` that each bucket has.

    Each share is rounded, but for the longest bucket's, which is the rest of the whole rounded up.
    """
    *rounded, _ = (round(wanted / unit * each / sum(tokens)) for each in tokens)
    return [*rounded, max(ceil(wanted / unit) - sum(rounded), 0)]


def weights(steps: Sequence[int], curriculum: Curriculum) -> list[int]:
    """Weight of each bucket in the draw of a step: its steps times the odds of the curriculum."""
    odds = CURRICULA[curriculum](len(steps))
    return [count * each for count, each in zip(steps, odds, strict=True)]


@lru_cache(maxsize=8)
def drawn(
    steps: tuple[int, ...], curriculum: Curriculum, seed: int, cycle: int
) -> NDArray[np.int64]:
    """The bucket of each step of a cycle, the same on all ranks.

    A bucket's weight does not change before the bucket is used up, and then it leaves the draw.
    """
    rng, left = np.random.default_rng([seed, 1, cycle]), np.array(steps)
    fixed, order = np.array(weights(steps, curriculum), dtype=np.float64), list[int]()
    for _ in range(sum(steps)):
        weight = fixed * (left > 0)
        order.append(int(rng.choice(len(steps), p=weight / weight.sum())))
        left[order[-1]] -= 1
    return np.array(order)


@lru_cache(maxsize=64)
def shuffled(size: int, seed: int, bucket: int, again: int) -> NDArray[np.int64]:
    """The order of the sequences of a bucket, `again` passes after the first."""
    return np.random.default_rng([seed, 2, bucket, again]).permutation(size)
