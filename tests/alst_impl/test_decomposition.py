"""Sequences of a step have one length and one document each; the published counts and weights come out; gradients are exact."""

from __future__ import annotations

import email
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from training import (
    assert_same_gradients,
    assert_trains_as,
    config_of,
    corpus_of,
    run_steps,
    truth_of,
)

from alst_impl import step
from alst_impl.config import DataConfig, TrainConfig
from alst_impl.data import Corpus
from alst_impl.layout import IGNORE_INDEX
from alst_impl.sources.decomposition import (
    Decomposed,
    Decomposition,
    cut,
    decomposed,
    drawn,
    shares,
    weights,
)
from harness.records.published import rows

if TYPE_CHECKING:
    from conftest import Ranks

SHORTEST, LONGEST = 32, 256
SAMPLES = 4


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some of the sources of Python's library: real text in documents of many lengths."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for package in (json, email):
        for file in Path(str(package.__file__)).parent.glob("*.py"):
            shutil.copy(file, folder / f"{package.__name__}.{file.name}")
    return folder


def corpus(texts: Path | str = "python-stdlib", seed: int = 0, **options: Any) -> Corpus:
    """Sequences of 32 to 256 bytes, four samples in a step."""
    source = {"name": "decomposition", "shortest": SHORTEST, **options}
    config = DataConfig.model_validate({"corpus": str(texts), "source": source})
    return Corpus(config, LONGEST, seed, 256, step_samples=SAMPLES)


def opened(of: Corpus) -> Decomposed:
    return decomposed(Decomposition(**of.config.source.options), of)


def step_rows(of: Corpus, number: int) -> list[list[int]]:
    """Tokens of all sequences of a step."""
    samples = range(number * SAMPLES, (number + 1) * SAMPLES)
    return [row[0].tolist() for index in samples for row in of.rows(index)]


def test_the_published_batches_and_weights_come_out() -> None:
    """Those of the authors' example, from the shards of its data: a share is whole shards for each of eight GPUs."""
    published = [
        r for r in rows("dataset_decomposition_buckets") if r["dataset"].startswith("DCLM")
    ]
    facts = {r["item"]: r["value"] for r in rows("dataset_decomposition_facts")}
    unit, per_step = 8 * 2**20, 64 * 8192
    wanted = int(facts["example_tokens"]) / int(facts["cycles"])
    found = shares([int(r["tokens"]) for r in published], wanted, unit)
    steps = [share * unit // per_step for share in found]
    assert steps == [736, 1248, 1552, 1312, 1072, 960]
    assert weights(found, "grow_p2") == [1472, 1248, 776, 328, 134, 60]
    lengths = [int(r["sequence_length_tokens"]) for r in published]
    sequences = [n * per_step // length for n, length in zip(steps, lengths, strict=True)]
    assert sequences == [int(n) for n in facts["example_seq_per_epoch"].split()]
    assert weights(found, "grow_p2") == [int(n) for n in facts["example_mix_weights"].split()]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (64, []),
        (65, [64]),
        (128, [64]),
        (129, [128]),
        (1000, [512, 256, 128, 64]),
        (1024, [512, 256, 128, 64]),
    ],
)
def test_a_document_gives_the_largest_powers_of_two_and_drops_the_rest(
    document: int, expected: list[int]
) -> None:
    """A sequence takes one token more than its length, for its last label."""
    assert cut(document, [64, 128, 256, 512], np.random.default_rng(0)) == expected


def test_a_document_beyond_the_longest_bucket_gives_each_bucket_as_many_tokens() -> None:
    """Within what drawing 20,000 sequences allows."""
    lengths = [64, 128, 256, 512]
    found = Counter(cut(2_500_000, lengths, np.random.default_rng(0)))
    tokens = [length * found[length] for length in lengths]
    assert max(tokens) < 1.05 * min(tokens)
    assert sum(found[length] * (length + 1) for length in lengths) > 2_500_000 - 2 * 512


def test_a_cycle_takes_each_bucket_as_often_as_it_has_steps() -> None:
    """In another order each time; the stronger the curriculum, the later long sequences come."""
    steps = (60, 40, 20, 20)
    later = []
    for curriculum in ("uniform", "grow_linear", "grow_p2"):
        orders = [drawn(steps, curriculum, 0, cycle) for cycle in range(20)]
        assert {tuple(np.bincount(order, minlength=4)) for order in orders} == {steps}
        assert len({tuple(order) for order in orders}) == 20
        later.append(np.mean([order[70:].mean() - order[:70].mean() for order in orders]))
    assert later[0] == pytest.approx(0, abs=0.15)
    assert later[1] > later[0] + 0.3
    assert later[2] > later[1] + 0.3


