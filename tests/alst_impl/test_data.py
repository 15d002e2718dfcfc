"""Samples depend on (seed, id) only, and sharding loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from training import config_of

from alst_impl import step
from alst_impl.config import DataConfig
from alst_impl.data import LABEL_MASKS, Batch, Corpus
from alst_impl.layout import IGNORE_INDEX, Layout
from alst_impl.methods.base import load_method

if TYPE_CHECKING:
    from conftest import Ranks


def corpus(seqlen: int = 64, seed: int = 0, *, vocab_size: int = 256, **data: object) -> Corpus:
    """The default corpus, with optional changes."""
    return Corpus(DataConfig(**data), seqlen, seed, vocab_size)


def equal(a: Batch, b: Batch) -> bool:
    """The same tokens, labels and positions."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "shift_labels", "position_ids")
    )


def test_a_sample_is_a_function_of_seed_and_id() -> None:
    """Order, batch and corpus object do not matter."""
    first = corpus()
    assert equal(first.batch([3]), corpus().batch([3]))
    pair = first.batch([7, 3])
    assert torch.equal(pair.input_ids[1], corpus().batch([3]).input_ids[0])
    assert not torch.equal(pair.input_ids[0], pair.input_ids[1])
    assert not equal(first.batch([3]), corpus(seed=1).batch([3]))


def test_samples_are_real_text() -> None:
    """The default corpus has the bytes of Python sources."""
    ids, labels, positions, lengths = corpus(512).rows(0)[0]
    assert bytes(ids.tolist()).isascii() or len(set(ids.tolist())) > 20
    assert torch.equal(labels[1:], ids[1:])
    assert positions.tolist() == list(range(512))
    assert lengths == (512,)


def test_labels_are_shifted_once() -> None:
    """Position i predicts token i + 1, and the last position predicts nothing."""
    batch = corpus(16).batch([0, 1])
    assert torch.equal(batch.shift_labels[:, :-1], batch.input_ids[:, 1:])
    assert (batch.shift_labels[:, -1] == IGNORE_INDEX).all()


