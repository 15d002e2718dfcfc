"""Records to a tidy table: one row per cell and metric, each with its unit. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from alst_impl.layout import AXES, sizes
from alst_impl.methods.base import layouts
from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.experiment import Claim, Experiment, load_experiment
from harness.cells.grid import Row
from harness.cells.units import length_text
from harness.records import record
from harness.records.metrics import METRICS
from harness.records.record import Measurement, Provenance

NOT_MEASURED, NOT_SIMULATED = "not measured", "not simulated"
"""Outcome of a measured or a predicted cell that has no record."""

NOT_COMPARED = "not compared"
"""Gate of a record without a gradient comparison."""

WHERE = ["model", "world_size", *AXES, "seqlen"]
"""Columns that place a cell; all other differences between cells are in `series`."""


SAME = ["model", "world_size", "seqlen", "setting"]
"""Columns that two cells must share for their methods to be compared."""


@dataclass(frozen=True)
class Results:
    """The cells of one experiment and their records."""

    name: str
    question: str
    source: str
    figures: list[str]
    """Names of figures to draw."""
    cells: dict[str, Cell]
    """All cells by key."""
    measurements: dict[str, Measurement]
    """By key; a cell that is missing here was not measured."""
    claims: list[tuple[str, Claim]] = field(default_factory=list)
    """Keys of cells, each with a published number that it reproduces."""
    refused: list[Row] = field(default_factory=list)
    """Rows of a matrix that are refused, with the reasons."""
    files: dict[str, Path] = field(default_factory=dict)
    """The files of the records, by key."""

    def provenances(self) -> list[Provenance]:
        """The provenance of every record, oldest first."""
        return sorted((m.provenance for m in self.measurements.values()), key=lambda p: p.utc)


def measured_part(results: Results) -> Results:
    """`results` without forecasts if it has measured cells: only those have steps, gates and peers."""
    cells = {key: cell for key, cell in results.cells.items() if not cell.traits.forecast}
    if not cells or len(cells) == len(results.cells):
        return results
    measurements = {key: m for key, m in results.measurements.items() if key in cells}
    return replace(results, cells=cells, measurements=measurements)


def fresh(path: Path, folder: Path | None = None) -> Results:
    """Results of the experiment in `path` with the records in `folder`, by default those of the last runs.

    Raises `ValueError` for a malformed experiment or record.
    """
    e = load_experiment(path)
    folder = folder or paths.cells(e.name)
    cells = e.cells()
    return _results(e, cells, _present(dict.fromkeys(cells, folder)), e.claims())


def committed(path: Path) -> list[tuple[Path, Results]]:
    """Committed results of the experiment in `path`, each with its folder in `results/reference/`.

    Measured results come one per hardware. Their cells are those of the records, in the order of the
    experiment: a reference stands for the code and the sweep of its day. Forecasts for all hardware come as
    one, with the cells of the experiment, recorded or not, and the folder of the hardware that has most records.
    Raises `ValueError` for a folder without records.
    """
    e = load_experiment(path)
    cells = e.cells()
    if not all(cell.traits.forecast for cell in cells.values()):
        folders = sorted(paths.REFERENCE.glob(f"*/{e.name}/"))
        return [(folder, _reference(e, folder)) for folder in folders]
    folders_of = {key: paths.REFERENCE / cell.hardware / e.name for key, cell in cells.items()}
    files = _present(folders_of)
    (most, _), *_ = Counter(folders_of[key] for key in files or cells).most_common()
    return [(most, _results(e, cells, files, e.claims()))]


def _present(folders: dict[str, Path]) -> dict[str, Path]:
    """By key: the record of a cell in its folder, where there is one."""
    files = {key: folder / f"{key}.json" for key, folder in folders.items()}
    return {key: file for key, file in files.items() if file.is_file()}


def _reference(e: Experiment, folder: Path) -> Results:
    found = {file.stem: file for file in sorted(folder.glob("*.json"))}
    if not found:
        raise ValueError(f"{folder}: no records (*.json) in it; restore them, or remove the folder")
    files = {key: found[key] for key in dict.fromkeys([*e.cells(), *found]) if key in found}
    return _results(e, None, files, [(key, c) for key, c in e.claims() if key in files])


def _results(
    e: Experiment,
    cells: dict[str, Cell] | None,
    files: dict[str, Path],
    claims: list[tuple[str, Claim]],
) -> Results:
    """Results of the records in `files`; without `cells` those of the records."""
    measurements = {key: record.read(file) for key, file in files.items()}
    cells = {key: m.cell for key, m in measurements.items()} if cells is None else cells
    refused = [row for row in e.rows if row.refused is not None]
    return Results(
        e.name, e.question, e.source, e.figures, cells, measurements, claims, refused, files
    )


def gate_state(m: Measurement | None) -> str:
    """`passed` or `failed`, or `not compared` if the record has no gradient comparison."""
    if m is None or m.readings is None or m.readings.gate is None:
        return NOT_COMPARED
    return "passed" if m.readings.gate.passed else "failed"


def gates(results: Results, named: dict[str, str]) -> dict[str, str]:
    """`gate_state` of each cell. A cell without a comparison gets the state of its series.

    A sequence that is too long for the fp64 truth relies on comparisons of the same model, method and
    ranks at other lengths: `passed at 4,096`, or `failed at ...` if one of them failed.
    """
    kinds: dict[tuple[str, int, str], dict[str, str]] = {}
    for key, cell in results.cells.items():
        kind = (cell.train.model, cell.train.world_size, named[key])
        kinds.setdefault(kind, {})[key] = gate_state(results.measurements.get(key))
    return {key: _gate(results, key, states) for states in kinds.values() for key in states}


def _gate(results: Results, key: str, states: dict[str, str]) -> str:
    if states[key] != NOT_COMPARED or key not in results.measurements:
        return states[key]
    for state in ("failed", "passed"):
        lengths = [results.cells[k].train.seqlen for k, s in states.items() if s == state]
        if lengths:
            return f"{state} at {length_text(max(lengths))}"
    return _gate_at_small_scale(results, results.cells[key])


def _gate_at_small_scale(results: Results, cell: Cell) -> str:
    """State of a cell whose model is too large for the fp64 truth.

    It relies on a comparison of a small model with the same method, engine, kernels and hardware.
    """
    if not cell.traits.gpus:
        return NOT_COMPARED
    for state in ("failed", "passed"):
        for key, m in results.measurements.items():
            if _at_any_scale(results.cells[key]) == _at_any_scale(cell) and gate_state(m) == state:
                return f"{state} on {m.cell.train.model}"
    return NOT_COMPARED


def _at_any_scale(cell: Cell) -> str:
    """Equal for cells that run the same code on models and sequences of other sizes."""
    sized = {"model", "overrides", "seqlen"}
    return f"{cell.world} {cell.hardware} {cell.train.model_dump_json(exclude=sized)}"


def _options(cell: Cell) -> dict[str, Any]:
    """Fields that can differ between two cells of one method at the same place."""
    t = cell.train
    method = {k: v for k, v in t.method.options.items() if k not in AXES}
    engine = {f"{t.engine.name}.{k}": v for k, v in t.engine.options.items()}
    data = {f"data.{k}": v for k, v in t.data.model_dump(exclude={"source"}).items()}
    source = {f"source.{k}": v for k, v in t.data.source.options.items()}
    rest = {
        "engine": t.engine.name,
        "source": t.data.source.name,
        "dtype": t.dtype,
        "attention": str(t.attention),
    }
    more = {
        "batch": t.batch_size,
        "accumulation": t.accumulation,
        "checkpoint": t.checkpoint,
        "seed": t.seed,
        "world": cell.world,
    }
    if cell.simulation:
        more |= cell.simulation.model_dump(exclude={"search", "timeline"})
    return {**method, **engine, **data, **source, **t.overrides, **rest, **more}


def series(cells: dict[str, Cell]) -> dict[str, str]:
    """A name for each cell: its method and the options that vary among cells of that method."""
    by_method: dict[str, list[str]] = {}
    for key, cell in cells.items():
        by_method.setdefault(cell.train.method.name, []).append(key)
    named = {}
    for method, keys in by_method.items():
        options = {key: _options(cells[key]) for key in keys}
        fields = dict.fromkeys(field for values in options.values() for field in values)
        varying = [f for f in fields if len({repr(o.get(f)) for o in options.values()}) > 1]
        for key in keys:
            shown = [f"{f}={options[key][f]}" for f in varying if f in options[key]]
            named[key] = " ".join([method, *shown])
    return named


def series_in_order(results: Results) -> list[str]:
    """The names of `series`, in the order in which the experiment has their cells."""
    return list(dict.fromkeys(series(results.cells).values()))


def setting(cell: Cell) -> str:
    """Equal for cells that differ only in the method and in whether they are compared or timed."""
    no_setting = {"gate", "timed", "timeout_s", "train"}
    outer = cell.model_dump_json(exclude=no_setting)
    inner = cell.train.model_dump_json(exclude={"method"})
    return hashlib.sha256((outer + inner).encode()).hexdigest()[:8]


def _description(cell: Cell) -> dict[str, Any]:
    t = cell.train
    axes = sizes(layouts(t))
    return {
        "model": t.model,
        "method": t.method.name,
        "engine": t.engine.name,
        "world": cell.world,
        "hardware": cell.hardware,
        "world_size": t.world_size,
        **{axis: axes[axis] for axis in AXES},
        "seqlen": t.seqlen,
        "batch_size": t.batch_size,
        "accumulation": t.accumulation,
        "dtype": t.dtype,
        "attention": str(t.attention),
        "checkpoint": t.checkpoint,
        "setting": setting(cell),
    }


def outcome_of(cell: Cell, m: Measurement | None) -> str:
    """The outcome of `cell`, or that it has no record."""
    if m is not None:
        return m.outcome.value
    return NOT_SIMULATED if cell.traits.forecast else NOT_MEASURED


def counted_outcomes(results: Results) -> str:
    """The number of cells that were measured or simulated, and the number of each outcome."""
    kinds = {cell.traits.forecast for cell in results.cells.values()}
    done = " or ".join({False: "measured", True: "simulated"}[kind] for kind in sorted(kinds))
    outcomes = Counter(m.outcome.value for m in results.measurements.values())
    counted = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    progress = f"{len(results.measurements)} of {len(results.cells)} cells {done}"
    return f"{progress}: {counted}" if counted else progress


def tidy(results: Results) -> pd.DataFrame:
    """One row per cell and metric. A cell without a record has one row, without a metric."""
    named = series(results.cells)
    compared = gates(results, named)
    rows: list[dict[str, Any]] = []
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        about = {
            "experiment": results.name,
            "key": key,
            **_description(cell),
            "series": named[key],
            "outcome": outcome_of(cell, m),
            "detail": m.detail if m else None,
            "gate": compared[key],
            "commit": m.provenance.commit if m else None,
            "dirty": m.provenance.dirty if m else None,
        }
        if m is None:
            rows.append({**about, "metric": None, "unit": None, "value": None})
            continue
        for name, metric in METRICS.items():
            rows.append({**about, "metric": name, "unit": metric.unit, "value": metric.value(m)})
    return pd.DataFrame(rows).astype({"value": "float64"})


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per cell, a column per metric; NaN where a record has no such reading."""
    about = table.drop(columns=["metric", "unit", "value"]).drop_duplicates("key")
    measured = table.dropna(subset=["metric"])
    values = measured.pivot_table(index="key", columns="metric", values="value", aggfunc="first")
    values = values.reindex(columns=list(METRICS))
    return about.merge(values.reset_index(), on="key", how="left").sort_values(
        [*WHERE, "series"], ignore_index=True
    )


