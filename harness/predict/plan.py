"""Plans configurations of ALST that fit a length on a machine, cheapest first.

Options form a ladder: each rung frees device memory at some cost. On every rung the planner looks
for the smallest sequence-parallel degree that fits, since a larger one only adds communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alst_impl.config import Spec
from alst_impl.methods.base import divisors
from alst_impl.models import described, field
from harness.cells.cell import Cell
from harness.cells.prediction import Option, Plan, Rung
from harness.predict.attempts import GIB, capacity_bytes, host_memory_bytes
from harness.predict.fits import bare
from harness.processes.jobs import Rank

GPUS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried if none is given. The smallest that fits is the cheapest."""


LADDER = (
    Rung(tiling=False, offload=False, offload_states=False),
    Rung(tiling=True, offload=False, offload_states=False),
    Rung(tiling=True, offload=True, offload_states=False),
    Rung(tiling=True, offload=True, offload_states=True),
)
"""Rungs, cheapest first."""


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """`make_plan` for `payload["cell"]` on `payload["gpus"]` devices, as plain data."""
    return make_plan(rank, Cell(**payload["cell"]), payload["gpus"]).model_dump(mode="json")


def make_plan(rank: Rank, cell: Cell, gpus: int | None) -> Plan:
    """Configurations of `cell` that fit on its hardware. Its method, engine and number of ranks are replaced."""
    closest: Option | None = None
    for count in (gpus,) if gpus else GPUS:
        tried = [option for found in _rungs(rank, cell, count) for option in found]
        fitting = [option for option in tried if option.prediction.fits]
        if fitting:
            return Plan(options=sorted(fitting, key=_cost), limit="none", reason=None)
        closest = min([*tried, *([closest] if closest else [])], key=_excess)
    assert closest is not None
    return _nothing_fits(closest, cell)


def _cost(option: Option) -> tuple[float, int, int]:
    """Sort key: time per sample, then the rung, then communication."""
    seconds = (option.prediction.step_seconds_modelled or 0.0) / option.dp
    return seconds, LADDER.index(option.rung), option.sp


def _excess(option: Option) -> int:
    return option.prediction.total_bytes


def _rungs(rank: Rank, cell: Cell, gpus: int) -> Iterator[list[Option]]:
    """One option per rung: the smallest degree that fits, else the largest degree. Ends after a
    rung on which the smallest of all degrees fits.
    """
    train = cell.train
    heads: int = field(described(train.model, train.overrides), "num_attention_heads")
    degrees = [sp for sp in divisors(gpus) if heads % sp == 0]

    def at(sp: int, rung: Rung) -> Option:
        rank.progress(f"trying sp {sp} on {gpus} GPUs, {_named(rung)}")
        run = train.model_copy(
            update={
                "method": Spec.model_validate(
                    {
                        "name": "alst",
                        "sp": sp,
                        "tile_mlp": rung.tiling,
                        "tile_norm": rung.tiling,
                        "tile_loss": rung.tiling,
                        "offload": rung.offload,
                    }
                ),
                "engine": Spec.model_validate({"name": "fsdp2", "offload": rung.offload_states}),
                "world_size": gpus,
            }
        )
        # The first step creates the optimizer states, unless they are on the host.
        warmup = 0 if rung.offload_states else 1
        of = cell.model_copy(update={"train": run, "warmup": warmup})
        return Option(gpus=gpus, sp=sp, dp=gpus // sp, rung=rung, prediction=bare(rank, of))

    for rung in LADDER:
        largest = at(degrees[-1], rung)
        if not largest.prediction.fits:
            yield [largest]
            continue
        low, high = 0, len(degrees) - 1
        while low < high:
            middle = (low + high) // 2
            if at(degrees[middle], rung).prediction.fits:
                high = middle
            else:
                low = middle + 1
        yield [largest if degrees[low] == degrees[-1] else at(degrees[low], rung)]
        if low == 0:
            return


def _nothing_fits(closest: Option, cell: Cell) -> Plan:
    p, train = closest.prediction, cell.train
    heads = field(described(train.model, train.overrides), "num_attention_heads")
    device = f"{(p.reserved_bytes or 0) / GIB:.1f} GiB per GPU, where the allocator has {capacity_bytes(cell) / GIB:.1f}"
    what = {
        "gpu_memory": device,
        "heads": device,
        "host_memory": f"{p.host_bytes / GIB:,.0f} GiB of host memory per node of "
        f"{host_memory_bytes(cell) / GIB:,.0f}",
    }.get(p.limit, p.limit)
    cause = ""
    if p.limit == "heads":
        cause = f"; sp stops at {closest.sp} because it must divide {heads} heads and {closest.gpus} GPUs"
    return Plan(
        options=[],
        limit=p.limit,
        reason=f"{train.seqlen:,} tokens of {train.model} do not fit on {closest.gpus} x {cell.hardware}: "
        f"the closest setting (sp {closest.sp}, {_named(closest.rung)}) needs {what}{cause}",
    )


def _named(rung: Rung) -> str:
    on = [name.replace("_", " ") for name, value in rung.model_dump().items() if value]
    return ", ".join(on) or "nothing offloaded or tiled"
