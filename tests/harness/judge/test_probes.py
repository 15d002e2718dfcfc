"""Probes of a run that need no reference, and planted defects that each must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alst_impl import hf
from alst_impl.layout import Layout
from alst_impl.methods.base import Method
from alst_impl.ops.attention import ulysses
from alst_impl.ops.attention.cores.base import Kernel
from harness.cells.cell import make_cell
from harness.judge import probes
from harness.processes.client import submit
from harness.processes.jobs import Rank
from harness.records.record import Finding

TINY: dict[str, Any] = {
    "model": "tiny-llama",
    "method": {"name": "alst", "sp": 2, "tiles": 3},
    "engine": "plain",
    "world_size": 4,
    "seqlen": 67,
    "data": {"documents": 3},
    "gate": False,
    "warmup": 0,
    "steps": 0,
    "timed": False,
    "timeout_s": 100,
}
PROBES = {"token streams", "shard length", "causality", "packed documents", "tiles"}


def findings(
    entry: str = "harness.judge.probes:execute", defect: str | None = None, **settings: Any
) -> dict[str, Finding]:
    """Findings of a cell by probe, the same on all ranks."""
    cell = make_cell({**TINY, **settings})
    payload = {"cell": cell.model_dump(mode="json"), "defect": defect}
    ending = submit(entry, payload, cell.train.world_size, cell.timeout_s)
    assert ending.how == "finished", ending
    for rank in ending.results[1:]:
        assert [f["passed"] for f in rank] == [f["passed"] for f in ending.results[0]]
    found = [Finding(**each) for each in ending.results[0]]
    return {finding.probe: finding for finding in found}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": {"name": "zero", "stage": 3}},
        {"engine": "fsdp2", "batch_size": 2},
        {"model": "tiny-mistral", "overrides": {"sliding_window": 13}},
        {"method": {"name": "baseline"}, "world_size": 2},
        {"method": {"name": "usp", "cp": 2, "sp": 2, "tiles": 3}, "data": {"documents": 1}},
    ],
    ids=["plain", "zero3", "fsdp2-batch-2", "window", "baseline", "zigzag"],
)
def test_right_training_passes_every_probe(settings: dict[str, Any]) -> None:
    """Sharded, tiled, packed and windowed training, and the stock model."""
    found = findings(**settings)
    assert found.keys() == PROBES
    assert all(finding.passed for finding in found.values()), found


def test_findings_give_their_numbers() -> None:
    """Without numbers, a probe that checked nothing would look the same."""
    found = findings()
    assert found["shard length"].detail == "[34] of 67 tokens on each of 2 ranks"
    assert "logits 12 rows, MLP 12 rows; a tile has 12" in found["tiles"].detail
    assert found["causality"].detail.startswith("token 33 changed; 33 to ")
    assert "dp 0" in found["token streams"].detail
    assert "dp 1" in found["token streams"].detail


def _forget_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Kernel.__call__

    def forgetful(self: Kernel, *args: Any, layout: Layout, **options: Any) -> Any:
        return attend(self, *args, layout=replace(layout, documents=None), **options)

    monkeypatch.setattr(Kernel, "__call__", forgetful)


def _see_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        _: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **__: Any
    ) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    monkeypatch.setattr(Kernel, "__call__", attend)


def _do_not_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "tile_module", lambda *_: None)


def _see_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = probes._Rows.__init__

    def of_few(self: Any, widths: set[int], hidden_size: int) -> None:
        made(self, {min(widths)}, hidden_size)

    monkeypatch.setattr(probes._Rows, "__init__", of_few)


def _do_not_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    # Attention would refuse such a batch.
    monkeypatch.setattr(ulysses, "reached", lambda layout, *_: layout)
    monkeypatch.setattr(Method, "shard", lambda _self, batch, layout: replace(batch, layout=layout))


def _give_every_rank_the_first_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "shard", lambda _self, batch, layout: layout.cut(batch, 0))


def _give_every_rank_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = probes.corpus_of

    def corpus_of(train: Any) -> Any:
        corpus = batch(train)
        rows = type(corpus).rows
        monkeypatch.setattr(type(corpus), "rows", lambda self, _: rows(self, 0))
        return corpus

    monkeypatch.setattr(probes, "corpus_of", corpus_of)


DEFECTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "packed documents see each other": (_forget_documents, "packed documents"),
    "attention looks ahead": (_see_the_future, "causality"),
    "modules are not tiled": (_do_not_tile, "tiles"),
    "a tiled module did not run": (_see_no_logits, "tiles"),
    "the sequence is not sharded": (_do_not_shard, "shard length"),
    "every rank has the first shard": (_give_every_rank_the_first_shard, "token streams"),
    "every rank has the same sample": (_give_every_rank_one_sample, "token streams"),
}


def execute_with_defect(rank: Rank, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the probes on a rank with a planted defect. The process ends with its job."""
    plant, _ = DEFECTS[payload["defect"]]
    plant(pytest.MonkeyPatch())
    return probes.execute(rank, payload)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_seen_by_its_probe(defect: str) -> None:
    """There is no reference to compare with."""
    _, probe = DEFECTS[defect]
    # Without its share of the sequence a rank cannot split it into documents.
    data = {"documents": 3 if probe == "packed documents" else 1}
    found = findings(f"{__name__}:execute_with_defect", defect, data=data)
    assert not found[probe].passed, found


def test_a_probe_that_does_not_apply_says_so() -> None:
    """Examples: an unpacked sample, and a model whose number of tiles follows from its size."""
    found = findings(data={"documents": 1}, method={"name": "alst", "sp": 2})
    assert found["packed documents"].detail == "one document: none to leak to"
    assert found["tiles"].detail == "nothing is tiled by number"
