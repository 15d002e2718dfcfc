"""The published plan comes out of the published shards; costs follow from times by length."""

from __future__ import annotations

import json

import pytest

from alst_impl.methods.base import step_samples
from alst_impl.models import described
from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.experiment import load_experiment
from harness.commands import claims as command
from harness.formulas.flops import attention_forward, model_causal, shape_of
from harness.judge.claims import Verdict
from harness.judge.decomposition import EXPERIMENT, cost_over, evidence, mean_length, planned
from harness.records.table import fresh

PARAMETERS = 10**9


def cells() -> list[Cell]:
    """The forecasts, from the shortest sequences to the longest."""
    found = load_experiment(paths.experiment(EXPERIMENT)).cells().values()
    return sorted(found, key=lambda cell: cell.train.seqlen)


def step_flops(cell: Cell) -> tuple[float, float]:
    """FLOPs of a step's products with parameters, and of attention's scores."""
    t = cell.train
    shape = shape_of(described(t.model, t.overrides), PARAMETERS)
    scores = 3 * attention_forward(shape, [t.seqlen])
    linear = model_causal(shape, [t.seqlen]) - scores
    return step_samples(t) * linear, float(step_samples(t) * scores)


def test_the_published_batches_and_mean_lengths_come_out() -> None:
    """Those of the authors' example and of their table of buckets."""
    plan = planned()
    assert list(plan.steps.values()) == [736, 1248, 1552, 1312, 1072, 960]
    assert list(plan.weights.values()) == [1472, 1248, 776, 328, 134, 60]
    assert round(mean_length("DCLM-Baseline subset")) == 2507
    assert round(mean_length("Wikipedia")) == 1971


def test_numbers_are_reproduced_but_for_what_needs_a_training_run() -> None:
    """Twelve counts are exact. Without a record the cost is not measured; accuracy never is."""
    found = evidence(fresh(paths.experiment(EXPERIMENT), paths.REFERENCE / "nowhere"))
    counts = [e for e in found if e.quantity == "count"]
    assert len(counts) == 12
    assert all(e.error == 0 and e.verdict is Verdict.REPRODUCED for e in counts)
    others = {e.id: e.verdict for e in found if e.quantity == "ratio"}
    assert others == {
        "decomposition-cost-over-2k": Verdict.NOT_MEASURED,
        "decomposition-steps-to-accuracy": Verdict.NOT_MEASURED,
    }


def test_a_cost_is_that_of_all_steps_over_as_many_of_one_length() -> None:
    """With steps of 1 s, and of 2 s for the longest, 960 of 6,880 steps take twice as long."""
    seconds = dict.fromkeys(planned().steps, 1.0) | {8192: 2.0}
    assert cost_over(seconds) == pytest.approx(1 + 960 / 6880)
    assert cost_over(seconds, 8192) == pytest.approx((1 + 960 / 6880) / 2)
    assert cost_over({2048: 1.0}) is None


def test_steps_of_every_length_have_as_many_tokens_and_less_work_the_shorter_they_are() -> None:
    """Parameters' products are the same; visible pairs of a token go with its sequence: (n + 1) / 2."""
    tokens = {step_samples(cell.train) * cell.train.seqlen for cell in cells()}
    assert tokens == {64 * 8192}
    assert [cell.train.seqlen for cell in cells()] == list(planned().steps)
    linear, scores = zip(*map(step_flops, cells()), strict=True)
    assert set(linear) == {linear[0]}
    for cell, each in zip(cells(), scores, strict=True):
        assert each / scores[0] == pytest.approx((cell.train.seqlen + 1) / 257)


def test_claims_print_them_after_those_of_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the committed records, with the stable keys."""
    monkeypatch.setattr(paths, "experiments", lambda: [paths.experiment(EXPERIMENT)])
    assert command.claims(as_json=True) == 0
    found = {claim["id"]: claim for claim in json.loads(capsys.readouterr().out)}
    assert found["decomposition-weight-256"] == {
        "id": "decomposition-weight-256",
        "source": "apple/ml-dataset-decomposition@9a23939, README example",
        "published": 1472.0,
        "unit": "1",
        "predicted": 1472.0,
        "measured": None,
        "error": 0.0,
        "used_for_fit": False,
        "verdict": "reproduced",
        "outcome": None,
    }
