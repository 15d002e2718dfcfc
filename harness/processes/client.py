"""The client of the fork server, which it starts if none runs. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.processes.jobs import (
    Accelerator,
    Ending,
    Job,
    end_session,
    fingerprint,
    runtime_folder,
)

ATTEMPTS = 3
SOCKET_PATH_BYTES = 103
"""Longest path of a socket on all systems."""
PER_JOB = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NCCL_",
    "TORCH_NCCL_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHELASTIC_",
    "PHANTOM_",
)
"""Prefixes of environment variables that a server does not keep, because its clients set different values."""

Listener = Callable[[dict[str, Any]], None]


class ServerError(RuntimeError):
    """The fork server does not start."""


def ignore(_: dict[str, Any]) -> None:
    """The listener that hears nothing."""


def submit(
    entry: str,
    payload: dict[str, Any],
    world_size: int,
    timeout_s: float,
    listener: Listener = ignore,
    *,
    accelerator: Accelerator = "cpu",
    **more: Any,
) -> Ending:
    """Run `entry` ("module:function") on `world_size` forked ranks and wait for the end.

    `more` are other fields of `Job`, such as the environment of the ranks.

    `listener` is called with `{"event": "started", "pids": [...], "session": leader}` and
    `{"event": "progress", "rank": r, "doing": text}`. All ranks end if this call raises an exception,
    Ctrl-C included, or if this process dies.
    """
    job = Job(
        entry=entry,
        payload=payload,
        world_size=world_size,
        timeout_s=timeout_s,
        folder=os.getcwd(),
        path=[p or os.getcwd() for p in sys.path],
        **more,
    )
    for _ in range(ATTEMPTS):
        session: int | None = None
        try:
            connection = _connect(accelerator)
        except ServerError as error:
            return Ending(how="lost", error=type(error).__name__, message=str(error))
        with connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(job.model_dump_json().encode() + b"\n")
            for event in _events(connection):
                if event["event"] == "end":
                    return Ending(**event["ending"])
                session = event.get("session", session)
                listener(event)
        if session is not None:
            end_session(session)  # a killed server leaves what its ranks had started
            return Ending(how="lost", message="the process that watched the ranks was ended")
        # The server was shutting down and closed its queue: ask its successor.
    return Ending(how="lost", message=f"no fork server would stay; see {runtime_folder()}/*.log")


def _events(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(ConnectionResetError):
        for line in connection.makefile("rb"):
            yield json.loads(line)


def _socket_path(accelerator: Accelerator) -> Path:
    path = runtime_folder() / f"{fingerprint(accelerator)}.sock"
    if len(str(path).encode()) > SOCKET_PATH_BYTES:
        raise ValueError(f"{path} is too long for a socket; set TMPDIR to a shorter path")
    return path


def _connect(accelerator: Accelerator) -> socket.socket:
    """A connection to the server of this code version, which is started if none runs."""
    path = _socket_path(accelerator)
    with (runtime_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _open(path)
        path.unlink(missing_ok=True)
        _start(path, accelerator)
        return _open(path)


def _open(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def server_environment(accelerator: Accelerator) -> dict[str, str]:
    """Environment of a new server: ours without the variables that each job sets for its ranks."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(PER_JOB)}
    ours["DS_ACCELERATOR"] = "cpu" if accelerator == "cpu" else "cuda"
    if accelerator == "phantom":
        from harness.phantom.load import device_of, prepared

        # Packages that look for a device during import find this one; each rank gets its own.
        ours = {**prepared(ours), "PHANTOM_DEVICE": device_of("h100-80gb", 1, 0)}
    if accelerator != "cpu":
        # Otherwise PyTorch initialises CUDA to look for devices, and forks of that process cannot use CUDA.
        ours["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return ours


def _start(path: Path, accelerator: Accelerator) -> None:
    """Start a server that outlives this process, detached from its terminal. It listens on return."""
    root = str(Path(__file__).parents[2])
    environment = server_environment(accelerator)
    search = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    log = path.with_suffix(".log")
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "harness.processes.server", accelerator, str(path)],
            cwd=root,
            env={**environment, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            check=False,
        )
    if done.returncode:
        raise ServerError(f"it exited with {done.returncode}; see {log}")
