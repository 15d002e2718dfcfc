"""Documents of very different lengths: plans of FlexSP's global batches, beside its published times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median, stdev

from harness.cells.units import percent_text, ratio_text
from harness.judge import replays as judged
from harness.present.grids.base import MISSING, Grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records.published import rows
from harness.records.replays import Replayed

SYSTEMS = {planner: system for system, planner in judged.SYSTEMS.items()}
"""Planner -> published system that plans so."""
PLANNERS = ("megatron", "single", "best_fit", "static")
"""Those that are compared with `flexsp`."""


@dataclass(frozen=True)
class Mean:
    """A planner on all batches of one model and context. Times are of an iteration, in seconds."""

    planner: str
    seconds: float
    flexsp: float
    published: float | None
    """Read off a figure."""
    published_flexsp: float | None

    @property
    def ratio(self) -> float:
        """Time over that of `flexsp`."""
        return self.seconds / self.flexsp

    @property
    def published_ratio(self) -> float | None:
        """The same of published times; None without them."""
        if self.published is None or self.published_flexsp is None:
            return None
        return self.published / self.published_flexsp


Cases = dict[tuple[str, int], dict[str, Mean]]
"""Model and context in thousands of tokens -> planner -> mean."""


def by_case(replayed: Iterable[Replayed]) -> Cases:
    """The means of all planners."""
    seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
    for each in replayed:
        of_case = seconds.setdefault((each.model, each.context_k), {})
        of_case.setdefault(each.planner, []).append(each.seconds)
    published = {
        (row["model"], int(row["max_context_k_tokens"]), row["system"]): float(
            row["avg_iteration_time_s"]
        )
        for row in rows(judged.TABLE)
        if row["dataset"] == judged.DATASET
    }
    return {
        case: {
            planner: Mean(
                planner=planner,
                seconds=fmean(own),
                flexsp=fmean(by_planner["flexsp"]),
                published=published.get((*case, SYSTEMS.get(planner, ""))),
                published_flexsp=published.get((*case, SYSTEMS["flexsp"])),
            )
            for planner, own in by_planner.items()
        }
        for case, by_planner in seconds.items()
    }


def page(c: Committed) -> str:
    """Ratios and times by planner, published and ours."""
    cases = by_case(c.replays)
    errors = [
        abs(each.seconds / each.published - 1)
        for case in cases.values()
        for each in case.values()
        if each.published is not None
    ]
    return render(
        "planners.md",
        batches=len({each.batch for each in c.replays}),
        published=len(rows(judged.TABLE)),
        predicted=len(errors),
        median=f"{median(errors):.0%}" if errors else MISSING,
        worst=f"{max(errors):.0%}" if errors else MISSING,
        uncertainty=_uncertainty(c.replays),
        ratios=ratios(cases),
        times=times(cases),
    )


def _uncertainty(replayed: Iterable[Replayed]) -> str:
    """The largest standard error of a mean time of `flexsp`, relative to it."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for each in replayed:
        if each.planner == "flexsp":
            seconds.setdefault((each.model, each.context_k), []).append(each.seconds)
    errors = [stdev(own) / len(own) ** 0.5 / fmean(own) for own in seconds.values()]
    return f"{max(errors):.0%}" if errors else MISSING


def ratios(cases: Cases) -> Grid:
    """Times over those of `flexsp`, a row per model and context, with the published ratio in brackets."""

    def text(each: Mean) -> str:
        published = each.published_ratio
        return ratio_text(each.ratio) + (f" ({ratio_text(published)})" if published else "")

    return Grid(
        ["model", "longest document", *PLANNERS],
        [
            [model, f"{context_k}K", *(text(case[planner]) for planner in PLANNERS)]
            for (model, context_k), case in cases.items()
        ],
    )


def times(cases: Cases) -> Grid:
    """Seconds of an iteration, a row per published time that is predicted."""
    return Grid(
        ["model", "longest document", "system", "planner", "published [s]", "ours [s]", "error"],
        [
            [
                model,
                f"{context_k}K",
                SYSTEMS[each.planner],
                each.planner,
                f"{each.published:.1f}",
                f"{each.seconds:.1f}",
                percent_text(each.seconds / each.published - 1),
            ]
            for (model, context_k), case in cases.items()
            for each in case.values()
            if each.published is not None
        ],
    )


def summary(_: Committed) -> list[tuple[str, str]]:
    """Nothing: the README has no room for it."""
    return []
