"""What a folder of weights holds, from the headers of its files. Reads no tensor and imports no torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
"""The number before a header: its bytes."""
LONGEST_HEADER = 100_000_000
"""Bytes that safetensors admits in a header."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weights that were pickled: reading one may run any program."""


def check_weights(folder: Path) -> None:
    """Raise `ValueError` for weights in `folder` that are pickled alone, cut off, or elsewhere."""
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for kind in PICKLED for path in folder.glob(kind))
    if pickled and not files:
        raise ValueError(
            f"{folder}: weights are in {pickled[0]} alone, which is pickled and never read, because that can run any "
            "program; save them as safetensors"
        )
    for path in files:
        _check_file(path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        _check_index(index, {path.name for path in files})


def _check_file(path: Path) -> None:
    """Raise `ValueError` unless the file is as long as its header says."""
    wrong = "fetch it again"
    try:
        held = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(LENGTH.size)
            (length,) = LENGTH.unpack(start) if len(start) == LENGTH.size else (held,)
            fits = LENGTH.size + length <= min(held, LONGEST_HEADER)
            header = json.loads(file.read(length)) if fits else {}
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        needed = LENGTH.size + length + max(ends, default=0)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {wrong}") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(f"{path}: no header of safetensors; {wrong}") from None
    if not fits:
        raise ValueError(f"{path}: {held:,} bytes do not hold its header; {wrong}")
    if held != needed:
        raise ValueError(f"{path}: {held:,} bytes, and its header says {needed:,}; {wrong}")


def _check_index(index: Path, files: set[str]) -> None:
    """Raise `ValueError` unless the index names files of its folder."""
    try:
        named: dict[str, Any] = json.loads(index.read_text())["weight_map"]
        wanted = {str(name) for name in named.values()}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        raise ValueError(f"{index}: no JSON object with a 'weight_map'; fetch it again") from None
    for name in sorted(wanted - files):
        raise ValueError(
            f"{index}: names '{name}', which is no file of this folder; use names of {sorted(files)}, or fetch the "
            "folder again"
        )
