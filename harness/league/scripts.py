"""Commands of peers' scripts, and what they are run in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.cells import league
from harness.cells.league import OURS, Task
from harness.cells.paths import SOURCES
from harness.league.packages import overlay

PORT_OF_ANY = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
"""Lets torchrun take a free port, so that two runs do not meet."""


def command(task: Task, ranks: int, *arguments: str) -> list[str]:
    """The peer's script on `ranks` ranks of this machine."""
    script = str(league.folder().absolute() / task.peer / "train.py")
    launcher = ["torchrun", "--nproc-per-node", str(ranks), *PORT_OF_ANY]
    return [*launcher, script, *arguments]


def environment(task: Task, folder: Path) -> dict[str, str]:
    """This process's environment, with what the script imports. `folder` is for whatever the peer writes."""
    own = overlay(task.peer)
    search = [str(league.folder().absolute()), *([str(own.absolute())] if own else [])]
    if task.peer in OURS:
        search.append(str(SOURCES[0].parent))
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(search),
        # A peer that asks a hub for something fails at once, and its caches are its own.
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
