"""FlexSP's published times and speed-ups beside its batches planned again. A function of the replay; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean

from harness.cells.experiment import Quantity
from harness.judge.claims import UNITS, Evidence, judge
from harness.records.published import look_up, rows
from harness.records.replays import Replayed

TABLE = "flexsp_end_to_end"
SYSTEMS = {
    "FlexSP": "flexsp",
    "FlexSP-BatchAda": "best_fit",
    "DeepSpeed-Ulysses ZeRO-3": "static",
}
"""Published system -> planner that plans so."""
DATASET = "Wikipedia"
"""The dataset whose lengths are at hand."""
SPEEDUP = "printed_speedup_vs_deepspeed"
RULED_OUT: dict[Quantity, str] = {
    "step_seconds": "not our planner: a static degree, which leaves little to plan, is as much too fast under the authors' "
    "cost model, which knows the micro-batches and nothing else of an iteration",
    "speedup": "not the documents: 22 of a million are longer than 192K, yet published times are up to a fifth longer at 384K",
}
"""What was looked at where a number misses."""

Case = tuple[str, str, str]
"""Model, context in thousands of tokens, planner."""


def evidence_of(replayed: Iterable[Replayed]) -> list[Evidence]:
    """Every published time of an iteration and every printed speed-up over DeepSpeed; none without a replay.

    Numbers of datasets and systems that are not replayed have no evidence.
    """
    seconds: dict[Case, list[float]] = {}
    for each in replayed:
        key = each.model, str(each.context_k), each.planner
        seconds.setdefault(key, []).append(each.seconds)
    means = {key: fmean(found) for key, found in seconds.items()}
    return [e for row in rows(TABLE) for e in _of_row(row, means)] if means else []


def _of_row(row: dict[str, str], means: dict[Case, float]) -> Iterator[Evidence]:
    planner = SYSTEMS.get(row["system"]) if row["dataset"] == DATASET else None
    model, context = row["model"], row["max_context_k_tokens"]
    own, static = (means.get((model, context, name or "")) for name in (planner, "static"))
    yield _evidence(row, "step_seconds", "avg_iteration_time_s", own)
    if row[SPEEDUP]:
        ratio = static / own if static is not None and own is not None else None
        yield _evidence(row, "speedup", SPEEDUP, ratio)


def _evidence(row: dict[str, str], quantity: Quantity, column: str, ours: float | None) -> Evidence:
    names = ("model", "max_context_k_tokens", "dataset", "system")
    place = {name: row[name] for name in names}
    number = look_up(TABLE, place, column)
    model, context, dataset, system = place.values()
    return Evidence(
        id=f"flexsp-{model}-{context}K-{dataset}-{system.split()[0]}-{quantity}",
        source=number.source,
        published=number.value,
        unit=UNITS[quantity],
        predicted=ours,
        measured=None,
        error=None if ours is None else ours / number.value - 1,
        used_for_fit=False,
        verdict=judge(quantity, number.value, ours),
        outcome=None,
        key="",
        method=SYSTEMS.get(system, ""),
        place=f"{TABLE} {sorted(place.items())} {column}",
        quantity=quantity,
        limit=None,
        ruled_out=RULED_OUT[quantity],
    )
