"""Will it fit, and how: the legal settings of ALST for a length on a machine, cheapest first.

Settings form a ladder: each rung frees device memory and costs something. On every rung the smallest
sequence-parallel degree that fits is looked for, since a larger one only adds communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.methods.base import divisors
from alst_impl.models import field, published
from harness.hardware import Hardware
from harness.predict import Setting, predict
from harness.prediction import Limit, Prediction

GPUS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers tried where none is asked for: the smallest that fits is the cheapest."""


class Rung(Frozen):
    """What one rung of the ladder turns on."""

    tiling: bool
    """MLP, norms, and logits and loss in tiles: next to no time."""
    offload: bool
    """Checkpoints in host memory: copies that hide behind long sequences."""
    offload_parameters: bool
    """Parameter shards in host memory: every layer is copied in, forward and backward."""


LADDER = (
    Rung(tiling=False, offload=False, offload_parameters=False),
    Rung(tiling=True, offload=False, offload_parameters=False),
    Rung(tiling=True, offload=True, offload_parameters=False),
    Rung(tiling=True, offload=True, offload_parameters=True),
)
"""Cheapest first."""


class Option(Frozen):
    """One way to train, and what it holds."""

    gpus: int
    sp: int
    dp: int
    rung: Rung
    prediction: Prediction

    def as_json(self) -> dict[str, Any]:
        """The keys of `alst predict --json`, with `settings`."""
        settings = {"gpus": self.gpus, "sp": self.sp, "dp": self.dp, **self.rung.model_dump()}
        return {"settings": settings, **self.prediction.model_dump(mode="json")}


class Plan(Frozen):
    """What fits, or why nothing does."""

    options: list[Option]
    """Cheapest first; empty if nothing fits."""
    limit: Limit
    """What the closest setting exceeds; `none` where something fits."""
    reason: str | None
    """In one sentence, where nothing fits."""


def make_plan(
    train: TrainConfig, hardware: Hardware, gpus: int | None, host_memory_bytes: int | None
) -> Plan:
    """Settings for `train` (its method and number of ranks are replaced) that fit on `hardware`."""
    closest: Option | None = None
    for count in (gpus,) if gpus else GPUS:
        tried = [
            option
            for found in _rungs(train, hardware, count, host_memory_bytes)
            for option in found
        ]
        fitting = [option for option in tried if option.prediction.fits]
        if fitting:
            return Plan(options=sorted(fitting, key=_cost), limit="none", reason=None)
        closest = min([*tried, *([closest] if closest else [])], key=_excess)
    assert closest is not None
    return _nothing_fits(closest, train, hardware, host_memory_bytes)


def _cost(option: Option) -> tuple[float, int, int]:
    """Time per sample, then what a rung costs, then communication."""
    seconds = option.prediction.step_seconds_modelled / option.dp
    return seconds, LADDER.index(option.rung), option.sp


def _excess(option: Option) -> int:
    return option.prediction.total_bytes


def _rungs(
    train: TrainConfig, hardware: Hardware, gpus: int, host_memory_bytes: int | None
) -> Iterator[list[Option]]:
    """What was tried on each rung, until the first rung that fits with the smallest degree."""
    heads: int = field(published(train.model, train.overrides), "num_attention_heads")
    degrees = [sp for sp in divisors(gpus) if heads % sp == 0]

    def at(sp: int, rung: Rung, slope: bool) -> Option:
        method = {
            "name": "alst",
            "sp": sp,
            "tile_mlp": rung.tiling,
            "tile_norm": rung.tiling,
            "tile_loss": rung.tiling,
            "offload": rung.offload,
        }
        run = train.model_copy(update={"method": Spec(**method), "world_size": gpus})
        setting = Setting(
            train=run,
            hardware=hardware,
            host_memory_bytes=host_memory_bytes,
            offload_parameters=rung.offload_parameters,
        )
        prediction = predict(setting, slope=slope)
        return Option(gpus=gpus, sp=sp, dp=gpus // sp, rung=rung, prediction=prediction)

    for rung in LADDER:
        largest = at(degrees[-1], rung, slope=False)
        if not largest.prediction.fits:
            yield [largest]
            continue
        low, high = 0, len(degrees) - 1
        while low < high:
            middle = (low + high) // 2
            if at(degrees[middle], rung, slope=False).prediction.fits:
                high = middle
            else:
                low = middle + 1
        yield [at(degrees[low], rung, slope=True)]
        if low == 0:
            return


def _nothing_fits(
    closest: Option, train: TrainConfig, hardware: Hardware, host_memory_bytes: int | None
) -> Plan:
    p, heads = (
        closest.prediction,
        field(published(train.model, train.overrides), "num_attention_heads"),
    )
    limit: Limit = p.limit
    device = f"{p.total_bytes / 2**30:.1f} GiB per GPU of {hardware.memory_bytes / 2**30:.1f}"
    what = {
        "gpu_memory": device,
        "heads": device,
        "host_memory": f"{p.host_bytes / 2**30:,.0f} GiB of host memory per node of "
        f"{(host_memory_bytes or hardware.host_memory_bytes or 0) / 2**30:,.0f}",
    }.get(limit, limit)
    cause = ""
    if limit == "heads":
        cause = f"; sp stops at {closest.sp} because it must divide {heads} heads and {closest.gpus} GPUs"
    return Plan(
        options=[],
        limit=limit,
        reason=f"{train.seqlen:,} tokens of {train.model} do not fit on {closest.gpus} x {hardware.name}: "
        f"the closest setting (sp {closest.sp}, {_named(closest.rung)}) needs {what}{cause}",
    )


def _named(rung: Rung) -> str:
    on = [name.replace("_", " ") for name, value in rung.model_dump().items() if value]
    return ", ".join(on) or "nothing offloaded or tiled"
