"""The first screen of the report: headline claims, longest sequences, correctness, and what waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterable

from harness.cells import paths
from harness.cells.experiment import Claim, load_experiment
from harness.cells.units import length_text
from harness.judge.claims import OURS, Evidence, evidence
from harness.judge.defects import read_defects
from harness.present.grids.base import MISSING, Grid
from harness.present.grids.gradients import defect_grid
from harness.present.lengths import Length
from harness.records.families import Family
from harness.records.record import Outcome
from harness.records.table import Results, machine_of

HEADLINE = "alst_baseline_vs_alst"
"""The published table that the paper's headline is taken from: Tables 2 to 4."""


def headline_claim_grid(forecasts: Iterable[Results], compared: Iterable[Results]) -> Grid:
    """A row per headline claim of the paper: published, ours, the verdict and the evidence for it."""
    rows, records = [], []
    for results in forecasts:
        by_key = {e.key: e for e in evidence([results]) if e.quantity == "longest_tokens"}
        by_place: dict[str, list[tuple[Claim, Evidence]]] = {}
        for key, claim in results.claims:
            if claim.table == HEADLINE and key in by_key:
                by_place.setdefault(by_key[key].place, []).append((claim, by_key[key]))
        for found in by_place.values():
            claim, best = min(found, key=lambda each: (each[1].predicted is None, each[1].is_ours))
            rows.append(_length_row(results, claim, best))
            records.append(results.files.get(best.key))
    same = _same_training_row(compared)
    headings = ["claim", "published", "ours", "verdict", "evidence"]
    return Grid(headings, [*rows, *same], [*records, *[None for _ in same]])


def _length_row(results: Results, claim: Claim, e: Evidence) -> list[str]:
    """The number of the authors' own code where it has a record, else that of our method."""
    gpus = results.cells[e.key].train.world_size
    what = "baseline" if claim.row["config"] == "baseline" else "ALST"
    row = [f"{what}, {gpus} GPU{'s' if gpus > 1 else ''}", length_text(e.published)]
    if e.predicted is None:
        return [*row, MISSING, "no record", MISSING]
    code = f"our {OURS}" if e.is_ours else "as released"
    found = f"{length_text(e.predicted)}, {code}"
    return [*row, found, e.verdict.value, machine_of(results.measurements[e.key])]


def _same_training_row(compared: Iterable[Results]) -> list[list[str]]:
    passed, total, _ = gradient_counts(compared)
    if not total:
        return []
    verdict = "reproduced" if passed == total else "refuted"
    found = f"in {passed} of {total} cells"
    return [["same training", "same loss", found, verdict, "every gradient, on CPU"]]


def gradient_counts(compared: Iterable[Results]) -> tuple[int, int, int]:
    """Of our method: cells whose gradients passed, cells run, and combinations refused."""
    compared = list(compared)
    outcomes = [
        m.outcome
        for r in compared
        for m in r.measurements.values()
        if m.cell.train.method.name == OURS
    ]
    return outcomes.count(Outcome.OK), len(outcomes), sum(len(r.refused) for r in compared)


def correctness_line(compared: Iterable[Results], families: Iterable[Family]) -> str:
    """Gradients, planted defects and model types in one sentence; empty without any of them."""
    compared, families = list(compared), list(families)
    passed, total, refused = gradient_counts(compared)
    caught = sum(len(defect_grid(results).rows) for results in compared)
    words = []
    if total:
        words.append(
            f"every gradient of {OURS} agrees with the stock model's in {passed} of {total} cells"
            f" ({refused} combinations are refused)"
        )
    if caught:
        planted = sum(not defect.tests for defect in read_defects(paths.DEFECTS).values())
        words.append(f"{caught} of {planted} planted defects are caught")
    ours = [f for f in families if f.method == OURS and f.dtype == "float32"]
    if ours:
        exact = sum(f.outcome is Outcome.OK for f in ours)
        words.append(f"{exact} of {len(ours)} model types of transformers train exactly")
    return "; ".join(words)


def length_rows(lengths: Iterable[Length]) -> Grid:
    """A row per system and number of GPUs."""
    lengths = list(lengths)
    rows = [
        [
            each.system if each.is_published else f"our {each.system}",
            str(each.num_gpus),
            length_text(each.tokens),
            each.hardware,
        ]
        for each in lengths
    ]
    return Grid(["system", "GPUs", "tokens", "hardware"], rows, [each.record for each in lengths])


def waiting_grid(recorded: Iterable[Results]) -> Grid:
    """A row per experiment with cells for a GPU of which some were not measured yet."""
    measured = {key for results in recorded for key in results.measurements}
    rows = []
    for path in paths.experiments():
        e = load_experiment(path)
        keys = [key for key, cell in e.cells().items() if cell.traits.gpus]
        done = sum(key in measured for key in keys)
        if done < len(keys):
            rows.append([e.name, e.question, f"{done} of {len(keys)}"])
    return Grid(["experiment", "question", "cells measured"], rows)
