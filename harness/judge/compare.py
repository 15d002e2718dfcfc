"""Changes between two sets of records of the same cells, and the tensors that grew. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from alst_impl.config import Frozen
from harness.cells.prediction import Holding, Simulated
from harness.cells.units import bytes_text
from harness.records import record
from harness.records.metrics import value_of
from harness.records.record import Measurement

BYTES_PER_TOKEN = 0.5
"""A slope that changes by less counts as equal: a test notices one byte per token."""
PEAK_BYTES = 16_384
"""A predicted peak that changes by less counts as equal: a tensor of one number takes 512 bytes."""
MEASURED_PEAK = 0.01
"""A measured peak whose relative change is smaller counts as equal."""
CULPRITS = 3
"""Source lines named for each change."""


class Change(Frozen):
    """A change of one quantity of one cell."""

    key: str
    label: str
    """Readable name of the cell."""
    quantity: str
    before: float | str
    after: float | str
    worse: bool
    culprits: list[str]
    """Tensors that grew at the peak: bytes, operator and source line, largest first."""

    def __str__(self) -> str:
        direction = "worse" if self.worse else "better"
        grown = f"; grew: {', '.join(self.culprits)}" if self.culprits else ""
        return f"{self.label}: {self.quantity} {_text(self.before)} -> {_text(self.after)} ({direction}){grown}"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}"


def load(folder: Path) -> dict[str, Measurement]:
    """Every record below `folder` by key. Raises `ValueError` if there is none, or if a file is not a record."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of records")
    records = {file.stem: record.read(file) for file in sorted(folder.rglob("*.json"))}
    if not records:
        raise ValueError(f"{folder}: no records (*.json) in it")
    return records


def changes(before: dict[str, Measurement], after: dict[str, Measurement]) -> list[Change]:
    """Changes of the cells that both sets have."""
    shared = [key for key in before if key in after]
    return [change for key in shared for change in _of_cell(key, before[key], after[key])]


def _of_cell(key: str, before: Measurement, after: Measurement) -> Iterator[Change]:
    label = after.cell.label
    if before.outcome != after.outcome:
        yield Change(
            key=key,
            label=label,
            quantity="outcome",
            before=before.outcome.value,
            after=after.outcome.value,
            worse=after.outcome is not record.Outcome.OK,
            culprits=[],
        )
    if before.simulated and after.simulated:
        yield from _of_simulation(key, label, before.simulated, after.simulated)
    elif before.outcome == after.outcome:
        old, new = value_of("peak_bytes", before), value_of("peak_bytes", after)
        if old and new and abs(new / old - 1) > MEASURED_PEAK:
            yield Change(
                key=key,
                label=label,
                quantity="peak_bytes",
                before=old,
                after=new,
                worse=new > old,
                culprits=[],
            )


def _of_simulation(key: str, label: str, before: Simulated, after: Simulated) -> Iterator[Change]:
    culprits = grown(before.holdings, after.holdings)

    def change(quantity: str, old: float, new: float, *, worse: bool) -> Change:
        named = culprits if worse else []
        return Change(
            key=key,
            label=label,
            quantity=quantity,
            before=old,
            after=new,
            worse=worse,
            culprits=named,
        )

    if abs(after.peak_bytes - before.peak_bytes) > PEAK_BYTES:
        worse = after.peak_bytes > before.peak_bytes
        yield change("peak_bytes", before.peak_bytes, after.peak_bytes, worse=worse)
    old, new = _slope(before), _slope(after)
    if old is not None and new is not None and abs(new - old) > BYTES_PER_TOKEN:
        yield change("bytes_per_local_token", old, new, worse=new > old)
    if before.search and after.search:
        was, now = before.search, after.search
        shorter = now.shortest_failing_tokens <= was.longest_tokens
        longer = was.shortest_failing_tokens <= now.longest_tokens
        # The longest length is known only to its bracket: brackets that overlap count as equal.
        if shorter or longer:
            yield change("longest_tokens", was.longest_tokens, now.longest_tokens, worse=shorter)


def _slope(simulated: Simulated) -> float | None:
    return simulated.prediction.bytes_per_local_token if simulated.prediction else None


def grown(before: Sequence[Holding], after: Sequence[Holding]) -> list[str]:
    """Operators and files that hold more at the peak, each with the line that grew most."""
    old, new = _by_file(before), _by_file(after)
    more = {place: sum(new[place].values()) - sum(old.get(place, {}).values()) for place in new}
    worst = sorted((place for place in more if more[place] > 0), key=lambda p: -more[p])
    named = []
    for place in worst[:CULPRITS]:
        lines = new[place]
        line = max(lines, key=lambda at: lines[at] - old.get(place, {}).get(at, 0))
        named.append(f"+{bytes_text(more[place])} {place[1]} at {line}")
    return named


def _by_file(holdings: Sequence[Holding]) -> dict[tuple[str, str, str], dict[str, int]]:
    """(category, operator, file) -> line -> bytes. Edits move lines, so places are matched by file."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for h in holdings:
        at = h.location or "an unknown line"
        lines = found.setdefault((h.category, h.operator, at.partition(":")[0]), {})
        lines[at] = lines.get(at, 0) + h.nbytes
    return found
