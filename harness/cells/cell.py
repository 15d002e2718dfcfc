"""A cell: one point of a sweep."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import check_method, load_method
from alst_impl.models import described, published
from alst_impl.ops.attention.cores.base import Core, load_core
from alst_impl.plugin import explain, names
from alst_impl.sources.base import load_source
from harness.cells.hardware import load_hardware
from harness.cells.units import length_text
from harness.cells.worlds import FORECAST, TRAITS, Traits, World

NOTHING_TIMED = {"gate": False, "followed": False, "timed": False, "steps": 0}
"""Required values of these fields in a world without computed values and without time."""


class Simulation(Frozen):
    """Options of a forecast."""

    part: Literal["step", "mlp", "loss"] = "step"
    """What runs: a whole step, or forward and backward of only one decoder layer's MLP (`mlp`) or
    of only head and loss (`loss`)."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of each stage in world `schedule`: world_size is dp x pp x tp."""
    host_memory_bytes: int | None = Field(default=None, gt=0)
    """Host memory of one node; None uses the hardware row's value."""
    margin: float = Field(default=0.0, ge=0, lt=1)
    """Share of a device's memory that a step must leave free to fit."""
    timed_as: str | None = None
    """Core attention whose published speed the modelled time assumes; None for the cell's own. Phantom devices run
    PyTorch's kernels only, so that the bytes are theirs."""
    search: bool = True
    """Also search for the longest sequence that fits."""
    timeline: bool = False
    """Record allocated bytes over the course of the step."""


class Cell(Frozen):
    """One point of a sweep: all inputs that decide the outcome, and no results."""

    train: TrainConfig
    """The training run."""
    world: World = "cpu"
    """The world that executes the cell."""
    hardware: str = "cpu"
    """Row of `harness.cells.hardware`."""
    warmup: int = Field(default=1, ge=0)
    """Steps before the timed ones."""
    steps: int = Field(default=3, ge=0)
    """Number of timed steps. An untimed step follows under the memory tracker, which is slow. With
    0, only gradients are compared and nothing is measured."""
    gate: bool = True
    """Compare every gradient of the first step with that of the stock model in fp64 in one process.
    A step with dropout has no truth to compare with."""
    update: bool = False
    """Also compare the first step's change of every parameter with the stock optimizer's."""
    followed: bool = False
    """Also compare the full gradient of every step with the stock model's at the run's current weights."""
    timed: bool = True
    """Whether step times are recorded. Timed cells never run concurrently."""
    repetition: int = Field(default=0, ge=0)
    """Distinguishes repeated runs of the same cell. Only cells of the same repetition are compared."""
    timeout_s: int = Field(default=600, gt=0)
    """Wall time after which the cell's processes are ended."""
    simulation: Simulation | None = None
    """Options for worlds `phantom` and `schedule`; None in all others."""
    expandable_segments: bool | None = None
    """Setting of CUDA's caching allocator in worlds `cuda` and `phantom`, on by default as in the
    paper (arXiv:2506.13996, section 5.2); None in all others."""

    @property
    def key(self) -> str:
        """A readable slug and a hash of the cell, usable as a file name."""
        t = self.train
        options = "".join(f"-{k}{v}" for k, v in sorted(t.method.options.items()))
        model = Path(t.model).parent.name if t.model.endswith(".json") else Path(t.model).name
        slug = f"{model}_{t.method.name}{options}_{t.engine.name}_w{t.world_size}_s{t.seqlen}_{self.world}"
        text = self.model_dump_json(exclude=self._silent())
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return re.sub(r"[^A-Za-z0-9._-]", "", slug) + f"-{digest}"

    def _silent(self) -> dict[str, Any]:
        """Fields at their default. The key omits them, so adding a field keeps old keys valid."""
        silent: dict[str, Any] = {}
        if self.simulation is None:
            silent["simulation"] = True
        else:
            unset = {
                "tp": self.simulation.tp == 1,
                "timed_as": self.simulation.timed_as is None,
                "margin": not self.simulation.margin,
            }
            silent["simulation"] = {name for name, left_out in unset.items() if left_out}
        if self.expandable_segments is None:
            silent["expandable_segments"] = True
        for comparison in ("update", "followed"):
            if not getattr(self, comparison):
                silent[comparison] = True
        if not self.repetition:
            silent["repetition"] = True
        train: dict[str, Any] = {}
        if self.train.optimizer.name == "adamw":
            train["optimizer"] = {"name"}
        if self.train.lora is None:
            train["lora"] = True
        elif not self.train.lora.dropout:
            train["lora"] = {"dropout"}
        return {**silent, "train": train} if train else silent

    @property
    def num_processes(self) -> int:
        """Number of processes that execute the cell: one per rank, or 1 for a forecast, which runs a single rank."""
        return 1 if self.traits.forecast else self.train.world_size

    @property
    def traits(self) -> Traits:
        """Capabilities of the cell's world."""
        return TRAITS[self.world]

    @property
    def label(self) -> str:
        """A short name for progress lines and legends."""
        t = self.train
        depth = t.overrides.get("num_hidden_layers")
        model = t.model if depth is None else f"{t.model}, {depth} layers,"
        return f"{model} {t.method.name} x{t.world_size} @ {length_text(t.seqlen)}"


