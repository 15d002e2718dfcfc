"""Records to documents: one self-contained HTML page, and the generated blocks of the README."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.prediction import Prediction
from harness.cells.units import (
    bytes_text,
    error_text,
    length_text,
    metric_text,
    options_text,
    percent_text,
    ratio_text,
    seconds_text,
    tokens_text,
)
from harness.judge.claims import TOLERANCE, Evidence, evidence
from harness.judge.defects import read_catches
from harness.judge.twins import twins
from harness.present.drawing import rank
from harness.present.figures.headline import longest_series
from harness.records.published import records
from harness.records.record import Gate, Measurement, Outcome, ParameterGate, Provenance
from harness.records.table import (
    NOT_MEASURED,
    NOT_SIMULATED,
    Results,
    commit_name,
    counted_outcomes,
    duels,
    measured_part,
    outcome_of,
    repeated_duels,
    series,
    tidy,
    units,
    wide,
)

GATES = ("passed", "failed")
GOOD = {Outcome.OK.value, "passed", "lower", "faster", "passed / passed"}
"""Words of a table that are drawn as a success."""
BAD = {
    *(outcome.value for outcome in Outcome if outcome is not Outcome.OK),
    *(f"{ours} / {theirs}" for ours in GATES for theirs in GATES if "failed" in (ours, theirs)),
    *("failed", "higher", "slower", NOT_MEASURED, NOT_SIMULATED),
}
"""Words of a table that are drawn as none."""

OURS, PEERS = "alst", ("deepspeed_alst", "baseline")

MISSING = "–"


@dataclass(frozen=True)
class Grid:
    """A table ready to print."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table; the first two columns are text, the others numbers."""
        align = ["---"] * 2 + ["---:"] * (len(self.headings) - 2)
        lines = [self.headings, align, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class GateView:
    """The gradient comparison of one cell."""

    title: str
    verdict: str
    summary: str
    parameters: Grid


@dataclass(frozen=True)
class Section:
    """One experiment, as the page shows it."""

    name: str
    question: str
    source: str
    progress: str
    summary: str
    verdicts: Grid
    twins: Grid
    """What a GPU measured beside what a phantom device read of the same cells."""
    claims: Grid
    """Published numbers and ours."""
    misses: Grid
    """Claims that ours misses, and what was ruled out."""
    figures: list[tuple[str, str]]
    """Title and data URI."""
    simulated: bool
    findings: Grid
    """Cells that did not pass, and what was seen of them."""
    refusals: Grid
    """Rows of a matrix that do not run."""
    defects: Grid
    """Planted defects, with the cells that caught them."""
    cells: Grid
    gates: list[GateView]
    environments: Grid
    command: str


def cell_grid(results: Results) -> Grid:
    """Every cell with what was read, one row each; a cell not measured is a row that says so."""
    cells = wide(tidy(results))
    shown = {
        "step_s": "step",
        "tokens_per_s": "tokens/s",
        "peak_bytes": "peak per rank",
        "host_peak_bytes": "host peak",
        "rss_bytes": "RSS",
        "loss": "last loss",
        "gate_ratio_error": "worst |ratio - 1|",
        "gate_cosine_error": "worst 1 - cosine",
    }
    unit = units()
    rows = []
    for row in _rows(cells):
        values = [metric_text(row[metric], unit[metric]) for metric in shown]
        place = [str(row["world_size"]), str(row["sp"]), length_text(row["seqlen"])]
        rows.append(
            [f"{row['model']} {row['series']}", *place, row["outcome"], row["gate"], *values]
        )
    return Grid(["cell", "ranks", "sp", "length", "outcome", "gradients", *shown.values()], rows)


def claim_grid(found: Iterable[Evidence]) -> Grid:
    """Every published number beside ours; marked where a constant was fitted on it, or our step does not fit."""
    rows = []
    for each in found:
        ours = each.predicted if each.measured is None else each.measured
        notes = ["fitted"] * each.used_for_fit + [Outcome.DOES_NOT_FIT.value] * each.infeasible
        note = f" ({', '.join(notes)})" if notes else ""
        rows.append(
            [
                each.id,
                _quantity(each, each.published),
                MISSING if ours is None else _quantity(each, ours),
                MISSING if each.error is None else percent_text(each.error),
                each.limit or MISSING if each.quantity == "longest_tokens" else MISSING,
                each.verdict.value.replace("_", " ") + note,
                each.source,
            ]
        )
    return Grid(["claim", "published", "predicted", "error", "limit", "verdict", "source"], rows)


def miss_grid(found: Iterable[Evidence]) -> Grid:
    """Claims further off than the tolerance, and what was ruled out as the reason.

    Predictions for our own method are no reproduction: there a miss is the result.
    """
    rows = [
        [e.id, e.ruled_out or "nothing yet", percent_text(e.error)]
        for e in found
        if e.missed and e.error is not None and f"-{OURS}-" not in e.id
    ]
    return Grid(["claim", "what was looked at", "error"], rows)


def _quantity(of: Evidence, value: float) -> str:
    if of.quantity == "longest_tokens":
        return tokens_text(value)
    if of.quantity == "longest_ratio":
        return ratio_text(value)
    if of.quantity == "tokens_per_second":
        return f"{tokens_text(value)}/s"
    return seconds_text(value) if of.quantity == "step_seconds" else bytes_text(value * 2**30)


def length_grid(found: Sequence[Evidence]) -> Grid:
    """Every published length beside the prediction for what its authors ran and for our method."""
    lengths = {e.id: e for e in found if e.quantity == "longest_tokens"}
    ours = {name.replace(f"-{OURS}-", "-"): e for name, e in lengths.items() if f"-{OURS}-" in name}
    rows = []
    for name, row in zip(lengths, claim_grid(lengths.values()).rows, strict=True):
        if f"-{OURS}-" in name:
            continue
        mine = ours.get(name.replace("-deepspeed_alst-", "-"))
        beside = MISSING if mine is None or mine.predicted is None else tokens_text(mine.predicted)
        label = name.removesuffix("-longest_tokens").replace("-deepspeed_alst", "-ALST")
        rows.append([label.replace("-", ", "), row[5], *row[1:5], beside])
    headings = ["row", "verdict", "published", "predicted", "error", "limit", f"our `{OURS}`"]
    return Grid(headings, rows)


def simulated_grid(results: Results) -> Grid:
    """Every cell of a phantom device: what it holds, and the longest sequence of its settings."""
    named = series(results.cells)
    rows = []
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        s = m.simulated if m else None
        p, search = (s.prediction, s.search) if s else (None, None)
        stops = search.limit if search else p.limit if p and not p.fits else MISSING
        rows.append(
            [
                f"{cell.train.model} {named[key]}",
                str(cell.train.world_size),
                length_text(cell.train.seqlen),
                outcome_of(cell, m),
                bytes_text(s.peak_bytes) if s else MISSING,
                bytes_text(p.reserved_bytes) if p and p.reserved_bytes else MISSING,
                bytes_text(p.total_bytes) if p else MISSING,
                bytes_text(p.host_bytes) if p else MISSING,
                seconds_text(p.step_seconds_modelled) if p else MISSING,
                *_roofline(cell, p),
                f"{search.longest_tokens:,}" if search else MISSING,
                stops,
            ]
        )
    return Grid(
        [
            "cell",
            "GPUs",
            "length",
            "outcome",
            "allocated",
            "reserved",
            "total (modelled)",
            "host per node",
            "step (modelled)",
            "FLOPs / needed",
            "host traffic per GPU",
            "step at least (modelled)",
            "longest that fits",
            "limit",
        ],
        rows,
    )


def is_compared(results: Results) -> bool:
    """Whether gradients are compared and nothing else is measured."""
    return not is_simulated(results) and not any(cell.steps for cell in results.cells.values())


def verdict_counts(results: Results) -> str:
    """How many cells ran, passed and did not, and how many rows of a matrix are refused."""
    outcomes = [m.outcome for m in results.measurements.values()]
    passed = outcomes.count(Outcome.OK)
    counted = f"{len(outcomes)} cells run, {passed} passed, {len(outcomes) - passed} failed"
    refused = f"; {len(results.refused)} refused, each with its reason" if results.refused else ""
    return counted + refused


def refusal_grid(results: Results) -> Grid:
    """What the library refuses to run: the levels that matter, and what it says."""
    usual = results.refused[0].levels if results.refused else {}
    first = {
        factor: Counter(row.levels[factor] for row in results.refused).most_common(1)[0][0]
        for factor in usual
    }
    rows = [
        [
            ", ".join(f"{f} {level}" for f, level in row.levels.items() if level != first[f]),
            row.refused or MISSING,
        ]
        for row in results.refused
    ]
    return Grid(["refused", "because"], rows)


def defect_grid(results: Results) -> Grid:
    """Planted defects and the cell of the matrix that caught each."""
    catches = read_catches(paths.CAUGHT) if results.refused else []
    rows = [[c.defect, c.cell, c.detail or c.outcome] for c in catches]
    return Grid(["planted defect", "caught by", "what it said"], rows)


def _roofline(cell: Cell, p: Prediction | None) -> list[str]:
    """FLOPs over those that training needs, bytes between GPU and host, and the time of it all at the peaks."""
    if p is None or p.cost is None or p.least_seconds_modelled is None:
        return [MISSING] * 3
    return [
        ratio_text(p.cost.flops * cell.train.world_size / p.flops.model_causal),
        bytes_text(p.cost.host_in_bytes + p.cost.host_out_bytes),
        seconds_text(p.least_seconds_modelled),
    ]


def is_simulated(results: Results) -> bool:
    """Whether no device runs the cells: numbers without gradients to compare or steps to time."""
    return all(cell.traits.forecast for cell in results.cells.values())


def twin_grid(results: Results) -> Grid:
    """What a GPU measured beside what a phantom device read of the same cell."""
    rows = [
        [
            f"{t.cell.label}, {t.cell.train.engine.name}",
            t.quantity,
            bytes_text(t.measured),
            bytes_text(t.predicted),
            f"{t.predicted - t.measured:+,.0f} B",
            "differs" if t.missed else "equal" if t.judged else "not judged",
        ]
        for t in twins(results)
    ]
    return Grid(["cell", "quantity", "GPU", "phantom", "difference", "verdict"], rows)


def claim_summary(found: Sequence[Evidence]) -> str:
    """How many numbers are reproduced, in a sentence; fitted ones are counted apart."""
    honest = [each for each in found if not each.used_for_fit]
    counts = Counter(each.verdict.value.replace("_", " ") for each in honest)
    counted = ", ".join(f"{counts[v]} {v}" for v in sorted(counts))
    return (
        f"Of {len(honest)} published numbers: {counted} (reproduced is within {TOLERANCE:.0%}). "
        f"{len(found) - len(honest)} more were used to fit a constant and are no evidence."
    )


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def time_verdict(pair: dict[str, Any]) -> str:
    """`faster` or `slower` where the spreads of the steps do not overlap, else `within spread`."""
    tokens = {
        side: pair[f"tokens_per_s_{side}"] * pair[f"step_s_{side}"] for side in ("ours", "peer")
    }
    low = {side: pair[f"step_min_s_{side}"] / tokens[side] for side in tokens}
    high = {side: pair[f"step_max_s_{side}"] / tokens[side] for side in tokens}
    if math.isnan(pair["time_ratio"]):
        return NOT_MEASURED
    if high["ours"] < low["peer"]:
        return "faster"
    return "slower" if low["ours"] > high["peer"] else "within spread"


def memory_verdict(pair: dict[str, Any]) -> str:
    """How the peak of ours compares."""
    ratio = pair["peak_ratio"]
    if math.isnan(ratio):
        return NOT_MEASURED
    return "lower" if ratio < 1 else "higher" if ratio > 1 else "equal"


def verdict_grid(results: Results) -> Grid:
    """Our method beside each peer in the same run, wherever only the method differs."""
    cells = wide(tidy(results))
    rows = []
    for peer in PEERS:
        for pair in _rows(duels(cells, OURS, peer)):
            gates = f"{pair['gate_ours']} / {pair['gate_peer']}"
            rows.append(
                [
                    f"{pair['model']}, {pair['series_ours']} : {pair['series_peer']}",
                    str(pair["world_size"]),
                    length_text(pair["seqlen"]),
                    _ratio(pair["peak_ratio"]),
                    memory_verdict(pair),
                    _ratio(pair["time_ratio"]),
                    time_verdict(pair),
                    gates,
                ]
            )
    return Grid(
        [
            "ours : theirs",
            "ranks",
            "length",
            "peak ratio",
            "peak",
            "time per token ratio",
            "time",
            "gradients ours / theirs",
        ],
        rows,
    )


def is_repeated(results: Results) -> bool:
    """Whether cells were run several times, in turn, for their ratios."""
    return any(cell.repetition for cell in results.cells.values())


def ratio_grid(results: Results) -> Grid:
    """`layerwise` beside ours in the same repetition: median ratios, with the least and the largest."""
    rows = []
    for row in _rows(repeated_duels(results, "layerwise", OURS)):
        peak, time = (
            [_ratio(row[name]) for name in (q, f"{q}_low", f"{q}_high")] for q in ("peak", "time")
        )
        rows.append(
            [
                length_text(row["seqlen"]),
                row["series_ours"],
                str(row["repetitions"]),
                peak[0],
                f"{time[0]} ({time[1]} to {time[2]})",
                row["gate"],
            ]
        )
    headings = [
        "length",
        "method",
        "runs",
        f"peak to {OURS}",
        f"step to {OURS} (spread)",
        "gradients",
    ]
    return Grid(headings, rows)


def _ratio(value: float) -> str:
    return MISSING if math.isnan(value) else ratio_text(value)


def summary(results: Results) -> str:
    """How often our method is better, in a sentence per peer."""
    cells = wide(tidy(results))
    sentences = []
    for peer in PEERS:
        pairs = _rows(duels(cells, OURS, peer))
        read = [p for p in pairs if not math.isnan(p["peak_ratio"])]
        measured = [p for p in read if _both_right(p)]
        timed = [p for p in measured if not math.isnan(p["time_ratio"])]
        if not measured:
            continue
        lower = sum(memory_verdict(p) == "lower" for p in measured)
        slower = sum(time_verdict(p) == "slower" for p in timed)
        peak = pd.Series([p["peak_ratio"] for p in measured]).median()
        time = pd.Series([p["time_ratio"] for p in timed], dtype=float).median()
        sentences.append(
            f"Against {peer}: peak lower in {lower} of {len(measured)} comparisons "
            f"(median ratio {_ratio(peak)}), step slower beyond the spread in {slower} of {len(timed)} "
            f"(median ratio of time per token {_ratio(time)})."
        )
        if len(read) > len(measured):
            uncounted = len(read) - len(measured)
            sentences.append(f"Not counted: {uncounted} with gradients wrong or not compared.")
    return " ".join(sentences)


def _both_right(pair: dict[str, Any]) -> bool:
    return all(pair[side].startswith("passed") for side in ("gate_ours", "gate_peer"))


def gate_view(name: str, m: Measurement) -> GateView | None:
    """The gradient comparison of a record, parameters furthest from the truth first."""
    if m.readings is None or m.readings.gate is None:
        return None
    gate = m.readings.gate
    rows = [
        [p.parameter, _signed(p.ratio), _cosine_error(p.cosine)]
        for p in sorted(gate.parameters, key=_distance, reverse=True)
    ]
    loss = f"loss {gate.loss:.8f}, truth {gate.truth_loss:.8f}; {len(rows)} parameters"
    t = m.cell.train
    return GateView(
        title=f"{t.model} {name}, {t.world_size} ranks, {length_text(t.seqlen)} tokens",
        verdict="passed" if gate.passed else "failed",
        summary=f"worst: {gate.worst.parameter}; {loss}",
        parameters=Grid(["parameter", "ratio - 1", "1 - cosine"], rows),
    )


def _signed(ratio: float | None) -> str:
    return "zero in truth" if ratio is None else f"{ratio - 1:+.1e}"


def _cosine_error(cosine: float | None) -> str:
    return MISSING if cosine is None else error_text(1 - cosine)


def _distance(p: ParameterGate) -> float:
    ratio = 0.0 if p.ratio is None else abs(p.ratio - 1)
    return max(ratio, 0.0 if p.cosine is None else 1 - p.cosine)


def finding_grid(results: Results) -> Grid:
    """Every cell that did not pass: how its gradients differ from the stock model's, and why it ended."""
    named = series(results.cells)
    rows = []
    for key, m in results.measurements.items():
        if m.outcome in (Outcome.OK, Outcome.DOES_NOT_FIT):
            continue  # what does not fit is a result, and the table of cells has it
        t = m.cell.train
        rows.append(
            [
                f"{t.model} {named[key]}",
                str(t.world_size),
                length_text(t.seqlen),
                m.outcome.value,
                *_spread(m.readings.gate if m.readings else None),
                m.detail or MISSING,
            ]
        )
    headings = ["cell", "ranks", "length", "outcome", "ratios", "least cosine", "what was seen"]
    return Grid(headings, rows)


def _spread(gate: Gate | None) -> list[str]:
    """Least and largest ratio over parameters, and the least cosine."""
    compared = [p for p in gate.parameters if p.ratio is not None] if gate else []
    if not compared:
        return [MISSING, MISSING]
    ratios = [p.ratio for p in compared if p.ratio is not None]
    cosine = min(p.cosine for p in compared if p.cosine is not None)
    low, high = f"{min(ratios):.4g}", f"{max(ratios):.4g}"
    return [low if low == high else f"{low} to {high}", f"{cosine:.6g}"]


def environment_grid(results: Results) -> Grid:
    """Each distinct origin of the records: code, machine and library versions."""
    counts: dict[tuple[str, ...], int] = {}
    for p in results.provenances():
        row = (
            commit_name(p),
            f"{p.device}, {p.cores} cores",
            f"Python {p.python}",
            _libraries(p),
            p.utc[:10],
        )
        counts[row] = counts.get(row, 0) + 1
    return Grid(
        ["commit", "hardware", "interpreter", "libraries", "date", "records"],
        [[*row, str(count)] for row, count in counts.items()],
    )


def _libraries(p: Provenance) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(p.versions.items()))