def repeated_duels(results: Results, peer: str) -> pd.DataFrame:
    """A row per length and series of each method beside `peer`: median, least and largest ratio over repetitions."""
    cells = wide(tidy(results))
    pairs = _pairs(cells[cells["method"] != peer], cells[cells["method"] == peer])
    pairs["time_ratio"] = pairs["time_ratio"].astype(float)
    by = pairs.groupby(["model", "seqlen", "series_ours"], sort=False)
    return by.agg(
        repetitions=("peak_ratio", "count"),
        peak=("peak_ratio", "median"),
        peak_low=("peak_ratio", "min"),
        peak_high=("peak_ratio", "max"),
        time=("time_ratio", "median"),
        time_low=("time_ratio", "min"),
        time_high=("time_ratio", "max"),
        gate=("gate_ours", "first"),
    ).reset_index()


def duels(cells: pd.DataFrame, ours: str, peer: str) -> pd.DataFrame:
    """Pairs of rows of a `wide` table: method `ours` and method `peer`, equal in the columns `SAME`.

    Columns have suffixes `_ours` and `_peer`. `peak_ratio` and `time_ratio` are ours divided by the peer's.
    Time is per token, so methods with different numbers of samples per step can be compared.
    """
    return _pairs(cells[cells["method"] == ours], cells[cells["method"] == peer])


