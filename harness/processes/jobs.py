"""Jobs of the fork server, their endings, and the folder of its sockets."""

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
"""What ranks compute on. A fork server serves one accelerator: DeepSpeed selects it at import, and phantom
devices need another build of PyTorch."""

CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connect",
    "remote process exited",
    "NCCL communicator was aborted",
)
"""Text in error messages of ranks whose peer has died."""


class Job(Frozen):
    """Work for `world_size` forked ranks."""

    entry: str
    """`module:function`, called on each rank as `function(rank, payload)`; returns JSON data."""
    payload: dict[str, Any]
    """JSON data for every rank."""
    world_size: int
    """Number of ranks."""
    timeout_s: float
    """Wall time after which all ranks are killed."""
    folder: str
    """Working directory of the ranks."""
    path: list[str]
    """Module search path of the ranks."""
    sources: str | None = None
    """Folder of another `alst_impl`, which the ranks import instead of ours."""
    environment: dict[str, str] = {}
    """Environment variables of every rank."""
    ranks: list[int] | None = None
    """Ranks that this job forks, if other jobs fork the rest; None for all ranks."""
    first_local: int = 0
    """Local rank, on this machine, of the first rank that this job forks."""
    meeting: str | None = None
    """`host:port` of the store that ranks of several jobs share; None if one job forks all ranks."""


class Ending(Frozen):
    """How a job ended. If ranks failed, this describes the first failure."""

    how: Literal["finished", "error", "signal", "timeout", "lost"]
    """`signal`: a signal ended a rank. `lost`: the server ended before the job did."""
    results: list[Any] = []
    """Result of every rank, if the job finished."""
    rank: int | None = None
    """The rank that failed."""
    error: str | None = None
    """Class of the exception or name of the signal."""
    message: str | None = None
    """Message of the exception, or the last line that the rank wrote."""
    trace: str | None = None
    """Traceback of the exception."""
    during: str | None = None
    """Last activity that the failed rank reported."""
    out_of_memory: bool = False
    """Whether the kernel's out-of-memory killer ended a process on this machine, or in this container, meanwhile."""


@dataclass(frozen=True)
class Rank:
    """One rank, as its function sees it."""

    index: int
    """0 to `world_size` - 1."""
    world_size: int
    """Number of ranks of the job."""
    scratch: Path
    """An empty folder that the ranks share; it is removed after the job."""
    progress: Callable[[str], None]
    """Reports the current activity of the rank."""
    local: int = 0
    """Local rank on this machine; the index of its device."""
    meeting: str | None = None
    """`host:port` of the store that the ranks of all machines share; None if all ranks share `scratch`."""


def innocence(failure: Ending) -> tuple[bool, bool]:
    """Sort key of failures: causes before consequences. Equal keys keep their order of arrival."""
    consequence = any(text in (failure.message or "") for text in CONSEQUENCES)
    return failure.error == "SIGABRT" or consequence, failure.how != "signal"


def runtime_folder() -> Path:
    """The private folder of sockets and scratch files. Raises `ValueError` if other users can open it."""
    folder = Path(tempfile.gettempdir()) / f"alst-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise ValueError(
            f"{folder} is open to other users; remove it, or set TMPDIR to a private folder"
        )
    return folder


def fingerprint(accelerator: Accelerator = "cpu") -> str:
    """Hash of our code, the interpreter and its packages. A server with another fingerprint is stale."""
    served = f"{sys.executable} {sys.version} {accelerator}"
    if accelerator == "phantom":
        served += f" {os.environ.get('ALST_PHANTOM')}"
    digest = hashlib.sha256(served.encode())
    packages = Path(sysconfig.get_paths()["purelib"])
    kinds = (".py", ".json", ".yaml", ".c", ".h")
    files = [p for root in SOURCES for p in root.rglob("*") if p.suffix in kinds]
    for path in (packages, *sorted(files)):
        with contextlib.suppress(FileNotFoundError):  # an editor may replace a file meanwhile
            status = path.stat()
            digest.update(f"{path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:16]


def end_session(session: int) -> None:
    """Kill every process of `session` without waiting for it."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid != session and os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def oom_kills() -> int:
    """Number of processes that the kernel's out-of-memory killer has ended, in this container or machine."""
    for file, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError):
            for line in Path(file).read_text().splitlines():
                if line.split()[0] == key:
                    return int(line.split()[1])
    return 0