def versions_note(references: Sequence[Results]) -> str:
    """What the records were made with: each distinct interpreter and set of libraries."""
    counts = Counter(
        f"Python {p.python}, {_libraries(p)}" for r in references for p in r.provenances()
    )
    made = "; ".join(f"{count} with {versions}" for versions, count in counts.most_common())
    return f"Committed records: {made}."


def section(results: Results, figures: Path) -> Section:
    """The part of the page on one experiment; `figures` holds its drawn SVG files."""
    beside = twin_grid(results)
    results = measured_part(results)
    named = series(results.cells)
    views = (gate_view(named[key], m) for key, m in results.measurements.items())
    drawn = [(name, figures / f"{name}.svg") for name in results.figures]
    simulated, found = is_simulated(results), evidence([results])
    timed = not simulated and any(cell.steps for cell in results.cells.values())
    return Section(
        name=results.name,
        question=results.question,
        source=results.source,
        progress=counted_outcomes(results),
        summary=claim_summary(found) if simulated else summary(results),
        verdicts=_verdicts(results) if timed else Grid([], []),
        findings=finding_grid(results),
        refusals=refusal_grid(results),
        defects=defect_grid(results),
        twins=beside,
        claims=claim_grid(found),
        misses=miss_grid(found),
        figures=[
            (name.replace("_", " "), _data_uri(file)) for name, file in drawn if file.is_file()
        ],
        simulated=simulated,
        cells=simulated_grid(results) if simulated else cell_grid(results),
        gates=[view for view in views if view],
        environments=environment_grid(results),
        command=f"snakemake --cores all --config experiments={results.name}",
    )


