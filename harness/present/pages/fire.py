"""Under fire: how many wrong inputs are refused, which faults a run survives, what strangers cannot do."""

from __future__ import annotations

from harness.present.grids.base import Grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records import fire
from harness.records.fire import Proof


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
    )


def summary(_: Committed) -> list[tuple[str, str]]:
    """Counts of the first two."""
    return [
        ("under fire", f"{_total()} wrong inputs refused, {len(fire.faults())} faults survived")
    ]


def _total() -> int:
    return sum(len(level.cases) for level in fire.inputs().values())


def _grid(heading: str, proofs: dict[str, Proof]) -> Grid:
    rows = [
        [what, proof.after, ", ".join(f"`{test}`" for test in proof.tests)]
        for what, proof in proofs.items()
    ]
    return Grid([heading, "afterwards", "tests"], rows)