def make_cell(settings: dict[str, Any]) -> Cell:
    """A checked cell from flat settings: fields of `TrainConfig` and of `Cell` side by side."""
    settings = {**_defaults(settings), **settings}
    outer = {k: v for k, v in settings.items() if k in Cell.model_fields and k != "train"}
    inner = {k: v for k, v in settings.items() if k not in outer}
    known = sorted({*Cell.model_fields, *TrainConfig.model_fields} - {"train"})
    try:
        train = TrainConfig(**inner)
        cell = Cell(train=train, **outer)
    except ValidationError as error:
        raise ValueError(explain(error, "cell", known)) from None
    worlds = names("harness.worlds")
    if cell.world not in worlds:
        raise ValueError(f"unknown world '{cell.world}'; use {' or '.join(worlds)}")
    _check_world(cell, load_core(train.attention))
    _check_simulation(cell)
    load_hardware(cell.hardware)
    published(train.model, train.overrides)
    corpus = train.data.corpus
    if corpus != "python-stdlib" and not Path(corpus).exists():
        raise ValueError(
            f"corpus '{corpus}' does not exist; use 'python-stdlib' or a text file or folder"
        )
    check_method(train)
    _check_lengths(cell)
    engine = load_engine(train.engine)
    engine.check(train)
    if engine.updates_in_backward and (cell.gate or cell.followed):
        raise ValueError(
            f"gate ({cell.gate}) and followed ({cell.followed}) compare gradients, which update_in_backward "
            "frees in backward; set both to false, or use update_in_backward: false"
        )
    if train.lora is not None and train.lora.dropout and (cell.gate or cell.followed):
        raise ValueError(
            f"gate ({cell.gate}) and followed ({cell.followed}) compare gradients with those of the stock model, which "
            f"draws other masks (lora.dropout {train.lora.dropout}); set both to false, or dropout to 0"
        )
    return cell


def check_kernel(cell: Cell) -> None:
    """Raise `ValueError` if the method of a forecast cannot run the kernel that its time is about."""
    if cell.simulation is not None and cell.simulation.timed_as is not None:
        kernel = Spec(name=cell.simulation.timed_as)
        load_method(cell.train.method).check(cell.train.model_copy(update={"attention": kernel}))


def host_memory_bytes(cell: Cell) -> float:
    """Host memory of one node; infinity if it is unknown."""
    assert cell.simulation is not None
    row = load_hardware(cell.hardware)
    return cell.simulation.host_memory_bytes or row.host_memory_bytes or math.inf


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on the cell's world."""
    world = settings.get("world", "cpu")
    traits = next((traits for name, traits in TRAITS.items() if name == world), None)
    if traits is None:
        return {}  # which is told when the cell is checked
    found: dict[str, Any] = {}
    if traits.forecast:
        found |= {**NOTHING_TIMED, "simulation": {}}
        if not traits.executes or _needs_no_warmup(settings):
            found["warmup"] = 0
    if traits.allocator:
        found["expandable_segments"] = True
    return found


def _needs_no_warmup(settings: dict[str, Any]) -> bool:
    """Whether the first step uses as much device memory as later ones."""
    simulation = settings.get("simulation")
    part = isinstance(simulation, dict) and simulation.get("part", "step") != "step"
    return part or _settles_at_once(settings)


def _settles_at_once(settings: dict[str, Any]) -> bool:
    engine, attention = (
        settings.get(name, TrainConfig.model_fields[name].default)
        for name in ("engine", "attention")
    )
    try:
        settles = load_engine(Spec.model_validate(engine)).settles_at_once
        return (
            settles and not load_core(Spec.model_validate(attention)).compiled
        )  # whose first calls also try kernels
    except ValueError:
        return False  # which is told when the cell is checked


