"""Jobs: what a client asks of the fork server, what it hears back, and where the two meet."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alst_impl.config import Frozen
from harness.cells.paths import SOURCES

Accelerator = Literal["cpu", "cuda", "phantom"]
"""What ranks compute on. A fork server serves one: DeepSpeed chooses as it is imported, and phantom devices
have a PyTorch of their own."""

CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connect",
    "remote process exited",
    "NCCL communicator was aborted",
)
"""In the messages of ranks whose peer has died."""


class Job(Frozen):
    """Work for `world_size` forked ranks."""

    entry: str
    """`module:function`, called on each rank as `function(rank, payload)`; returns JSON data."""
    payload: dict[str, Any]
    """JSON data that every rank gets."""
    world_size: int
    """Ranks."""
    timeout_s: float
    """Wall time after which all ranks are ended."""
    folder: str
    """Working directory of the ranks."""
    path: list[str]
    """Module search path of the ranks."""
    sources: str | None = None
    """Folder of another `alst_impl`, which the ranks import in place of ours."""
    environment: dict[str, str] = {}
    """Set in every rank before it does anything."""
    ranks: list[int] | None = None
    """Those that are forked here, where other jobs fork the others; None is all of them."""
    first_local: int = 0
    """Number on this machine of the first rank that is forked here."""
    meeting: str | None = None
    """`host:port` of the store where ranks of several jobs meet; None where one job forks all."""


class Ending(Frozen):
    """How a job ended. Where a rank failed, the one that failed first."""

    how: Literal["finished", "error", "signal", "timeout", "lost"]
    """`signal`: a rank was ended from outside or crashed; `lost`: the server itself went away."""
    results: list[Any] = []
    """Of every rank, when finished."""
    rank: int | None = None
    """The rank that failed."""
    error: str | None = None
    """Class of the exception, or name of the signal."""
    message: str | None = None
    """What the exception said, or the last line the rank wrote."""
    trace: str | None = None
    """Traceback of the exception."""
    during: str | None = None
    """What the failed rank had last reported to be doing."""
    out_of_memory: bool = False
    """The kernel's out-of-memory killer ended a process of this machine or container meanwhile."""


@dataclass(frozen=True)
class Rank:
    """What a rank's function knows of the job it is part of."""

    index: int
    """0 to `world_size` - 1."""
    world_size: int
    """Ranks of the job."""
    scratch: Path
    """An empty folder shared by the ranks, gone after the job."""
    progress: Callable[[str], None]
    """Reports what the rank does now."""
    local: int = 0
    """Number among the ranks of this machine: that of its device."""
    meeting: str | None = None
    """`host:port` of the store where the ranks of all machines meet; None where `scratch` is shared."""


def innocence(failure: Ending) -> tuple[bool, bool]:
    """Sorts causes before consequences; the order of arrival settles the rest."""
    consequence = any(text in (failure.message or "") for text in CONSEQUENCES)
    return failure.error == "SIGABRT" or consequence, failure.how != "signal"


def runtime_folder() -> Path:
    """The private folder of sockets and scratch files. Raises `ValueError` if it is not ours alone."""
    folder = Path(tempfile.gettempdir()) / f"alst-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise ValueError(
            f"{folder} is open to other users; remove it, or set TMPDIR to a private folder"
        )
    return folder


def fingerprint(accelerator: Accelerator = "cpu") -> str:
    """Changes with our code, the interpreter and its packages: a server of another is stale."""
    served = f"{sys.executable} {sys.version} {accelerator}"
    if accelerator == "phantom":
        served += f" {os.environ.get('ALST_PHANTOM')}"
    digest = hashlib.sha256(served.encode())
    packages = Path(sysconfig.get_paths()["purelib"])
    kinds = (".py", ".json", ".yaml", ".c", ".h")
    files = [p for root in SOURCES for p in root.rglob("*") if p.suffix in kinds]
    for path in (packages, *sorted(files)):
        with contextlib.suppress(FileNotFoundError):  # an editor replaces files as we look
            status = path.stat()
            digest.update(f"{path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:16]


def end_session(session: int) -> None:
    """Kill every process of `session`, and wait for nobody."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid != session and os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory, in this container or on this machine."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                if line.split()[0] == key:
                    return int(line.split()[1])
    return 0
