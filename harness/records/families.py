"""Which model types each method trains exactly: a committed table, one line per model, method and dtype."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from alst_impl.config import Frozen
from harness.cells import paths
from harness.cells.grid import Row
from harness.records.record import Measurement, Outcome

PATH = paths.REFERENCE / "cpu" / "families.csv"
"""The committed table."""


class Family(Frozen):
    """How one tiny model trained with one method in one dtype."""

    model: str
    """Model type of transformers."""
    method: str
    dtype: str
    outcome: Outcome
    detail: str
    """Why it was refused or failed, or its largest error."""
    exceptions: str = ""
    """Why it passed although gradients differ from the truth by more than the tolerance; empty if none does."""
    transformers: str
    """Version; empty if the settings were refused before anything ran."""
    torch: str
    commit: str


def family(
    row: Row, measurement: Measurement | None, outcome_line: str = "", exceptions: str = ""
) -> Family:
    """The line of a row that was run, with what the gate says of it, or that was refused before."""
    levels = {name: row.levels[name] for name in ("model", "method", "dtype")}
    if measurement is None:
        assert row.refused is not None, "it was run"
        nowhere = {"transformers": "", "torch": "", "commit": ""}
        return Family(**levels, outcome=Outcome.REFUSED, detail=_line(row.refused), **nowhere)
    refused = measurement.outcome is Outcome.REFUSED
    made = measurement.provenance
    return Family(
        **levels,
        outcome=measurement.outcome,
        detail=_line((refused and measurement.detail) or outcome_line),
        exceptions=_line(exceptions),
        transformers=made.versions["transformers"],
        torch=made.versions["torch"],
        commit=made.commit or "",
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def text_of(families: Iterable[Family]) -> str:
    """The CSV text of the table."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(Family.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(each.model_dump(mode="json") for each in families)
    return stream.getvalue()


def committed() -> list[Family]:
    """The committed table; empty if there is none."""
    if not PATH.is_file():
        return []
    with PATH.open(newline="") as file:
        return [Family.model_validate(line) for line in csv.DictReader(file)]
