"""Groups of several degrees in one batch train exactly as the stock model does."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from phantoms import cell, estimated, missing
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
from alst_impl.layout import make_mesh
from alst_impl.methods.base import layouts, load_method, step_samples
from alst_impl.methods.flexsp import Flexsp, Speeds, work_of
from alst_impl.models import build, described
from alst_impl.placement import Placement
from alst_impl.planners.base import load_planner
from harness.formulas.flops import model_causal, shape_of

if TYPE_CHECKING:
    from conftest import Ranks

RANKS = 4
FAMILIES = Path(__file__).parents[1] / "families"
FAR = {"node": 1, "beyond": 1e6}
"""Links that make a plan avoid exchanges."""


def mixed(**settings: Any) -> TrainConfig:
    """Two samples of four documents, planned as Megatron Core does."""
    method = {"name": "flexsp", "sp": 4, "tokens": 22, "tiles": 3, "planner": "megatron"}
    data = {"documents": 4, "mask": "prefix"}
    return config_of(method=method, world_size=RANKS, accumulation=2, seed=1, data=data, **settings)


def packed(**settings: Any) -> TrainConfig:
    """Two samples of six documents, planned as FlexSP does."""
    method = {"name": "flexsp", "sp": 4, "tokens": 17}
    data = {"documents": 6}
    return config_of(
        method=method, world_size=RANKS, accumulation=2, seed=36, data=data, **settings
    )


def idle(**settings: Any) -> TrainConfig:
    """Three documents, on as many ranks."""
    method = {"name": "flexsp", "sp": 4, "tokens": 23, "speeds": FAR}
    return config_of(method=method, world_size=RANKS, data={"documents": [23, 22, 22]}, **settings)


def planned(config: TrainConfig) -> list[list[tuple[int, list[int]]]]:
    """Degrees and lengths of the groups of each micro-batch of the first step."""
    method = load_method(config.method)
    assert isinstance(method, Flexsp)
    corpus = corpus_of(config)
    lengths = [n for i in range(step_samples(config)) for n in corpus.lengths(i)]
    work = work_of(build(config)[0], config, method.speeds)
    plan = load_planner(method.planner).plan(lengths, method.cluster(config), work)
    return [
        [(group.degree, [lengths[k] for k in group.documents]) for group in groups]
        for groups in plan.micro_batches
    ]


def test_the_plans_of_these_tests_have_several_degrees_and_an_idle_rank() -> None:
    """So that what follows tests them, and groups that pack documents beside others that do not."""
    assert planned(mixed()) == [
        [(4, [58])],
        [(2, [23]), (1, [22]), (1, [11, 11])],
        [(2, [4]), (1, [4]), (1, [1])],
    ]
    assert planned(packed()) == [
        [(4, [37])],
        [(2, [27]), (2, [13, 12])],
        [(1, [10]), (1, [9, 2]), (1, [8, 2, 1]), (1, [7, 6])],
    ]
    assert planned(idle()) == [[(1, [23]), (1, [22]), (1, [22])]]


@pytest.mark.parametrize(
    ("make", "engine", "dtype", "exact"),
    [
        (mixed, "plain", "float64", 1e-12),
        (packed, "plain", "float64", 1e-12),
        (idle, "plain", "float64", 1e-12),
        (packed, "fsdp2", "float64", 1e-12),
        (idle, "fsdp2", "float64", 1e-12),
        (mixed, "fsdp2", "float32", 1e-5),
        (mixed, "zero", "float32", 1e-5),
        (idle, "zero", "float32", 1e-5),
    ],
)
def test_gradients_are_those_of_the_stock_model(
    ranks: Ranks, make: Any, engine: str, dtype: str, exact: float
) -> None:
    """Which sees each sample alone, in fp64. The second step has another plan."""
    config = make(engine=engine, dtype=dtype)
    run, truth = ranks(RANKS)(run_steps, config, 2)[0], truth_of(config, 2)
    assert_same_gradients(run.gradients, truth.gradients, exact, exact)
    assert_trains_as(run, truth)


def test_whole_documents_of_a_text_train_exactly(ranks: Ranks, tmp_path: Path) -> None:
    """Of real, uneven lengths; heads that no group divides evenly are repeated."""
    for number, length in enumerate([3, 9, 14, 30, 55, 80]):
        (tmp_path / f"{number}.txt").write_bytes(Path(__file__).read_bytes()[:length])
    config = config_of(
        method={"name": "flexsp", "sp": 4, "tokens": 25},
        overrides={"num_key_value_heads": 2},
        dtype="float64",
        world_size=RANKS,
        batch_size=4,
        data={"corpus": str(tmp_path), "source": "documents"},
    )
    assert len({degree for groups in planned(config) for degree, _ in groups}) > 1
    run, truth = ranks(RANKS)(run_steps, config, 2)[0], truth_of(config, 2)
    assert_same_gradients(run.gradients, truth.gradients, 1e-12, 1e-12)
    assert_trains_as(run, truth)


def test_documents_are_files_from_their_beginning(tmp_path: Path) -> None:
    """They fill a sample, and only its last one is cut."""
    texts = [bytes([65 + number]) * (5 + 9 * number) for number in range(5)]
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text)
    config = DataConfig.model_validate({"corpus": str(tmp_path), "source": "documents"})
    corpus = Corpus(config, 100, 0, 256)
    seen = set()
    for index in range(20):
        batch, lengths = corpus.batch([index]), corpus.lengths(index)
        assert batch.layout.documents == (lengths,)
        pieces = torch.split(batch.input_ids[0], lengths)
        whole = [bytes(piece.tolist()) for piece in pieces[:-1]]
        assert all(document in texts for document in whole)
        assert any(text.startswith(bytes(pieces[-1].tolist())) for text in texts)
        seen |= set(whole)
    assert len(seen) == 5


@dataclass(frozen=True)
class Watched(Corpus):
    """A corpus that notes who asks for the lengths of which samples."""

    asked: list[tuple[str, int]] = field(default_factory=list)

    def lengths(self, index: int) -> tuple[int, ...]:
        self.asked.append((threading.current_thread().name, index))
        return super().lengths(index)


def planned_ahead(rank: int, world_size: int, config: TrainConfig) -> list[tuple[str, int]]:
    """Body of a rank: who had asked for which samples before the second step was."""
    mesh, placement = make_mesh(layouts(config), "cpu"), Placement(torch.device("cpu"))
    method, _ = step.start(config, mesh, placement)
    assert isinstance(method, Flexsp)
    corpus = Watched(config.data, config.seqlen, config.seed, 256)
    method.micro_batches(config, corpus, mesh, 0)
    method.finish_planning()
    return corpus.asked


def test_the_next_step_is_planned_while_this_one_trains(ranks: Ranks) -> None:
    """In another thread, before anyone asks for its batches."""
    config = config_of(method={"name": "flexsp", "sp": 2}, world_size=2, batch_size=3)
    for asked in ranks(2)(planned_ahead, config):
        assert {index for _, index in asked} == set(range(6))
        assert all(name.startswith("plan") for name, _ in asked)


def test_work_is_that_of_the_formulas() -> None:
    """FLOPs of a document are the causal model FLOPs; a forward more if layers are recomputed."""
    config = config_of(method="flexsp", checkpoint=False)
    model, _ = build(config)
    fields = described(config.model, config.overrides)
    shape = shape_of(fields, sum(p.numel() for p in model.parameters()))
    one = Speeds(flops=1.0)
    lengths = np.array([500, 5_000])
    for length, found in zip(lengths, work_of(model, config, one).seconds(lengths, 1), strict=True):
        assert found == pytest.approx(model_causal(shape, [int(length)]), rel=1e-3)
    again = work_of(model, config.model_copy(update={"checkpoint": True}), one)
    assert again.linear * 3 == work_of(model, config, one).linear * 4


def test_exchanges_cost_more_beyond_a_node() -> None:
    """A group of one exchanges nothing."""
    model, _ = build(config_of())
    config = config_of(method="flexsp", world_size=16)
    slow = work_of(model, config, Speeds(flops=1e30))
    lengths = np.array([1_000])
    alone, within, beyond = (slow.seconds(lengths, degree)[0] for degree in (1, 8, 16))
    assert alone < 1e-9 * within
    ratio = Speeds().within / Speeds().beyond
    assert beyond / within == pytest.approx(ratio * (15 / 16 / 16) / (7 / 8 / 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": {"name": "flexsp", "sp": 4, "tokens": 16}, "world_size": 4},
            "no group can hold a document of seqlen (67) tokens: the largest has 4 ranks, which hold 16 tokens each; "
            "use tokens=17",
        ),
        (
            {"method": {"name": "flexsp", "sp": 6}, "world_size": 6},
            "sp (6) must be a power of two that divides world_size (6) for method 'flexsp', whose other groups are halves "
            "of the largest; use sp in [1, 2]",
        ),
        (
            {"method": {"name": "flexsp", "sp": 4}, "world_size": 6},
            "sp (4) must be a power of two that divides world_size (6)",
        ),
        (
            {"method": {"name": "flexsp", "sp": 16}, "world_size": 16},
            "num_attention_heads (8) must be divisible by sp (16) for method 'flexsp'; use sp in [1, 2, 4, 8]",
        ),
        (
            {"method": {"name": "flexsp", "planner": "greedy"}},
            "unknown planner 'greedy'; use one of",
        ),
        (
            {
                "method": {"name": "flexsp", "planner": {"name": "single", "degree": 2}},
                "world_size": 2,
            },
            "planner 'single' makes groups of degree 2, but method 'flexsp' at sp (1) has those of [1]",
        ),
        (
            {
                "method": {
                    "name": "flexsp",
                    "sp": 4,
                    "planner": {"name": "single", "degree": 2},
                },
                "world_size": 4,
            },
            "no group can hold a document of seqlen (67) tokens: the largest has 2 ranks, which hold 17 tokens each; use "
            "tokens=34",
        ),
        (
            {"method": {"name": "flexsp", "planner": {"name": "flexsp", "trials": 0}}},
            "trials = 0",
        ),
        (
            {"method": "flexsp", "seqlen": 512, "data": {"source": "decomposition"}},
            "source 'decomposition' gives the sequences of a step one length",
        ),
        (
            {"method": "flexsp", "data": {"source": "documents", "documents": 3}},
            "documents is 3, but source 'documents' packs as many as fill a sample; leave documents out",
        ),
        (
            {"method": "flexsp", "engine": {"name": "plain", "update_in_backward": True}},
            "update_in_backward updates in every backward, but method 'flexsp' runs as many micro-batches",
        ),
        (
            {"method": "flexsp", "model": str(FAMILIES / "llama4_text.json")},
            "has chunked attention (attention_chunk_size=",
        ),
        (
            {
                "method": "flexsp",
                "model": "tiny-qwen3-moe",
                "overrides": {"output_router_logits": True},
            },
            "a router loss, which shards would each compute alone",
        ),
        (
            {
                "method": "flexsp",
                "overrides": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            },
            "rotary scaling 'dynamic', whose frequencies depend on the longest position of what runs together",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """Before anything runs, with the value, the rule and the way out."""
    with pytest.raises(ValueError, match=re.escape(message)):
        step.check(config_of(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"documents": 4}}, "a forecast plays one rank for all"),
        (
            {"method": {"name": "flexsp", "sp": 4, "tokens": 64}},
            "leave tokens out, and use a seqlen of 256 (tokens x sp)",
        ),
    ],
)
def test_a_forecast_plays_a_full_rank_or_none(settings: dict[str, Any], message: str) -> None:
    """What one rank cannot show is refused."""
    usual = {"method": {"name": "flexsp", "sp": 4}, "seqlen": 256, "world_size": 4}
    cell(**usual)
    with pytest.raises(ValueError, match=re.escape(message)):
        cell(**{**usual, **settings})


@pytest.mark.phantom
@pytest.mark.skipif(bool(missing()), reason=missing() or "all there")
def test_a_full_rank_allocates_what_a_rank_of_alst_does() -> None:
    """To the byte: two groups of four, each with one sample."""
    cells = (
        cell(method={"name": name, "sp": 4}, seqlen=16_384, world_size=8)
        for name in ("alst", "flexsp")
    )
    alst, flexsp = estimated(*cells)
    assert alst.allocated_bytes == flexsp.allocated_bytes
