"""`python -m harness.processes.tied PARENT COMMAND ...` runs COMMAND, which ends when process PARENT ends.

So no process of a killed workflow survives, and `unlock` can rely on it. Imports only the standard library, to
start within milliseconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent`, which forked it, ends. This survives `exec`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def unlock(folder: Path) -> None:
    """Remove the locks that killed runs left in Snakemake's `folder`, unless a run is alive.

    This process counts as a live run until it ends. Snakemake's own locks keep live runs apart.
    """
    folder.mkdir(exist_ok=True)
    alive = os.open(
        folder / "alive", os.O_CREAT | os.O_RDWR, 0o644
    )  # stays open until this process ends
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink()
    except BlockingIOError:
        pass  # another run is alive
    fcntl.flock(alive, fcntl.LOCK_SH)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
