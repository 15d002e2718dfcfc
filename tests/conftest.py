"""Fixtures shared by all tests: ranks of a process group, forked from a preloaded server."""

from __future__ import annotations

import ctypes
import datetime as dt
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import pytest
from weekly import weekly

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers report that they were made

# A process that the fork server made (tests of the tests) forks its own ranks.
CONTEXT = multiprocessing.get_context("fork" if multiprocessing.parent_process() else "forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])
PR_SET_PDEATHSIG = 1


class Ranks(Protocol):
    """Starts `world_size` ranks; see `ranks`."""

    def __call__(self, world_size: int, timeout_s: float = 120) -> Callable[..., list[Any]]: ...


def _rank(
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    results: Connection,
    fn: Any,
    args: Any,
) -> None:
    """Body of one rank: joins the group, calls `fn`, and always leaves the group."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A rank that hangs says where, just before it is given up.
    faulthandler.dump_traceback_later(timeout_s - 5)
    # Variables that launchers set for ranks; DeepSpeed reads them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch.distributed as dist

    importlib.import_module("harness.processes.preload")  # prepares DeepSpeed, once for all ranks

    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=timeout_s),
        )
        # Plain pickle, because multiprocessing's own would share a tensor's memory, which ends with
        # this process.
        results.send_bytes(pickle.dumps((True, fn(rank, world_size, *args))))
    except BaseException:
        results.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _collect(processes: list[Any], pipes: list[Connection], timeout_s: float) -> list[Any]:
    """Results of all ranks. Raises the first failing rank's traceback as an `AssertionError`."""
    deadline = time.monotonic() + timeout_s
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), timeout=deadline - time.monotonic()):
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
                (values if succeeded else failures)[rank] = value
            except EOFError:
                processes[rank].join(5)
                # A dead rank is the cause. Its peers only report lost connections.
                failures = {rank: f"died with exit code {processes[rank].exitcode}", **failures}
        if failures:
            # Wait a moment, because a dead rank may be noticed after its peers' lost connections.
            deadline = min(deadline, time.monotonic() + 0.3)
    if failures:
        rank, text = next(iter(failures.items()))
        raise AssertionError(f"rank {rank} of {len(processes)}: {text}")
    if open_pipes:
        raise AssertionError(f"ranks {sorted(open_pipes.values())} not done after {timeout_s} s")
    return [values[rank] for rank in range(len(processes))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what weekly.yaml leaves for once a week. Where all tests are collected, its words must be theirs."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.removeprefix("tests/").partition("[")[0]
        cases.setdefault(name, []).append(item)
    for name, entry in weekly().items():
        for number, item in enumerate(found := cases.get(name, [])):
            if not entry.keeps(_case(item), number):
                item.add_marker(pytest.mark.slow)
        unknown = set(entry.daily) - set(map(_case, found))
        if config.args == config.getini("testpaths") and (unknown or not found):
            raise pytest.UsageError(f"tests/weekly.yaml: there is no {name} {sorted(unknown)}")


def _case(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[2].removesuffix("]")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """`ranks(world_size)(fn, *args)` calls `fn(rank, world_size, *args)` on every rank of a gloo group.

    `fn` is a module-level function. Returns the results by rank. The first failing rank ends all
    ranks, and its traceback is raised here.
    """
    count = iter(range(1_000_000))

    def start(world_size: int, timeout_s: float = 120) -> Callable[..., list[Any]]:
        def call(fn: Callable[..., Any], *args: Any) -> list[Any]:
            store = str(tmp_path / f"store{next(count)}")
            readers, processes = [], []
            for rank in range(world_size):
                reader, writer = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(
                    target=_rank, args=(rank, world_size, store, timeout_s, writer, fn, args)
                )
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            try:
                values = _collect(processes, readers, timeout_s)
                for process in processes:
                    process.join(10)  # leaves the group
                return values
            finally:
                for process in processes:
                    process.kill()
                    process.join()

        return call

    return start
