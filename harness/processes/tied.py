"""`python -m harness.processes.tied PARENT COMMAND ...` becomes COMMAND, which ends when process PARENT is gone.

So nothing of a workflow that was killed goes on, and `unlock` can tell that nothing does. Starts in
milliseconds: imports nothing but the standard library.
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
    """Have the kernel end this process, whatever it becomes, when `parent`, which forked it, is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def unlock(folder: Path) -> None:
    """Remove the locks that killed runs left in Snakemake's `folder`, unless a run is alive.

    Until this process ends it counts as such a run: Snakemake's own locks tell those that are alive apart.
    """
    folder.mkdir(exist_ok=True)
    alive = os.open(folder / "alive", os.O_CREAT | os.O_RDWR, 0o644)  # open until we end
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in (folder / "locks").glob("*.lock"):
            lock.unlink()
    except BlockingIOError:
        pass  # a run is alive
    fcntl.flock(alive, fcntl.LOCK_SH)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
