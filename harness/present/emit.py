"""Writes a planned run as a script that anyone can read, change and start: a folder for `torchrun`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from alst_impl.config import TrainConfig
from alst_impl.engines.base import Engine, load_engine
from alst_impl.engines.fsdp2 import FSDP2
from alst_impl.engines.plain import Plain
from alst_impl.engines.zero import Zero
from alst_impl.methods.base import load_method
from alst_impl.models import build, has_weights, published
from harness.cells.hardware import load_hardware
from harness.devices.outside import GIB, outside_bytes
from harness.present.render import filled

METHODS = ("alst", "layerwise", "ring", "usp", "mst", "baseline")
"""Methods that a loop runs by calling the model."""
SCRIPT, TEXTS = "run.sh", ("run.sh", "train.py", "settings.yaml")
"""The file that starts a run, and the files that have a template."""


def emit(
    train: TrainConfig, hardware: str, folder: Path, *, expandable_segments: bool
) -> list[Path]:
    """Make `folder`, with a script that trains as `train` says on accelerators of the row `hardware`.

    `run.sh` starts `train.py` under torchrun, with PyTorch's allocator set to `expandable_segments`.
    `settings.yaml` says what a person may change, `config.json` the model, `deepspeed.json` what DeepSpeed
    does. Returns the files. Raises `ValueError` if `folder` exists or cannot be made, and for a run that such
    a script cannot make exactly.
    """
    check_emitted(train, folder)
    texts = _texts(train, hardware, expandable_segments=expandable_segments)
    try:
        with tempfile.TemporaryDirectory(
            dir=folder.absolute().parent, prefix=f".{folder.name}-"
        ) as beside:
            made = Path(beside, "made")
            made.mkdir()
            for name, text in texts.items():
                (made / name).write_text(text)
            (made / SCRIPT).chmod(0o755)
            made.rename(folder)  # which fails if files have come there since
    except OSError as error:
        raise _unwritable(folder, error) from None
    return [folder / name for name in texts]


def check_emitted(train: TrainConfig, folder: Path) -> None:
    """Raise `ValueError` if `folder` exists, or no script there could make this run exactly."""
    if folder.exists():
        raise ValueError(f"--emit {folder}: exists already; name a new folder, or remove it")
    try:
        tempfile.TemporaryDirectory(dir=folder.absolute().parent).cleanup()
    except OSError as error:
        raise _unwritable(folder, error) from None
    engine = load_engine(train.engine)
    _check(train, engine)
    _check_dtypes(engine, list(build(train)[0].parameters()))


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"--emit {folder}: {error.strerror}; name a new folder in one that can be written to"
    )


def _texts(train: TrainConfig, hardware: str, *, expandable_segments: bool) -> dict[str, str]:
    """File name -> content."""
    engine = load_engine(train.engine)
    content = {
        "train": train,
        "engine": engine,
        "enabled": {
            "method": train.method.name,
            "attention": train.model_dump()["attention"],
            "checkpoint": train.checkpoint,
            **load_method(train.method).model_dump(),
        },
        "fsdp": isinstance(engine, FSDP2),
        "zero": isinstance(engine, Zero),
        "sharded": isinstance(engine, FSDP2) or (isinstance(engine, Zero) and engine.stage == 3),
        "hardware": hardware,
        "outside": f"{outside_bytes(train) / GIB:.1f}",
        "expandable_segments": expandable_segments,
        **_nodes(train.world_size, hardware),
        **_places(train),
    }
    found = {name: filled(f"{name}.jinja", **content) for name in TEXTS}
    found["config.json"] = _json(published(train.model, train.overrides))
    if isinstance(engine, Zero):
        numbers = sum(parameter.numel() for parameter in build(train)[0].parameters())
        found["deepspeed.json"] = _json(engine.settings(train, mixed=False, num_parameters=numbers))
    return found


def _check(train: TrainConfig, engine: Engine) -> None:
    """Raise `ValueError` for a run that the script could not make exactly."""
    method, mask = train.method.name, train.data.mask
    if method not in METHODS:
        raise ValueError(
            f"--emit: method '{method}' runs its own schedule or another stack, but the script calls the model; use "
            f"one of {', '.join(METHODS)}"
        )
    if mask != "none":
        raise ValueError(
            f"--emit: every token of the script's samples is a label, but mask is '{mask}'; use mask: none, and let "
            "Samples in train.py make your labels"
        )
    if isinstance(engine, Plain) and engine.update_in_backward:
        raise ValueError(
            "--emit: the script updates after backward, but update_in_backward is true; use update_in_backward: false"
        )


def _check_dtypes(engine: Engine, parameters: list[Any]) -> None:
    """Raise `ValueError` if the parameters that `engine` shards together are of several dtypes."""
    together = (
        parameters if isinstance(engine, Zero) else [p for p in parameters if p.requires_grad]
    )
    held = {str(parameter.dtype) for parameter in together}
    if len(held) > 1:
        raise ValueError(
            f"--emit: parameters of {', '.join(sorted(held))} are more than one dtype, which the engine that the "
            "script calls cannot shard; use engine 'fsdp2' for adapters, or 'plain'"
        )


def _nodes(world_size: int, hardware: str) -> dict[str, int]:
    """Number of nodes, and of ranks on each."""
    row = load_hardware(hardware)
    nodes = -(-world_size // row.devices_per_node)
    if world_size % nodes:
        raise ValueError(
            f"--gpus {world_size}: torchrun starts equally many ranks on each node, and '{row.name}' has "
            f"{row.devices_per_node} devices per node, so {nodes} nodes; use a multiple of {nodes}"
        )
    return {"nodes": nodes, "local": world_size // nodes}


def _places(train: TrainConfig) -> dict[str, str | None]:
    """Where weights, text and tokenizer are, seen from any folder; None for what a run makes up."""
    said = {
        "weights": train.model if has_weights(train.model) else None,
        "tokenizer": None if train.data.tokenizer == "bytes" else train.data.tokenizer,
        "data": None if train.data.corpus == "python-stdlib" else train.data.corpus,
    }
    return {key: place and str(Path(place).absolute()) for key, place in said.items()}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
