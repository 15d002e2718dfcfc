"""What pages share: the committed results that they show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.cells import paths
from harness.judge.claims import Evidence, evidence
from harness.judge.replays import evidence_of
from harness.present.kinds import is_compared, is_repeated, is_simulated, is_timed
from harness.records import families, replays
from harness.records.families import Family
from harness.records.replays import Replayed
from harness.records.table import Results, committed, measured_part


@dataclass(frozen=True)
class Kept:
    """Committed results of one experiment, and their folder."""

    folder: Path
    results: Results

    @property
    def is_committed(self) -> bool:
        """Whether the records are committed ones; otherwise those of the last run."""
        return self.folder.is_relative_to(paths.REFERENCE)

    @property
    def figure(self) -> str | None:
        """The figure that stands for the experiment; None where there is nothing to draw.

        Forecasts have no step times and repeated cells have several: their first figure stands for them.
        """
        r = self.results
        if is_compared(r) or not r.figures or not r.measurements:
            return None
        return r.figures[0] if is_simulated(r) or is_repeated(r) else "headline"

    @property
    def image(self) -> Path:
        """Where that figure lies."""
        return self.folder / "headline.png"

    @property
    def is_search_alone(self) -> bool:
        """Whether it looks for lengths and stands for no published number."""
        cells = self.results.cells.values()
        searches = any(cell.simulation and cell.simulation.search for cell in cells)
        return searches and not self.results.claims

    def shown(self) -> str:
        """Markdown of the figure for a page of `results/reference/`; empty where there is none."""
        if self.figure is None:
            return ""
        return f"![{self.results.question}]({self.image.relative_to(paths.REFERENCE)})"


@dataclass(frozen=True)
class Committed:
    """All committed results, in the order of the experiments' names."""

    kept: list[Kept]

    @cached_property
    def families(self) -> list[Family]:
        """How tiny models of every type trained with each method."""
        return families.committed()

    @cached_property
    def replays(self) -> list[Replayed]:
        """Plans of published global batches by every planner."""
        return replays.committed()

    @cached_property
    def recorded(self) -> list[Results]:
        """Results that have records."""
        return [k.results for k in self.kept if k.results.measurements]

    @cached_property
    def measured(self) -> list[tuple[Kept, Results]]:
        """Results with memory and step times, without the forecasts beside them."""
        return [(k, measured_part(k.results)) for k in self.kept if is_timed(k.results)]

    @cached_property
    def compared(self) -> list[Results]:
        """Results that only compare gradients."""
        return [k.results for k in self.kept if is_compared(k.results)]

    @cached_property
    def forecasts(self) -> list[Kept]:
        """Results of phantom devices and of schedules, with records or without."""
        return [k for k in self.kept if is_simulated(k.results)]

    @cached_property
    def claims(self) -> dict[str, list[Evidence]]:
        """By experiment: every published number that it stands for, with a record or without."""
        found = {k.results.name: evidence([k.results]) for k in self.forecasts}
        found["flexsp"] = evidence_of(self.replays)
        return {name: claims for name, claims in found.items() if claims}

    @property
    def evidence(self) -> list[Evidence]:
        """Every published number."""
        return [e for found in self.claims.values() for e in found]

    @property
    def on_gpus(self) -> int:
        """How many records are of a GPU."""
        return sum(m.cell.traits.gpus for r in self.recorded for m in r.measurements.values())


def load() -> Committed:
    """What `results/reference/` holds. Raises `ValueError` where it holds no record."""
    folders = sorted(paths.REFERENCE.glob("*/*/"))
    if not folders:
        raise ValueError(
            f"no records in {paths.REFERENCE}, which the README and the pages are made of; run `make`, "
            "then `alst reference NAME`"
        )
    known = {path.stem for path in paths.experiments()} | {folder.name for folder in folders}
    found = [each for name in sorted(known) for each in committed(paths.experiment(name))]
    return Committed([Kept(folder, results) for folder, results in found])


def load_with(fresh: Iterable[Results]) -> Committed:
    """What `results/reference/` holds, if anything, and `fresh` results in the place of those of the same experiments."""
    new = {results.name: Kept(paths.cells(results.name), results) for results in fresh}
    held = load().kept if any(paths.REFERENCE.glob("*/*/")) else []
    kept = [k for k in held if k.results.name not in new]
    return Committed(sorted([*kept, *new.values()], key=lambda k: k.results.name))
