"""Asks the fork server for work; starts it when there is none. Imports no torch."""

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

from harness.processes.jobs import Accelerator, Ending, Job, fingerprint, runtime_folder

ATTEMPTS = 3
SOCKET_PATH_BYTES = 103
"""What the smallest system takes."""
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
"""Beginnings of variables that a server must not hand on: it serves clients with others."""

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

    `more` are fields of `Job`: environment and sources of the ranks, and which of them are forked here.

    `listener` hears `{"event": "started", "pids": [...]}` and
    `{"event": "progress", "rank": r, "doing": text}`. An exception here, Ctrl-C included, and the
    death of this process end all ranks.
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
        started = False
        try:
            connection = _connect(accelerator)
        except ServerError as error:
            return Ending(how="lost", error=type(error).__name__, message=str(error))
        with connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(job.model_dump_json().encode() + b"\n")
            for event in _events(connection):
                started = True
                if event["event"] == "end":
                    return Ending(**event["ending"])
                listener(event)
        if started:
            return Ending(how="lost", message="the process that watched the ranks was ended")
        # A server that was about to leave closed the queue we stood in: ask its successor.
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
    """A connection to the server of this code version."""
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
    """Of a new server: ours, less what each job decides for its own ranks."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(PER_JOB)}
    ours["DS_ACCELERATOR"] = "cpu" if accelerator == "cpu" else "cuda"
    if accelerator == "phantom":
        from harness.phantom.load import device_of, prepared

        # What asks for devices during imports finds one; ranks name their own.
        ours = {**prepared(ours), "PHANTOM_DEVICE": device_of("h100-80gb", 1, 0)}
    if accelerator != "cpu":
        # PyTorch else asks CUDA whether it is there, and who has asked cannot fork ranks that use it.
        ours["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return ours


def _start(path: Path, accelerator: Accelerator) -> None:
    """Start a server that outlives us and has nothing of our terminal; it listens on return."""
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