@pytest.mark.parametrize("sp", [1, 2, 3, 4])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("mask", sorted(LABEL_MASKS))
def test_shards_hold_every_token_and_label_exactly_once(mask: str, extra: int, sp: int) -> None:
    """At lengths around a multiple of sp, padding has no label and continues the positions."""
    length = 12 * sp + extra
    whole = corpus(length, mask=mask).batch([0, 1])
    shards = [Layout(whole.layout.length, sp=sp).cut(whole, index) for index in range(sp)]
    assert {tuple(s.input_ids.shape) for s in shards} == {(2, -(-length // sp))}
    for name in ("input_ids", "shift_labels", "position_ids"):
        joined = torch.cat([getattr(s, name) for s in shards], dim=1)
        assert torch.equal(joined[:, :length], getattr(whole, name)), name
    assert sum(int(s.num_valid()) for s in shards) == int(whole.num_valid())
    positions = torch.cat([s.position_ids for s in shards], dim=1)
    assert (positions.diff(dim=1) == 1).all()


@pytest.mark.parametrize("sp", [2, 4])
def test_the_only_label_on_a_shard_border_survives(sp: int) -> None:
    """The last position of a shard predicts the first token of the next."""
    length = 8 * sp
    for border in range(8, length, 8):
        whole = corpus(length).batch([0])
        labels = torch.full_like(whole.shift_labels, IGNORE_INDEX)
        labels[0, border - 1] = whole.input_ids[0, border]
        only = replace(whole, shift_labels=labels)
        shards = [Layout(only.layout.length, sp=sp).cut(only, index) for index in range(sp)]
        assert [int(s.num_valid()) for s in shards] == [
            int(index == border // 8 - 1) for index in range(sp)
        ]
        assert shards[border // 8 - 1].shift_labels[0, -1] == whole.input_ids[0, border]


@pytest.mark.parametrize("sp", [2, 4])
def test_labels_at_the_border_are_those_of_the_next_shards_first_token(sp: int) -> None:
    """From corpus to shard: shifting labels after sharding would lose this label."""
    source = corpus(8 * sp)
    ids = source.rows(0)[0][0]
    whole = source.batch([0])
    for index in range(sp - 1):
        shard = Layout(whole.layout.length, sp=sp).cut(whole, index)
        assert int(shard.shift_labels[0, -1]) == int(ids[8 * (index + 1)])


@pytest.mark.parametrize(
    ("mask", "valid"),
    [
        ("none", list(range(19))),
        ("prefix", list(range(12, 19))),
        ("rank", list(range(10))),
        ("border", [8, 9, 10, 11]),
        ("imbalance", [5, *range(10, 19)]),
        ("all", []),
    ],
)
def test_each_mask_ignores_the_right_labels(mask: str, valid: list[int]) -> None:
    """The valid positions of the shifted labels at length 20 are as listed."""
    labels = corpus(20, mask=mask).batch([0]).shift_labels[0]
    assert (labels != IGNORE_INDEX).nonzero().flatten().tolist() == valid


def test_the_imbalance_is_one_to_a_hundred() -> None:
    """In the first half one label in a hundred is valid, in the second half every label."""
    valid = corpus(2000, mask="imbalance").batch([0]).shift_labels[0] != IGNORE_INDEX
    assert int(valid[:1000].sum()) == 10
    assert int(valid[1000:].sum()) == 999


def test_accumulated_samples_hold_unequal_numbers_of_labels() -> None:
    """Otherwise a mean of means would equal the mean."""
    source = Corpus(DataConfig(), 100, 0, 256, uneven=True)
    assert [int(source.batch([i]).num_valid()) for i in range(4)] == [99, 9, 49, 99]


def test_packed_documents_restart_their_positions() -> None:
    """The last token of a document does not predict the first token of the next."""
    source = corpus(40, documents=3)
    batch = source.batch([0, 1])
    assert batch.layout.documents is not None
    for row, lengths in enumerate(batch.layout.documents):
        assert len(lengths) == 3
        assert sum(lengths) == 40
        expected = [p for n in lengths for p in range(n)]
        assert batch.position_ids[row].tolist() == expected
        starts = [i for i, p in enumerate(expected) if p == 0]
        for start in starts[1:]:
            assert int(batch.shift_labels[row, start - 1]) == IGNORE_INDEX
        assert int((batch.shift_labels[row] != IGNORE_INDEX).sum()) == 40 - 3


def test_padding_of_a_packed_sample_is_a_document_of_its_own() -> None:
    """No real token is in the document of the padding."""
    whole = corpus(10, documents=2).batch([0])
    shard = Layout(10, sp=4).cut(whole, 3)
    assert whole.layout.documents is not None
    assert shard.layout.documents == ((*whole.layout.documents[0], 2),)
    assert shard.position_ids[0, -2:].tolist() == [0, 1]


def test_one_document_needs_no_list() -> None:
    """An unpacked batch has no list of documents, so it takes the fused causal kernel."""
    assert corpus(8).batch([0]).layout.documents is None


def test_files_and_folders_are_corpora(tmp_path: Path) -> None:
    """A short text repeats until the sample is full."""
    (tmp_path / "deep").mkdir()
    text = tmp_path / "deep" / "a.txt"
    text.write_bytes(b"abc")
    (tmp_path / "empty.txt").write_bytes(b"")
    for source in (text, tmp_path):
        ids = corpus(10, corpus=str(source)).rows(0)[0][0]
        assert bytes(ids.tolist()) in b"abcabcabcabcabc"


def test_a_missing_or_empty_corpus_is_refused(tmp_path: Path) -> None:
    """The error names it and gives a fix."""
    with pytest.raises(ValueError, match=r"nowhere' does not exist; use 'python-stdlib' or"):
        corpus(corpus=str(tmp_path / "nowhere")).rows(0)[0]
    with pytest.raises(ValueError, match="holds no text"):
        corpus(corpus=str(tmp_path)).rows(0)[0]


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """It would index past the end of the embedding."""
    with pytest.raises(ValueError, match="outside the model's vocabulary of 100"):
        corpus(4000, vocab_size=100).rows(0)[0]


def first_batch(rank: int, world_size: int) -> tuple[int, int, Batch]:
    """Body of a rank: its dp rank, its sp rank, and its first micro-batch before and after sharding."""
    config = config_of(method={"name": "alst", "sp": 2}, world_size=world_size, batch_size=2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    source = Corpus(config.data, config.seqlen, config.seed, 256)
    method = load_method(config.method)
    (batch,) = step.micro_batches(config, source, method, mesh, 3, torch.device("cpu"))
    unbound = replace(batch, layout=replace(batch.layout, mesh=None))  # a mesh stays in its process
    return mesh["dp"].get_local_rank(), mesh["sp"].get_local_rank(), unbound


def test_dp_ranks_read_different_samples_and_sp_ranks_share_one(ranks: Ranks) -> None:
    """Step 3 of two dp ranks with two samples each reads samples 12 to 15."""
    source = corpus(67)
    for dp, sp, batch in ranks(4)(first_batch):
        first = 12 + 2 * dp
        assert equal(batch, Layout(67, sp=2).cut(source.batch([first, first + 1]), sp))