def test_a_weight_is_fixed_until_its_bucket_is_used_up() -> None:
    """Weights 4 and 2 give the first bucket twice in 4 of 9 cycles; with weights by what is left it would be 1 in 3."""
    orders = [drawn((2, 2), "grow_p2", seed, 0).tolist() for seed in range(2000)]
    assert sum(order[:2] == [0, 0] for order in orders) / 2000 == pytest.approx(4 / 9, abs=0.04)


def test_every_step_has_as_many_tokens_in_sequences_of_one_length(texts: Path) -> None:
    """In the order that the curriculum draws, and batches as many sequences as fill a sample."""
    source = corpus(texts)
    inside = opened(source)
    seen = set()
    for number in range(sum(inside.steps)):
        length = inside.lengths[inside.at(number)[0]]
        found = step_rows(source, number)
        assert {len(row) for row in found} == {length + 1}
        assert len(found) * length == SAMPLES * LONGEST
        batch = source.batch(range(number * SAMPLES, number * SAMPLES + 2))
        assert batch.input_ids.shape == (2 * LONGEST // length, length)
        assert batch.layout.length == length
        assert batch.layout.documents is None
        seen.add(length)
    assert seen == {32, 64, 128, 256}


def test_no_sequence_holds_tokens_of_two_documents(texts: Path) -> None:
    """Each is a part of one file, and may end with its end-of-text."""
    files = [file.read_bytes() + b"\0" for file in sorted(texts.iterdir())]
    source = corpus(texts)
    for number in range(sum(opened(source).steps)):
        for row in step_rows(source, number):
            assert any(bytes(row) in text for text in files), bytes(row)


def test_a_pass_takes_no_sequence_twice(texts: Path) -> None:
    """Cycles divide the corpus; only what rounding to whole steps adds begins the next pass."""
    source = corpus(texts, cycles=2)
    inside = opened(source)
    for bucket, starts in enumerate(inside.starts):
        per_step = SAMPLES * LONGEST // inside.lengths[bucket]
        assert abs(2 * inside.steps[bucket] * per_step - len(starts)) <= 2 * 2 * per_step
    found = [
        tuple(row) for number in range(2 * sum(inside.steps)) for row in step_rows(source, number)
    ]
    expected = sum(len(starts) for starts in inside.starts)
    assert len(set(found)) > 0.95 * expected


def test_every_position_predicts_the_next_token(texts: Path) -> None:
    """The last one, too: a sequence brings its last label."""
    source = corpus(texts)
    batch = source.batch([0])
    whole = torch.tensor([row[0].tolist() for row in source.rows(0)])
    assert torch.equal(batch.input_ids, whole[:, :-1])
    assert torch.equal(batch.shift_labels, whole[:, 1:])
    assert torch.equal(batch.position_ids, torch.arange(whole.shape[1] - 1).expand_as(whole[:, 1:]))
    masked = Corpus(
        source.config.model_copy(update={"mask": "rank"}), LONGEST, 0, 256, step_samples=SAMPLES
    )
    labels = masked.batch([0]).shift_labels
    half = labels.shape[1] // 2
    assert (labels[:, half:] == IGNORE_INDEX).all()
    assert (labels[:, :half] != IGNORE_INDEX).all()


def test_the_sources_of_python_fill_the_published_buckets() -> None:
    """On real text of this machine: lengths of 256 to 8,192, all used, the short ones first."""
    config = DataConfig.model_validate({"source": "decomposition"})
    inside = decomposed(Decomposition(), Corpus(config, 8192, 0, 256, step_samples=2))
    assert inside.lengths == [256, 512, 1024, 2048, 4096, 8192]
    assert min(inside.steps) > 0
    order = [inside.at(number)[0] for number in range(sum(inside.steps))]
    assert np.mean(order[: len(order) // 2]) < np.mean(order[len(order) // 2 :])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"seqlen": 67},
            "seqlen (67) must be a power of two for source 'decomposition', or no bucket divides the tokens of a step; use 64 or 128",
        ),
        ({"shortest": 48}, "shortest (48) must be a power of two"),
        (
            {"shortest": 512},
            "shortest (512) is a bucket beyond the longest, which has seqlen (256) tokens; use shortest up to 256",
        ),
        (
            {"curriculum": "grow"},
            "curriculum = 'grow': Input should be 'uniform', 'grow_linear' or 'grow_p2'",
        ),
        ({"cycles": 0}, "cycles = 0: Input should be greater than or equal to 1"),
        (
            {"documents": 3},
            "documents is 3, but source 'decomposition' takes each sequence from one document and packs none; leave documents out",
        ),
    ],
)
def test_impossible_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    """Before anything runs, with the value, the rule and the way out."""
    outer = {name: changed.pop(name) for name in ("seqlen",) if name in changed}
    data = {name: changed.pop(name) for name in ("documents",) if name in changed}
    source = {"name": "decomposition", "shortest": SHORTEST, **changed}
    config = config_of(**{"seqlen": LONGEST, **outer}, data={"source": source, **data})
    with pytest.raises(ValueError, match=re.escape(message)):
        step.check(config)


