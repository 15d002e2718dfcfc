"""Under fire: how many wrong inputs are refused, faults survived and mutants noticed, and what strangers cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.present.grids.base import Grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records import fire, mutants
from harness.records.fire import Proof
from harness.records.mutants import Campaign, Count, Trial


def page(_: Committed) -> str:
    """A row per level of input, per fault, and per stranger."""
    levels = fire.inputs()
    inputs = [[name, level.about, str(len(level.cases))] for name, level in levels.items()]
    return render(
        "fire.md",
        total=_total(),
        inputs=Grid(["level", "what is wrong", "inputs"], inputs),
        faults=_grid("what happens", fire.faults()),
        strangers=_grid("what a stranger cannot do", fire.strangers()),
        mutants=_mutants(mutants.read()),
    )


def summary(_: Committed) -> list[tuple[str, str]]:
    """Counts of inputs, faults and mutants."""
    words = [f"{_total()} wrong inputs refused", f"{len(fire.faults())} faults survived"]
    if (campaign := mutants.read()) is not None:
        found = mutants.count(campaign.trials, mutants.judged())
        words.append(f"{_noticed(found)} of {found.made - found.equivalent} mutants noticed")
    return [("under fire", ", ".join(words))]


def _noticed(found: Count) -> int:
    return found.killed + found.timed_out


def _mutants(campaign: Campaign | None) -> dict[str, Any] | None:
    """What the page says of a campaign; None without one."""
    if campaign is None:
        return None
    table = mutants.judged()
    parts: dict[str, list[Trial]] = {}
    for trial in campaign.trials:
        parts.setdefault(str(Path(trial.mutant.module).parent), []).append(trial)
    counts = {part: mutants.count(trials, table) for part, trials in parts.items()}
    counts["all"] = mutants.count(campaign.trials, table)
    heads = [name.replace("_", " ") for name in Count.model_fields]
    rows = [[part, *(str(number) for _, number in found)] for part, found in counts.items()]
    same = [
        (trial.mutant, why)
        for trial in campaign.trials
        if trial.outcome == "survived" and (why := mutants.reason(trial.mutant, table))
    ]
    found = counts["all"]
    return {
        "campaign": campaign,
        "found": found,
        "noticed": _noticed(found),
        "modules": f"{len({trial.mutant.module for trial in campaign.trials})} of {len(table)}",
        "counts": Grid(["folder", *heads], rows),
        "same": same,
        "gaps": [trial.mutant for trial in mutants.gaps(campaign.trials, table)],
    }


def _total() -> int:
    return sum(len(level.cases) for level in fire.inputs().values())


def _grid(heading: str, proofs: dict[str, Proof]) -> Grid:
    rows = [
        [what, proof.after, ", ".join(f"`{test}`" for test in proof.tests)]
        for what, proof in proofs.items()
    ]
    return Grid([heading, "afterwards", "tests"], rows)