def _verdicts(results: Results) -> Grid:
    return ratio_grid(results) if is_repeated(results) else verdict_grid(results)


def _data_uri(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()


def page(all_results: Sequence[Results]) -> str:
    """The whole report: HTML that loads nothing from anywhere else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.present"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [section(results, paths.figures(results.name)) for results in all_results]
    return environment.get_template("report.html").render(sections=sections, good=GOOD, bad=BAD)


def headline_grid(results: Results) -> Grid:
    """The longest series of an experiment: a row per length and method, beside ours."""
    cells = longest_series(wide(tidy(results)))
    order = sorted(set(cells["series"]), key=lambda name: (rank(name.split()[0]), name))
    rows = []
    for _, group in cells.groupby("seqlen"):
        by_series = {row["series"]: row for row in _rows(group)}
        rows += [_headline_row(by_series[s], by_series.get(OURS)) for s in order if s in by_series]
    return Grid(["length", "method", "peak", f"to {OURS}", "step", f"to {OURS}", "gradients"], rows)


def _headline_row(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    copies = f" ({row['dp']} samples)" if row["dp"] > 1 else ""
    state = row["gate"] if row["outcome"] in ("ok", "wrong_gradient") else row["outcome"]
    return [
        length_text(row["seqlen"]),
        row["series"] + copies,
        metric_text(row["peak_bytes"], "B"),
        _beside(row, ours, "peak_bytes"),
        metric_text(row["step_s"], "s"),
        _beside(row, ours, "step_s"),
        state,
    ]


def _beside(row: dict[str, Any], ours: dict[str, Any] | None, metric: str) -> str:
    return MISSING if ours is None or ours is row else _ratio(row[metric] / ours[metric])


def headline_title(results: Results) -> str:
    """What `headline_grid` shows."""
    cells = longest_series(wide(tidy(results)))
    first = cells.iloc[0]
    return f"{first['model']} on {first['world_size']} ranks, {first['engine']}, {first['dtype']}"


def readme_blocks(references: Sequence[Results]) -> dict[str, str]:
    """Content of the README's generated blocks, from committed records."""
    nothing = "No committed records yet; `make` writes its own to `results/`."
    compared = [r for r in references if is_compared(r)]
    measured = [measured_part(r) for r in references if not is_simulated(r) and not is_compared(r)]
    simulated = [r for r in references if is_simulated(r)]
    headline, results = [], []
    for r in measured:
        if is_repeated(r):
            results.append(f"`{r.name}`: {r.question}\n\n{ratio_grid(r).markdown()}")
            continue
        hardware = next(iter(r.cells.values())).hardware
        image = paths.REFERENCE / hardware / r.name / "headline.png"
        headline.append(f"![{headline_title(r)}: peak memory and step time by length]({image})")
        environments = environment_grid(r)
        origin = "; ".join(f"commit {row[0]} on {row[1]}, {row[4]}" for row in environments.rows)
        results.append(
            f"`{r.name}`, {headline_title(r)}; measured at {origin}. "
            f"{headline_grid_note()}\n\n{headline_grid(r).markdown()}\n\n{summary(r)}"
        )
    return {
        "versions": versions_note(references) if references else nothing,
        "headline": "\n".join(headline) or nothing,
        "results": "\n\n".join(results) or nothing,
        "correctness": "\n\n".join(map(_correctness, compared)) or nothing,
        "claims": _claims_block(simulated) or nothing,
        "records": records_grid(simulated).markdown() if simulated else nothing,
    }


def _correctness(results: Results) -> str:
    """What the gradient gate found in one experiment that only compares."""
    parts = [f"`{results.name}`: {verdict_counts(results)}."]
    caught = len(defect_grid(results).rows)
    if caught:
        parts[0] += f" {caught} planted defects, each caught by a cell named in the report."
    if any(m.outcome is not Outcome.OK for m in results.measurements.values()):
        parts += [results.question, finding_grid(results).markdown()]
    return "\n\n".join(parts)


def records_grid(references: Sequence[Results]) -> Grid:
    """Longest sequences of Llama-8B by number of GPUs: published ones beside predictions for ours."""
    rows: list[tuple[int, int, list[str]]] = [
        (r.num_gpus, r.tokens, [r.system, "published", r.hardware, "", r.source]) for r in records()
    ]
    for results in references:
        for key, cell in results.cells.items():
            m = results.measurements.get(key)
            search = m.simulated.search if m and m.simulated else None
            method = cell.train.method.name
            if search and cell.train.model == "llama3.1-8b" and method in (OURS, "layerwise"):
                options = {k: v for k, v in cell.train.method.options.items() if k != "sp"}
                if options and method == OURS:
                    continue
                method = ", ".join([method, *options_text(options)])
                assert cell.simulation is not None
                host = bytes_text(cell.simulation.host_memory_bytes or 0)
                limit = f"stopped by {search.limit}, host {host} per node"
                place = ["predicted", cell.hardware.upper(), limit, results.name]
                rows.append((cell.train.world_size, search.longest_tokens, [method, *place]))
    shared = {gpus for gpus, _, (_, kind, *_) in rows if kind == "published"}
    seen: dict[tuple[str, ...], list[str]] = {}
    for gpus, tokens, (system, kind, hardware, limit, source) in sorted(rows, key=lambda r: r[:2]):
        if gpus in shared:
            row = [system, kind, f"{gpus} x {hardware}", tokens_text(tokens), limit, source]
            seen.setdefault(tuple(row[:5]), row)
    return Grid(["system", "kind", "hardware", "tokens", "limit", "source"], list(seen.values()))


def _claims_block(references: Sequence[Results]) -> str:
    """Published lengths, times and readings beside the predictions of committed records."""
    found = evidence(references)
    if not found:
        return ""
    others = [e for e in found if e.quantity != "longest_tokens"]
    rest = claim_grid(others)
    return "\n\n".join(
        [
            claim_summary(found),
            length_grid(found).markdown(),
            "Times, ratios and memory readings, modelled on top of the bytes that PyTorch's allocator holds on a phantom device (`allocated_bytes` is what it handed out, and no model):",
            Grid(
                ["claim", "verdict", *rest.headings[1:4]],
                [[row[0], row[5], *row[1:4]] for row in rest.rows],
            ).markdown(),
            f"What was looked at where a prediction is more than {TOLERANCE:.0%} off:",
            miss_grid(found).markdown(),
        ]
    )


def headline_grid_note() -> str:
    """What the columns of `headline_grid` mean."""
    return (
        "Peak: live tensors on the compute device of one rank, largest over ranks. "
        "Step: slowest rank, median over steps. "
        f"To {OURS}: the method's value over {OURS}'s. "
        "Gradients: every parameter's against the stock model run whole in fp64."
    )


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """`text` with what is between each pair of markers replaced.

    Raises `ValueError` where a block has no markers.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if not re.search(f"{begin}.*{end}", text, re.DOTALL):
            raise ValueError(f"{paths.README}: no '{begin}' followed by '{end}'")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text
