"""Calls in forks of this process. Each starts without a device and without memory in use, if this process does."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from harness.processes.tied import die_with_parent

Result = TypeVar("Result")
FORK = multiprocessing.get_context("fork")


def apart(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The result of each of `calls`, run concurrently in forks of this process.

    Raises the first exception of a call, or `RuntimeError` if a fork ends without a result.
    """
    pipes, processes = [], []
    for call in calls:
        reader, writer = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_body, args=(call, writer, os.getpid()))
        process.start()
        writer.close()  # before the next fork, else the pipe stays open when this fork dies
        pipes.append(reader)
        processes.append(process)
    heard = [_hear(pipe) for pipe in pipes]
    for process in processes:
        process.join()
    for error, _ in heard:
        if error is not None:
            raise error
    return [result for _, result in heard]


def _hear(pipe: Connection) -> tuple[Exception | None, Any]:
    try:
        heard: tuple[Exception | None, Any] = pipe.recv()
    except EOFError:
        return RuntimeError("a forked process ended without a result"), None
    return heard


def _body(call: Callable[[], Result], pipe: Connection, parent: int) -> None:
    die_with_parent(parent)
    try:
        pipe.send((None, call()))
    except Exception as error:  # noqa: BLE001  The parent raises it.
        pipe.send((error, None))