def _pairs(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    pairs = left.merge(right, on=SAME, suffixes=("_ours", "_peer"))
    pairs["peak_ratio"] = pairs["peak_bytes_ours"] / pairs["peak_bytes_peer"]
    pairs["time_ratio"] = pairs["tokens_per_s_peer"] / pairs["tokens_per_s_ours"]
    return pairs


def units() -> dict[str, str]:
    """Unit of each metric."""
    return {name: metric.unit for name, metric in METRICS.items()}


def source_line(results: Results) -> str:
    """Experiment, commit, hardware and date of the records, for the foot of a figure."""
    provenances = results.provenances()
    if not provenances:
        return f"{results.name}: {_few(outcome_of(cell, None) for cell in results.cells.values())}"
    parts = [
        results.name,
        "commit " + _few(commit_name(p) for p in provenances),
        _few(machine_of(m) for m in results.measurements.values()),
        _few(p.utc[:10] for p in provenances),
    ]
    missing = [cell for key, cell in results.cells.items() if key not in results.measurements]
    if missing:
        words = _few(outcome_of(cell, None) for cell in missing)
        parts.append(f"{len(missing)} of {len(results.cells)} cells {words}")
    return " · ".join(parts)


def machine_of(m: Measurement) -> str:
    """The machine that ran the cell of a record; of a forecast the one that was simulated."""
    if m.cell.traits.forecast:
        return f"simulated {m.cell.hardware.upper()}"
    return f"{m.provenance.device}, {m.provenance.cores} cores"


def commit_name(p: Provenance) -> str:
    """Short commit, and a note if the tree had uncommitted changes."""
    return (p.commit or "none")[:9] + (" + uncommitted changes" if p.dirty else "")


def _few(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