@pytest.mark.parametrize(
    ("method", "engine", "message"),
    [
        (
            {"name": "seq1f1b", "pp": 2, "slices": 64},
            "plain",
            "slices (64) is more than seqlen (32)",
        ),
        ({"name": "seq1f1b", "pp": 2}, "zero", "use engine 'plain' or 'fsdp2'"),
        (
            {"name": "deepspeed_alst", "sp": 2},
            "zero",
            "DeepSpeed's attention takes batch_size (1) sequences in every step, but source 'decomposition' has more in "
            "steps of shorter ones; use method 'alst'",
        ),
    ],
)
def test_a_method_and_its_engine_must_take_every_length(
    method: dict[str, Any], engine: str, message: str
) -> None:
    """Slices of a pipeline may not be empty in the shortest sequence, either."""
    source = {"name": "decomposition", "shortest": SHORTEST}
    config = config_of(
        method=method, engine=engine, seqlen=LONGEST, world_size=2, data={"source": source}
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        step.check(config)


def test_text_without_long_documents_or_enough_of_them_is_refused(tmp_path: Path) -> None:
    """A bucket beyond the longest document, and more tokens per step than a cycle has."""
    text = tmp_path / "short.txt"
    text.write_bytes(b"x" * 200)
    with pytest.raises(
        ValueError, match=r"gives a sequence of 256 tokens, and the longest has 201; use a smaller"
    ):
        corpus(text).rows(0)
    text.write_bytes(b"x" * 3_000)
    with pytest.raises(
        ValueError, match=r"tokens for 8 cycles, but a step takes 1024, and a cycle needs one"
    ):
        corpus(text).rows(0)


def trained(texts: Path, **settings: Any) -> TrainConfig:
    """A run whose first step has sequences of 64 tokens, and whose next two have others."""

    def run(seed: int) -> tuple[TrainConfig, list[int]]:
        source = {"name": "decomposition", "shortest": SHORTEST, "curriculum": "uniform"}
        data = {"corpus": str(texts), "source": source}
        config = config_of(seqlen=LONGEST, data=data, seed=seed, **settings)
        inside = opened(corpus_of(config))
        return config, [inside.lengths[inside.at(number)[0]] for number in range(3)]

    return next(
        config for config, lengths in map(run, range(50)) if lengths[0] == 64 not in lengths[1:]
    )


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ({"name": "alst", "sp": 2, "tiles": 3}, "plain"),
        ({"name": "alst", "sp": 2, "tiles": 3}, "fsdp2"),
        ({"name": "baseline"}, "fsdp2"),
    ],
)
@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-12), ("float32", 1e-5)])
def test_gradients_are_those_of_the_stock_model(
    ranks: Ranks, texts: Path, method: dict[str, Any], engine: str, dtype: str, exact: float
) -> None:
    """Which sees each sequence alone, in fp64."""
    config = trained(texts, method=method, engine=engine, dtype=dtype, world_size=2)
    run, truth = ranks(2)(run_steps, config, 3)[0], truth_of(config, 3)
    assert_same_gradients(run.gradients, truth.gradients, exact, exact)
    assert_trains_as(run, truth)


@pytest.mark.parametrize(
    ("method", "engine", "dtype", "world_size"),
    [
        ({"name": "baseline"}, {"name": "zero", "stage": 3}, "float32", 2),
        ({"name": "alst", "sp": 2, "tiles": 3}, {"name": "zero", "stage": 2}, "float32", 2),
        ({"name": "ring", "cp": 2}, {"name": "zero", "stage": 3}, "float32", 2),
        ({"name": "usp", "cp": 2, "sp": 2}, "fsdp2", "float64", 4),
        ({"name": "layerwise", "sp": 2}, {"name": "zero", "stage": 3}, "float32", 2),
        ({"name": "mst"}, "fsdp2", "float64", 2),
        ({"name": "chunked", "chunk": 24}, "plain", "float64", 2),
        ({"name": "seq1f1b", "pp": 2}, "plain", "float64", 2),
    ],
)
def test_every_method_accumulates_exact_gradients_of_short_sequences(
    ranks: Ranks,
    texts: Path,
    method: dict[str, Any],
    engine: str | dict[str, Any],
    dtype: str,
    world_size: int,
) -> None:
    """Over two micro-batches with unequal numbers of labels; the step after it has another length."""
    config = trained(
        texts, method=method, engine=engine, dtype=dtype, world_size=world_size, accumulation=2
    )
    exact = 1e-12 if dtype == "float64" else 1e-5
    run, truth = ranks(world_size)(run_steps, config, 2)[0], truth_of(config, 2)
    assert_same_gradients(run.gradients, truth.gradients, exact, exact)
    assert_trains_as(run, truth)
