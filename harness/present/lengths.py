"""The longest sequences of Llama-8B: published ones, and predictions for our own methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from alst_impl.config import Frozen
from alst_impl.layout import AXES
from alst_impl.methods.base import load_method
from harness.cells.cell import Cell
from harness.cells.units import bytes_text, options_text
from harness.records.published import records
from harness.records.record import Measurement
from harness.records.table import Results

MODEL = "llama3.1-8b"
"""Published lengths are of models with its shapes."""

HARDWARE = "h100-80gb"
"""Lengths of cards with less memory stand in their own experiments."""

METHODS = ("alst", "chunked", "layerwise")
"""Methods of this project whose lengths stand beside published ones."""


class Length(Frozen):
    """The longest sequence of one system on one machine."""

    system: str
    """As its authors call it, or a method of ours with its options."""
    method: str | None
    """Of ours; None where the length is published."""
    options: tuple[str, ...] = ()
    num_gpus: int
    hardware: str
    host_bytes: int | None = None
    """Memory of a node, where the prediction has a limit there."""
    tokens: int
    limit: str = ""
    """What stops a longer sequence."""
    is_exact: bool = True
    """Whether gradients are exact within the type of the run."""
    source: str
    """Document, or experiment."""
    record: Path | None = None
    """Of a prediction."""

    @property
    def is_published(self) -> bool:
        """Whether its authors published it."""
        return self.method is None

    @property
    def host(self) -> str:
        """Memory of a node in words."""
        return bytes_text(self.host_bytes) if self.host_bytes else ""


def published() -> list[Length]:
    """Of other systems and of ALST, as their authors give them."""
    return [
        Length(
            system=r.system,
            method=None,
            num_gpus=r.num_gpus,
            hardware=r.hardware,
            tokens=r.tokens,
            source=r.source,
        )
        for r in records()
    ]


def predicted(all_results: Iterable[Results]) -> list[Length]:
    """Of our methods on phantom devices; the same length in a second experiment is left out."""
    found: dict[Length, Length] = {}
    for results in all_results:
        for each in _of(results):
            found.setdefault(each.model_copy(update={"source": "", "record": None}), each)
    return list(found.values())


def together(all_results: Iterable[Results]) -> Results:
    """The cells of all experiments that look for a length of our methods, and their records."""
    cells: dict[str, Cell] = {}
    measurements: dict[str, Measurement] = {}
    names = []
    for results in all_results:
        found = {key: cell for key, cell in results.cells.items() if _looks_for_a_length(cell)}
        cells |= found
        measurements |= {
            key: results.measurements[key] for key in found if key in results.measurements
        }
        names += [results.name] * bool(found)
    question = "How long a sequence do our methods hold beside published systems?"
    return Results(", ".join(names), question, "", ["longest_sequences"], cells, measurements)


def _of(results: Results) -> Iterator[Length]:
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        search = m.simulated.search if m and m.simulated else None
        if search is None or not search.longest_tokens or not _looks_for_a_length(cell):
            continue
        assert cell.simulation is not None
        method = cell.train.method
        options = options_text({k: v for k, v in method.options.items() if k not in AXES})
        yield Length(
            system=", ".join([method.name, *options]),
            method=method.name,
            options=tuple(options),
            num_gpus=cell.train.world_size,
            hardware=f"simulated {cell.hardware.upper()}",
            host_bytes=cell.simulation.host_memory_bytes,
            tokens=search.longest_tokens,
            limit=search.limit,
            is_exact=load_method(method).precision(cell.train) == cell.train.dtype,
            source=results.name,
            record=results.files.get(key),
        )


def _looks_for_a_length(cell: Cell) -> bool:
    """Whether it searches with one of `METHODS` on `MODEL` without a margin, trains every weight on `HARDWARE`, and is no
    ablation, which turns a part off.
    """
    if not cell.traits.forecast or cell.simulation is None or cell.simulation.margin:
        return False
    ours = cell.train.model == MODEL and cell.train.method.name in METHODS
    ours = ours and cell.train.lora is None and cell.hardware == HARDWARE
    whole = not any(value is False for value in cell.train.method.options.values())
    return cell.simulation.search and ours and whole


def beside_published(all_results: Sequence[Results]) -> list[Length]:
    """Published and predicted lengths on the numbers of GPUs that have a published one, shortest first."""
    known = published()
    sizes = {each.num_gpus for each in known}
    ours = [each for each in predicted(all_results) if each.num_gpus in sizes]
    return sorted([*known, *ours], key=lambda each: (each.num_gpus, each.tokens))


def shortened(lengths: Sequence[Length]) -> list[Length]:
    """Published lengths and, by method of ours and number of GPUs, the plain one and the longest exact one."""
    ours = [each for each in lengths if not each.is_published and each.is_exact]
    kept = [each for sizes in plain(lengths).values() for each in sizes.values()]
    longest = {(each.method, each.num_gpus): each for each in sorted(ours, key=lambda e: e.tokens)}
    return [e for e in lengths if e.is_published or e in kept or e in longest.values()]


def plain(lengths: Iterable[Length]) -> dict[str, dict[int, Length]]:
    """By method of ours and number of GPUs: the length without options, on the node with the least memory."""
    found: dict[str, dict[int, Length]] = {method: {} for method in METHODS}
    for each in sorted(lengths, key=lambda each: (each.num_gpus, -(each.host_bytes or 0))):
        if each.method is not None and not each.options:
            found[each.method][each.num_gpus] = each
    return found
