"""A step of many chunks (`Layout.passes`), stretched from three steps of few.

Bytes are linear in the number of equally long chunks, and work is quadratic, because a chunk attends to all before it.
All layers run, on the allocator of a device of the cell's size less what the missing tokens take.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from alst_impl.layout import Layout
from alst_impl.methods.base import layouts
from alst_impl.models import hf_config
from harness.cells.cell import Cell

FEW = (3, 4, 5)
"""Numbers of chunks of the steps that run."""
MANY = 8
"""Minimum number of chunks of a step that is stretched to."""
TOKEN_BYTES = 3 * 8
"""Bytes of a token that a step keeps on the device until its end: id, label and position."""
NOT_LINEAR = {"rss_bytes", "reserved_bytes", "device_bytes"}
"""Readings that go by what an allocator or the operating system kept, taken from the largest step."""


def stretches(cell: Cell) -> bool:
    """Whether steps of `cell` are stretched from few chunks."""
    layout, train = layouts(cell.train)[0], cell.train
    limits = vars(hf_config(train).get_text_config(decoder=True))
    windows = any(limits.get(name) for name in ("sliding_window", "attention_chunk_size"))
    timeline = cell.simulation is not None and cell.simulation.timeline
    on_host = train.method.options.get("offload", True)
    alike = not (windows or timeline or train.data.packed)
    return layout.passes >= MANY and alike and on_host


def with_few(cell: Cell) -> list[Cell]:
    """The same run with `FEW` chunks of equal length."""
    layout = layouts(cell.train)[0]
    method = cell.train.method
    options = {**method.options, "chunk": layout.chunk // layout.sp}
    update = {"method": method.model_copy(update={"options": options})}
    return [
        cell.model_copy(
            update={"train": cell.train.model_copy(update={**update, "seqlen": n * layout.chunk})}
        )
        for n in FEW
    ]


def missing_bytes(layout: Layout, few: Layout) -> int:
    """Bytes of a device that tokens take which `layout` has and `few` has not, per sample."""
    return (layout.local - few.local) * TOKEN_BYTES


def stretched(found: Sequence[Any], passes: int, kept: Collection[str] = NOT_LINEAR) -> Any:
    """Plain data of a step of `passes` chunks from those of steps of `FEW`: every number by a parabola."""
    *_, last = found
    if isinstance(last, list) and last and isinstance(last[0], dict):
        return [_holding(each, found, passes) for each in last]
    if isinstance(last, dict):
        return {
            key: value
            if key in kept
            else stretched([each[key] for each in found], passes, () if key == "cost" else kept)
            for key, value in last.items()
        }
    if isinstance(last, bool) or not isinstance(last, int | float):
        return last
    value = sum(y * weight for y, weight in zip(found, _weights(passes), strict=True))
    return round(value) if isinstance(last, int) else value


def _holding(holding: dict[str, Any], found: Sequence[Any], passes: int) -> dict[str, Any]:
    """A holding of the largest step, stretched if it is in all steps."""
    names = [name for name in holding if name not in ("nbytes", "count")]
    same = [
        [each for each in step if all(each[name] == holding[name] for name in names)]
        for step in found
    ]
    if any(len(each) != 1 for each in same):
        return holding
    return {**holding, "nbytes": stretched([each[0]["nbytes"] for each in same], passes)}


def _weights(passes: int) -> list[float]:
    """Weights of Lagrange's interpolation."""
    weights = []
    for here in FEW:
        weight = 1.0
        for there in FEW:
            if there != here:
                weight *= (passes - there) / (here - there)
        weights.append(weight)
    return weights
