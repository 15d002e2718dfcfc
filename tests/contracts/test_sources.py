"""Every source gives real text, the same to whoever reads it. New files are tested automatically."""

from __future__ import annotations

import pytest
import torch

from alst_impl.config import DataConfig
from alst_impl.data import Corpus
from alst_impl.layout import IGNORE_INDEX
from alst_impl.plugin import names
from alst_impl.sources.base import load_source

SEQLEN, SAMPLES = 1024, 2


def opened(name: str, seed: int = 0) -> Corpus:
    """Python's own sources, as bytes, with two samples in a step."""
    config = DataConfig.model_validate({"source": name})
    return Corpus(config, SEQLEN, seed, 256, step_samples=SAMPLES)


@pytest.mark.parametrize("name", names("alst_impl.sources"))
def test_a_source_gives_samples_of_equally_many_tokens_of_text(name: str) -> None:
    """In sequences of a length that it names; a label is the next token; another reader gets the same, another seed not."""
    corpus, again, other = opened(name), opened(name), opened(name, seed=1)
    seqlens = load_source(corpus.config.source).seqlens(SEQLEN)
    assert seqlens[-1] == SEQLEN
    for number in range(4):
        step = range(number * SAMPLES, (number + 1) * SAMPLES)
        batch = corpus.batch(step)
        assert batch.input_ids.numel() == SAMPLES * SEQLEN
        assert batch.layout.length == batch.input_ids.shape[1]
        assert batch.layout.length in seqlens
        assert (
            bytes(batch.input_ids.flatten().tolist()).isascii()
            or batch.input_ids.unique().numel() > 20
        )
        valid = batch.shift_labels[:, :-1] != IGNORE_INDEX
        assert torch.equal(valid, batch.position_ids[:, 1:] != 0)  # none predicts another document
        labels, following = batch.shift_labels[:, :-1], batch.input_ids[:, 1:]
        assert torch.equal(labels[valid], following[valid])
        assert torch.equal(batch.input_ids, again.batch(step).input_ids)
        assert not torch.equal(batch.input_ids.flatten(), other.batch(step).input_ids.flatten())
