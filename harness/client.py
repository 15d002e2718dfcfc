"""Asks the fork server for work; starts it when there is none. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.processes import Ending, Job, fingerprint, runtime_folder

START_S = 120
ATTEMPTS = 3

Listener = Callable[[dict[str, Any]], None]


def _ignore(_: dict[str, Any]) -> None:
    pass


def submit(
    entry: str,
    payload: dict[str, Any],
    world_size: int,
    timeout_s: float,
    listener: Listener = _ignore,
) -> Ending:
    """Run `entry` ("module:function") on `world_size` forked ranks and wait for the end.

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
    )
    for _ in range(ATTEMPTS):
        started = False
        with _connect() as connection:
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


def _socket_path() -> Path:
    return runtime_folder() / f"{fingerprint()}.sock"


def _connect() -> socket.socket:
    """A connection to the server of this code version."""
    path = _socket_path()
    with (runtime_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _open(path)
        path.unlink(missing_ok=True)
        server = _start(path)
        deadline = time.monotonic() + START_S
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return _open(path)
            time.sleep(0.02)
    raise RuntimeError(f"the fork server did not start; see {path.with_suffix('.log')}")


def _open(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _start(path: Path) -> subprocess.Popen[bytes]:
    """Start a server that outlives us and has nothing of our terminal."""
    root = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.server", str(path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
