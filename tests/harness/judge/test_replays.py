"""FlexSP's published times and speed-ups beside the replay."""

from __future__ import annotations

import pytest

from harness.judge.claims import Verdict, evidence
from harness.judge.replays import evidence_of
from harness.records.published import rows
from harness.records.replays import Replayed


def made(planner: str, *seconds: float) -> list[Replayed]:
    """Batches of 7B up to 192K, published at 4.9 s (FlexSP), 6.2 s (BatchAda) and 8.3 s (DeepSpeed)."""
    return [
        Replayed(
            model="GPT-7B", context_k=192, planner=planner, batch=k, micro_batches=2, seconds=each
        )
        for k, each in enumerate(seconds)
    ]


def test_every_published_time_stands_beside_the_mean_of_its_planner() -> None:
    """And every printed speed-up over DeepSpeed beside the ratio of the means; others have no record."""
    replay = [*made("flexsp", 4.0, 6.0), *made("best_fit", 7.0), *made("static", 8.0, 9.0)]
    found = evidence_of(replay)
    times = [e for e in found if e.quantity == "step_seconds"]
    assert len(times) == len(rows("flexsp_end_to_end")) == 72
    judged = {e.id: e for e in found if e.verdict is not Verdict.NOT_MEASURED}
    name = "flexsp-GPT-7B-192K-Wikipedia"
    assert {key: (e.published, e.predicted, e.verdict) for key, e in judged.items()} == {
        f"{name}-DeepSpeed-Ulysses-step_seconds": (8.3, 8.5, Verdict.REPRODUCED),
        f"{name}-FlexSP-BatchAda-step_seconds": (6.2, 7.0, Verdict.REFUTED),
        f"{name}-FlexSP-BatchAda-speedup": (1.34, pytest.approx(8.5 / 7), Verdict.REPRODUCED),
        f"{name}-FlexSP-step_seconds": (4.9, 5.0, Verdict.REPRODUCED),
        f"{name}-FlexSP-speedup": (1.72, pytest.approx(1.7), Verdict.REPRODUCED),
    }
    assert judged[f"{name}-FlexSP-step_seconds"].error == pytest.approx(5 / 4.9 - 1)


def test_ids_are_unique() -> None:
    """Also beside those of experiments, which name none of these systems so."""
    found = [e.id for e in evidence_of(made("flexsp", 4.0))]
    assert len({*found}) == len(found)


def test_without_a_replay_there_is_no_claim() -> None:
    assert evidence_of([]) == evidence([]) == []
