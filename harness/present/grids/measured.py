"""Tables of what real devices measured: every cell, and methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from harness.cells.units import length_text, metric_text
from harness.judge.claims import OURS
from harness.present.figures.headline import longest_series, where
from harness.present.grids.base import MISSING, Grid, ratio_or_missing, rows_of
from harness.records.table import (
    NOT_MEASURED,
    Results,
    duels,
    repeated_duels,
    series_in_order,
    tidy,
    units,
    wide,
)

SHOWN = {
    "step_s": "step",
    "tokens_per_s": "tokens/s",
    "peak_bytes": "peak per rank",
    "host_peak_bytes": "host peak",
    "rss_bytes": "RSS",
    "loss": "last loss",
    "gate_ratio_error": "worst |ratio - 1|",
    "gate_cosine_error": "worst 1 - cosine",
}
"""Metrics of `cell_grid` and their headings."""


def cell_grid(results: Results) -> Grid:
    """A row per cell with its readings; a cell that was not measured has a row that says so."""
    unit = units()
    rows, files = [], []
    for row in rows_of(wide(tidy(results))):
        files.append(results.files.get(row["key"]))
        values = [metric_text(row[metric], unit[metric]) for metric in SHOWN]
        place = [str(row["world_size"]), str(row["sp"]), length_text(row["seqlen"])]
        rows.append(
            [f"{row['model']} {row['series']}", *place, row["outcome"], row["gate"], *values]
        )
    headings = ["cell", "ranks", "sp", "length", "outcome", "gradients", *SHOWN.values()]
    return Grid(headings, rows, files)


def headline_grid(results: Results) -> Grid:
    """The longest series of an experiment: a row per length and method, beside `alst`."""
    cells = longest_series(wide(tidy(results)))
    order = series_in_order(results)
    rows = []
    for _, group in cells.groupby("seqlen"):
        by_series = {row["series"]: row for row in rows_of(group)}
        rows += [_headline_row(by_series[s], by_series.get(OURS)) for s in order if s in by_series]
    return Grid(["length", "method", "peak", f"to {OURS}", "step", f"to {OURS}", "gradients"], rows)


def _headline_row(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    copies = f" ({row['dp']} samples)" if row["dp"] > 1 else ""
    state = row["gate"] if row["outcome"] in ("ok", "wrong_gradient") else row["outcome"]
    return [
        length_text(row["seqlen"]),
        row["series"] + copies,
        metric_text(row["peak_bytes"], "B"),
        _to_ours(row, ours, "peak_bytes"),
        metric_text(row["step_s"], "s"),
        _to_ours(row, ours, "step_s"),
        state,
    ]


def _to_ours(row: dict[str, Any], ours: dict[str, Any] | None, metric: str) -> str:
    return MISSING if ours is None or ours is row else ratio_or_missing(row[metric] / ours[metric])


def headline_title(results: Results) -> str:
    """Model, ranks, hardware, engine and type of the cells in `headline_grid`."""
    cells = longest_series(wide(tidy(results)))
    return f"{where(cells)}, {cells['engine'].iloc[0]}, {cells['dtype'].iloc[0]}"


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
    """`lower`, `higher` or `equal`: the peak of `alst` against that of the other method."""
    ratio = pair["peak_ratio"]
    if math.isnan(ratio):
        return NOT_MEASURED
    return "lower" if ratio < 1 else "higher" if ratio > 1 else "equal"


def others(results: Results) -> list[str]:
    """The methods beside `alst`, in the order of the experiment."""
    methods = dict.fromkeys(cell.train.method.name for cell in results.cells.values())
    return [method for method in methods if method != OURS]


def verdict_grid(results: Results) -> Grid:
    """A row per pair of cells that differ in the method only: `alst` beside another method."""
    cells = wide(tidy(results))
    rows = [
        [
            f"{pair['model']}, {pair['series_ours']} : {pair['series_peer']}",
            str(pair["world_size"]),
            length_text(pair["seqlen"]),
            ratio_or_missing(pair["peak_ratio"]),
            memory_verdict(pair),
            ratio_or_missing(pair["time_ratio"]),
            time_verdict(pair),
            f"{pair['gate_ours']} / {pair['gate_peer']}",
        ]
        for peer in others(results)
        for pair in rows_of(duels(cells, OURS, peer))
    ]
    headings = [
        f"{OURS} : other",
        "ranks",
        "length",
        "peak ratio",
        "peak",
        "time per token ratio",
        "time",
        f"gradients {OURS} / other",
    ]
    return Grid(headings, rows)


class Standing(NamedTuple):
    """`alst` beside one other method, over all pairs of cells that differ in the method only."""

    peer: str
    compared: int
    """Pairs of which both have right gradients."""
    left_out: int
    """Pairs with a wrong gradient, or one that was not compared."""
    lower: int
    """Pairs in which the peak of `alst` is lower."""
    peak: float
    """Median ratio of the peaks."""
    timed: int
    slower: int
    """Timed pairs in which `alst` is slower beyond the spread of the steps."""
    time: float
    """Median ratio of the times per token."""


def standings(all_results: Sequence[Results]) -> list[Standing]:
    """`alst` beside each other method of these experiments; a method without a fair pair is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for results in all_results:
        cells = wide(tidy(results))
        for peer in others(results):
            found.setdefault(peer, []).extend(rows_of(duels(cells, OURS, peer)))
    return [each for peer, pairs in found.items() if (each := _standing(peer, pairs)).compared]


def _standing(peer: str, pairs: list[dict[str, Any]]) -> Standing:
    read = [pair for pair in pairs if not math.isnan(pair["peak_ratio"])]
    fair = [pair for pair in read if _both_right(pair)]
    timed = [pair for pair in fair if not math.isnan(pair["time_ratio"])]
    return Standing(
        peer=peer,
        compared=len(fair),
        left_out=len(read) - len(fair),
        lower=sum(memory_verdict(pair) == "lower" for pair in fair),
        peak=float(pd.Series([pair["peak_ratio"] for pair in fair], dtype=float).median()),
        timed=len(timed),
        slower=sum(time_verdict(pair) == "slower" for pair in timed),
        time=float(pd.Series([pair["time_ratio"] for pair in timed], dtype=float).median()),
    )


def _both_right(pair: dict[str, Any]) -> bool:
    return all(pair[side].startswith("passed") for side in ("gate_ours", "gate_peer"))


def summary(results: Results) -> str:
    """How often `alst` has a lower peak or a longer step, in a sentence per other method."""
    sentences = []
    for each in standings([results]):
        sentences.append(
            f"Against {each.peer}: peak lower in {each.lower} of {each.compared} comparisons "
            f"(median ratio {ratio_or_missing(each.peak)}), step slower beyond the spread in "
            f"{each.slower} of {each.timed} (median ratio of time per token {ratio_or_missing(each.time)})."
        )
        if each.left_out:
            sentences.append(f"Not counted: {each.left_out} with gradients wrong or not compared.")
    return " ".join(sentences)


def ratio_grid(results: Results) -> Grid:
    """Methods beside `alst` of the same repetition: median ratios, with the least and the largest."""
    rows = []
    for row in rows_of(repeated_duels(results, OURS)):
        peak, time = (
            [ratio_or_missing(row[name]) for name in (q, f"{q}_low", f"{q}_high")]
            for q in ("peak", "time")
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