def _check_world(cell: Cell, core: Core) -> None:
    """Raise `ValueError` for attention, hardware or allocator settings that the cell's world does not support."""
    if cell.traits.gpus:
        return
    if cell.traits.phantom:
        replaced = load_method(cell.train.method).replaces_core(cell.train.seqlen)
        if core.pattern is not None and not core.compiled and not replaced:
            raise ValueError(
                f"attention '{cell.train.attention.name}' computes pattern {core.pattern.text} in tiles of plain PyTorch, "
                "which no one trains with on a GPU, so that their bytes say nothing; use attention 'flex'"
            )
        if not (core.replaceable or core.compiled):
            raise ValueError(
                f"phantom devices run PyTorch's own attention kernels only, not attention '{cell.train.attention}'; "
                "use attention 'sdpa_flash', 'sdpa' or 'flex'"
            )
        if load_hardware(cell.hardware).chip is None:
            raise ValueError(
                f"world '{cell.world}' needs a CUDA device, but hardware '{cell.hardware}' has no chip; use h100-80gb, or "
                "take the chip of another row, which `alst hardware NAME` prints"
            )
        return
    if cell.expandable_segments is not None:
        raise ValueError(
            f"expandable_segments ({cell.expandable_segments}) is a setting of CUDA's allocator, and world "
            f"'{cell.world}' has none; leave it out"
        )
    if not core.cpu:
        raise ValueError(
            f"attention '{cell.train.attention}' needs a CUDA device, but world '{cell.world}' has none; "
            "use attention 'sdpa' or world 'cuda'"
        )


def _check_lengths(cell: Cell) -> None:
    """Raise `ValueError` if steps have several lengths where only one is foreseen."""
    data, seqlen = cell.train.data, cell.train.seqlen
    if cell.traits.forecast:
        load_method(cell.train.method).check_played(cell.train)
    source = load_source(data.source)
    if len(source.seqlens(seqlen)) > 1 and cell.traits.forecast:
        *_, shorter, longest = source.seqlens(seqlen)
        raise ValueError(
            f"world '{cell.world}' plays steps of one length, but source '{data.source.name}' has steps of "
            f"{shorter} and of {longest} tokens; leave source out, and ask for each length by seqlen, with as many "
            "tokens per step by batch_size"
        )
    fields = described(cell.train.model, cell.train.overrides)
    if source.tokens_beyond and (cell.gate or cell.followed) and fields.get("output_router_logits"):
        raise ValueError(
            f"gate ({cell.gate}) and followed ({cell.followed}) compare with the stock model, whose router loss would "
            f"count the token after each sequence of source '{data.source.name}'; set both to false, or "
            "output_router_logits: false"
        )


def _check_simulation(cell: Cell) -> None:
    """Raise `ValueError` for forecast options in a world that measures, and for measurements in a forecast."""
    if not cell.traits.forecast:
        if cell.simulation is not None:
            raise ValueError(
                f"'simulation' is for worlds {' and '.join(FORECAST)}, not '{cell.world}'; leave it out"
            )
        return
    for field, value in NOTHING_TIMED.items():
        if getattr(cell, field) != value:
            raise ValueError(
                f"{field} is {getattr(cell, field)}, but world '{cell.world}' computes no values and measures no "
                f"time; leave it out or set it to {value}"
            )
    assert cell.simulation is not None
    simulation = cell.simulation
    if simulation.timed_as is not None:
        load_core(simulation.timed_as)
    if not cell.traits.executes:
        asked = {
            "part": simulation.part != "step",
            "search": simulation.search,
            "timeline": simulation.timeline,
        }
        for name in (name for name, given in asked.items() if given):
            raise ValueError(
                f"simulation.{name} needs world 'phantom', because world 'schedule' plays one whole step at one "
                "length; set search: false, and leave out part and timeline"
            )
    elif simulation.tp > 1:
        raise ValueError(
            f"simulation.tp ({simulation.tp}) needs world 'schedule', because no method is tensor-parallel; leave it out"
        )
    elif simulation.part != "step" and simulation.search:
        raise ValueError(
            f"simulation.search looks for the longest sequence of a whole step, not of part '{simulation.part}'; "
            "set search: false"
        )
