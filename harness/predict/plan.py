"""Plans the settings of a run: the fastest that fit, the fewest GPUs, the longest sequence.

A setting is a method with its options, degrees, and where the training states live. Every candidate is
estimated from a step of few layers on a phantom device. What is shown then runs with all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alst_impl.config import TrainConfig
from alst_impl.methods.base import divisors, layouts, step_samples
from alst_impl.models import described, field
from harness.cells.cell import Cell, check_kernel, host_memory_bytes, make_cell
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Plan, Planned, Prediction
from harness.cells.units import length_text
from harness.formulas.rates import architecture
from harness.predict.attempts import (
    GIB,
    TooLarge,
    at_length,
    capacity_bytes,
    sequence_parallel,
)
from harness.predict.depth import structure
from harness.predict.fits import confirmed, estimate
from harness.predict.longest import crossing
from harness.predict.stretch import Use
from harness.processes.apart import apart
from harness.processes.jobs import Rank

GPUS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried if none is given."""
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "baseline": ({},),
    "alst": (
        {"tile_mlp": False, "tile_norm": False, "tile_loss": False, "offload": False},
        {"offload": False},
        {},
    ),
    "ring": ({"offload": False}, {}),
    "usp": ({"offload": False}, {}),
    "layerwise": ({"keep_attention": True}, {}, {"stream": True}),
    "chunked": ({}, {"chunk": 8_192}),
}
"""Methods that a plan chooses from, each with sets of options: a ladder on which every rung takes less memory of
the GPU and no less time.
"""
DEGREES = {
    "alst": ("sp",),
    "ring": ("cp",),
    "usp": ("sp", "cp"),
    "layerwise": ("sp",),
    "chunked": ("sp",),
    "baseline": (),
}
"""Degrees that each of them has."""


ENOUGH = 131_072
"""Tokens of a rank from which a smaller degree is no faster: exchanges take about a hundredth of the time."""


