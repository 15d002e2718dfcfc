"""Global batches of FlexSP's paper, planned again: a committed table, one line per model, context, planner and batch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from alst_impl.config import Frozen
from harness.cells import paths

PATH = paths.REFERENCE / "a100-40gb" / "flexsp.csv"
"""The committed table."""


class Replayed(Frozen):
    """A plan of one global batch, timed by the published cost model."""

    model: str
    context_k: int
    """Longest document, in thousands of tokens."""
    planner: str
    batch: int
    micro_batches: int
    seconds: float


def text_of(replayed: Iterable[Replayed]) -> str:
    """The CSV text of the table."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(Replayed.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(each.model_dump() for each in replayed)
    return stream.getvalue()


def committed() -> list[Replayed]:
    """The committed table; empty if there is none."""
    if not PATH.is_file():
        return []
    with PATH.open(newline="") as file:
        return [Replayed.model_validate(line) for line in csv.DictReader(file)]
