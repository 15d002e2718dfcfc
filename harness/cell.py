"""A cell is one point of a sweep; an experiment is a YAML file that expands to cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from alst_impl.config import Frozen, TrainConfig
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import load_method
from alst_impl.models import published
from alst_impl.plugin import explain, names
from harness.hardware import load_hardware

World = Literal["cuda", "cpu", "sim"]


class Cell(Frozen):
    """One point of a sweep: all that decides the outcome, nothing that is one."""

    train: TrainConfig
    """The training run."""
    world: World = "cpu"
    """What executes it."""
    hardware: str = "cpu"
    """Row of `harness.hardware`."""
    warmup: int = Field(default=1, ge=0)
    """Steps before the timed ones."""
    steps: int = Field(default=3, ge=0)
    """Timed steps; one more follows under the memory tracker, which is slow and so not timed. With
    0, gradients are compared and nothing is measured."""
    gate: bool = True
    """Compare every gradient of the first step with the stock model run whole in fp64."""
    timed: bool = True
    """Whether step times are read; timed cells never run side by side."""
    timeout_s: int = Field(default=600, gt=0)
    """Wall time after which the cell's processes are ended."""

    @property
    def key(self) -> str:
        """Readable slug and a hash of the whole cell, fit for a file name."""
        t = self.train
        options = "".join(f"-{k}{v}" for k, v in sorted(t.method.options.items()))
        model = Path(t.model).parent.name if t.model.endswith(".json") else Path(t.model).name
        slug = f"{model}_{t.method.name}{options}_{t.engine.name}_w{t.world_size}_s{t.seqlen}_{self.world}"
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]
        return re.sub(r"[^A-Za-z0-9._-]", "", slug) + f"-{digest}"

    @property
    def num_processes(self) -> int:
        """Processes that execute it: one per rank, but a simulation plays one rank of all."""
        return 1 if self.world == "sim" else self.train.world_size

    @property
    def label(self) -> str:
        """A short name for progress lines and legends."""
        t = self.train
        return f"{t.model} {t.method.name} x{t.world_size} @ {t.seqlen:,}"


class Sweep(Frozen):
    """A grid of cells: every combination of `axes` on top of the experiment's base and `base`."""

    base: dict[str, Any] = {}
    """Fields of `Cell` and `TrainConfig` shared by the grid."""
    axes: dict[str, list[Any]] = {}
    """Field -> values. A value that is a mapping under the name `_` sets several fields at once."""


class Experiment(Frozen):
    """One question and the cells that answer it."""

    name: str
    """The file's name."""
    question: str
    """What the experiment answers, in one sentence."""
    source: str
    """Where the question comes from."""
    base: dict[str, Any] = {}
    """Fields shared by all cells."""
    sweeps: list[Sweep]
    """Grids; a cell that two grids share is run once."""
    figures: list[str] = []
    """Files in `harness/figures/` drawn from this experiment's table."""

    def cells(self) -> dict[str, Cell]:
        """All cells by key, checked. Raises `ValueError` naming the value, the rule and the way out."""
        cells = {}
        for sweep in self.sweeps:
            for values in itertools.product(*sweep.axes.values()):
                settings = {**self.base, **sweep.base}
                for field, value in zip(sweep.axes, values, strict=True):
                    settings.update(value if field.startswith("_") else {field: value})
                cell = make_cell(settings)
                cells[cell.key] = cell
        return cells


def make_cell(settings: dict[str, Any]) -> Cell:
    """A checked cell from flat settings: fields of `TrainConfig` and of `Cell` side by side."""
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
        raise ValueError(
            f"world '{cell.world}' cannot execute cells yet; use {' or '.join(worlds)}"
        )
    load_hardware(cell.hardware)
    published(train.model, train.overrides)
    corpus = train.data.corpus
    if corpus != "python-stdlib" and not Path(corpus).exists():
        raise ValueError(
            f"corpus '{corpus}' does not exist; use 'python-stdlib' or a text file or folder"
        )
    load_method(train.method).check(train)
    load_engine(train.engine).check(train)
    return cell


def load_experiment(path: Path) -> Experiment:
    """Read and check `path`. Raises `ValueError` naming file, key and value."""
    if not path.is_file():
        raise ValueError(f"{path}: no such experiment; see experiments/*.yaml")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must be a mapping with 'question', 'source' and 'sweeps'")
    try:
        experiment = Experiment(name=path.stem, **raw)
        experiment.cells()
    except ValidationError as error:
        raise ValueError(explain(error, str(path), sorted(Experiment.model_fields))) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return experiment


def dump(cell: Cell) -> str:
    """The cell as JSON, as it travels to the processes that run it."""
    return json.dumps(cell.model_dump(mode="json"), sort_keys=True)