@dataclass(frozen=True)
class Variant:
    """A method with its options and the engine that holds the training states. Its degrees are left open."""

    method: str
    options: dict[str, Any]
    engine: dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A cell that is tried, and what came of it."""

    cell: Cell
    prediction: Prediction
    use: Use
    longest_tokens: int = 0

    @property
    def speed(self) -> float:
        """Tokens per second per GPU; 0 if the time is unknown."""
        return tokens_per_second_per_gpu(self.cell.train, self.prediction) or 0.0


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """`make_plan` for `payload`, as plain data."""
    cell = Cell(**payload["cell"])
    plan = make_plan(rank, cell, payload["gpus"], payload["methods"], payload["engines"])
    return plan.model_dump(mode="json")


def make_plan(
    rank: Rank,
    cell: Cell,
    gpus: int | None,
    methods: Sequence[str] | None,
    engines: Sequence[dict[str, Any]],
) -> Plan:
    """Settings with which the length of `cell` fits on `gpus` devices, or else on the fewest.

    All of `methods` are tried with all of `engines`; without `methods` all of `METHODS`, but rings only where
    heads do not divide the GPUs, and chunks, which compute more than others, only where nothing else fits. Method, engine and number of ranks of `cell` are replaced. Raises `ValueError`
    for an unknown method, or if none can train the model.
    """
    unknown = [name for name in methods or () if name not in METHODS]
    if unknown:
        raise ValueError(
            f"a plan does not know method '{unknown[0]}'; use some of {', '.join(METHODS)}"
        )
    structure(cell.train)  # which forks then share
    tried: list[Candidate] = []
    for count in (gpus,) if gpus else GPUS:
        chosen = methods or _sensible(cell, count)
        found = list(_tried(rank, cell, count, chosen, engines))
        if not (methods or any(each.prediction.fits for each in found)):
            with suppress(ValueError):  # of models that chunks would cut apart
                found += _tried(rank, cell, count, ["chunked"], engines)
        tried += found
        rows = _rows(rank, [each for each in found if each.prediction.fits])
        if rows:
            best = () if gpus else ("fewest GPUs",)
            planned = [_planned(row, rows, best) for row in rows]
            return Plan(rows=planned, tried=len(tried), limit="none", reason=None)
    if not tried:
        raise TooLarge(
            f"seqlen ({length_text(cell.train.seqlen)}) does not fit on {gpus or GPUS[-1]} x {cell.hardware}, by far; use a "
            "shorter sequence or more GPUs"
        )
    closest = min(tried, key=lambda each: each.prediction.total_bytes)
    return Plan(
        rows=[], tried=len(tried), limit=closest.prediction.limit, reason=_nothing_fits(closest)
    )


def _heads(cell: Cell) -> int:
    return field(described(cell.train.model, cell.train.overrides), "num_attention_heads")


def _sensible(cell: Cell, gpus: int) -> list[str]:
    rings = _heads(cell) % gpus != 0
    return [name for name in METHODS if name != "chunked" and (rings or "cp" not in DEGREES[name])]


def _tried(
    rank: Rank,
    cell: Cell,
    gpus: int,
    methods: Sequence[str],
    engines: Sequence[dict[str, Any]],
) -> Iterator[Candidate]:
    """What `_of_ladder` finds for each of `methods`. Raises `ValueError` if all are refused."""
    ladders, refused = [], ""
    for name in methods:
        ladder = []
        for variant in (Variant(name, o, e) for e in engines for o in METHODS[name]):
            try:
                ladder.append(_family(cell, gpus, variant))
            except ValueError as error:
                refused = str(error)
        ladders += [ladder] if ladder else []
    if not ladders:
        raise ValueError(refused)
    for at in range(0, len(ladders), 2):
        pair = ladders[at : at + 2]
        named = " and ".join(ladder[0][0].train.method.name for ladder in pair)
        rank.progress(f"trying settings of {named} on {gpus} GPUs")
        for found in apart([partial(_of_ladder, rank, ladder) for ladder in pair]):
            yield from found


def _of_ladder(rank: Rank, ladder: list[list[Cell]]) -> list[Candidate]:
    """Candidates of one method: the first rung that fits, at its smallest degree, and the last rung, which holds
    the longest sequence. If the last rung does not fit, nothing does; there is none if it is too large for any device.

    `ladder` has the cells of each rung by ascending degree.
    """
    try:
        last = Candidate(ladder[-1][-1], *estimate(rank, ladder[-1][-1]))
    except TooLarge:
        return []
    if not last.prediction.fits:
        return [last]
    last = _with_longest(rank, last)
    for rung in ladder[:-1]:
        widest = _fitting(rank, rung[-1])
        if widest is not None:
            return [_narrowed(rank, rung, _with_longest(rank, widest)), last]
    return [_narrowed(rank, ladder[-1], last), last]


def _narrowed(rank: Rank, rung: list[Cell], widest: Candidate) -> Candidate:
    """The candidate with the smallest degree of `rung` that fits and is worth a try; `widest` has the largest.

    Memory goes by tokens of a rank, so that the degree follows from the longest sequence of `widest`.
    """
    shards = sequence_parallel(widest.cell.train)
    for cell in rung[:-1]:
        degree = sequence_parallel(cell.train)
        longest = widest.longest_tokens * degree // shards
        if cell.train.seqlen <= min(longest, degree * ENOUGH):
            found = _fitting(rank, cell)
            if found is not None:
                return replace(found, longest_tokens=longest)
    return widest


def _family(cell: Cell, gpus: int, variant: Variant) -> list[Cell]:
    """Cells of a variant by ascending degree. Raises `ValueError` if all of them are refused."""
    found, refused = [], f"method '{variant.method}' has no degree for {gpus} GPUs"
    for shards in divisors(gpus) if DEGREES[variant.method] else [1]:
        degrees = _degrees(variant.method, shards, _heads(cell))
        if degrees is None:
            continue
        changed = {
            "method": {"name": variant.method, **degrees, **variant.options},
            "engine": variant.engine,
            "world_size": gpus,
        }
        same = cell.model_dump(exclude={"train", "warmup"})
        try:
            made = make_cell({**cell.train.model_dump(), **same, **changed})
            check_kernel(made)
            found.append(made)
        except ValueError as error:
            refused = str(error)
    if not found:
        raise ValueError(refused)
    return found


def _degrees(name: str, shards: int, heads: int) -> dict[str, int] | None:
    """Degrees whose product is `shards`; None if the method has none, or a simpler method has the same."""
    if not DEGREES[name]:
        return {}
    if DEGREES[name] == ("sp", "cp"):
        sp = max(d for d in divisors(shards) if heads % d == 0)
        return {"sp": sp, "cp": shards // sp} if 1 < sp < shards else None
    if name == "ring":
        return {"cp": shards} if shards > 1 else None
    return {"sp": shards} if heads % shards == 0 else None


def _fitting(rank: Rank, cell: Cell) -> Candidate | None:
    """The candidate of `cell`; None if it does not fit."""
    try:
        found = Candidate(cell, *estimate(rank, cell))
    except TooLarge:
        return None
    return found if found.prediction.fits else None


def _with_longest(rank: Rank, found: Candidate) -> Candidate:
    """`found` with the length at which lines through two estimates meet the memory of the device or of the host.

    The second is at twice the length, because pinned memory grows in powers of two.
    """
    here = found.cell.train.seqlen
    _, there = estimate(rank, at_length(found.cell, 2 * here))
    return replace(
        found, longest_tokens=int(crossing(found.cell, {here: found.use, 2 * here: there}))
    )


def _rows(rank: Rank, fitting: list[Candidate]) -> list[Candidate]:
    """The candidates that no other is better than in both speed and length, and that fit with all layers."""
    rows: list[Candidate] = []
    for each in sorted(fitting, key=lambda each: (-each.speed, each.prediction.total_bytes)):
        if rows and each.longest_tokens <= max(row.longest_tokens for row in rows):
            continue
        rank.progress(f"confirming {each.cell.label}")
        found = replace(each, prediction=confirmed(rank, each.cell, each.prediction))
        if found.prediction.fits:
            rows.append(found)
    return rows


def _planned(row: Candidate, rows: list[Candidate], best: Sequence[str]) -> Planned:
    """`row` among `rows`; `best` is what all of them are."""
    train, p = row.cell.train, row.prediction
    layout = layouts(train)[0]
    ranks: dict[str, Callable[[Candidate], float]] = {
        "fastest": lambda each: each.speed,
        "longest": lambda each: each.longest_tokens,
    }
    leads = [name for name, of in ranks.items() if of(row) == max(map(of, rows))]
    peak = load_hardware(row.cell.hardware).bf16_flops
    seconds = p.step_seconds_modelled
    return Planned(
        train=train,
        sp=layout.sp,
        cp=layout.cp,
        dp=len(layouts(train)),
        best=[*leads, *best],
        tokens_per_second_per_gpu=row.speed or None,
        mfu=p.flops.model_causal / (seconds * train.world_size * peak)
        if seconds and peak
        else None,
        longest_tokens=row.longest_tokens,
        advice=_advice(row),
        prediction=p,
    )


def tokens_per_second_per_gpu(train: TrainConfig, p: Prediction) -> float | None:
    """Trained tokens of all samples of a step over its time and its GPUs."""
    if p.step_seconds_modelled is None:
        return None
    return step_samples(train) * train.seqlen / (p.step_seconds_modelled * train.world_size)


def _advice(row: Candidate) -> str:
    """What to change next, from what takes the most time."""
    p, cell = row.prediction, row.cell
    if p.time is None:
        return p.time_unknown or ""
    assert cell.simulation is not None
    kernel = cell.simulation.timed_as or cell.train.attention.name
    rates = architecture(load_hardware(cell.hardware))
    if p.time.binds == "attention" and rates is not None:
        fastest = max(rates.attention, key=lambda name: rates.attention[name].share)
        gain = rates.attention[fastest].share / rates.attention[kernel].share
        if gain > 1.05:
            return f"attention {fastest}: {gain:.1f} times as fast as {kernel}"
        return "attention binds: fewer tokens, more GPUs, or packed documents"
    return {
        "update on the host": "keep the training states on the GPUs, or accumulate more samples per step",
        "links between GPUs": "a smaller degree, or more samples per step",
        "copies to and from the host": "keep layer inputs on the GPUs",
        "launches": "longer sequences or larger batches: the host cannot launch faster",
        "waiting for other stages": "more slices or micro-batches",
        "other operators": "fused operators (a compiled model, Liger kernels)",
    }.get(p.time.binds, "matrix products bind: nothing is wasted but recomputation")


def _nothing_fits(closest: Candidate) -> str:
    p, cell = closest.prediction, closest.cell
    train = cell.train
    device = f"{p.total_bytes / GIB:.1f} GiB per GPU, where {capacity_bytes(cell) / GIB:.1f} are for the allocator"
    needs = {
        "host_memory": f"{p.host_bytes / GIB:,.0f} GiB of host memory per node of {host_memory_bytes(cell) / GIB:,.0f}"
    }.get(p.limit, device)
    cause = ""
    if p.limit == "heads":
        heads = field(described(train.model, train.overrides), "num_attention_heads")
        cause = f"; sp stops at {sequence_parallel(train)} because it must divide {heads} heads and {train.world_size} GPUs"
    return (
        f"{length_text(train.seqlen)} tokens of {train.model} do not fit on {train.world_size} x {cell.hardware}: the closest "
        f"setting (method {train.method.name}) needs {needs}{cause}"
    )
