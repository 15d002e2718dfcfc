"""The fork server: imports all slow packages once, then forks ranks in a tenth of a second.

`python -m harness.processes.server ACCELERATOR SOCKET` serves one code version. It exits when it is idle, when its
socket is removed or when the code changes. It has a single thread, so its forks are safe.

Process tree of a job: server -> supervisor (leader of a new session) -> one process per rank. If a process dies,
all processes below it end: the kernel kills a child whose parent is gone, a supervisor kills its ranks, and the
server kills the remaining processes of a dead supervisor's session.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, cast

import psutil

from harness.cells.paths import SOURCES
from harness.processes.jobs import (
    Accelerator,
    Ending,
    Job,
    Rank,
    end_session,
    fingerprint,
    innocence,
    oom_kills,
    runtime_folder,
)
from harness.processes.tied import die_with_parent

IDLE_S = 60
POLL_S = 1.0
SETTLE_S = 0.5
"""Time to wait for more failures after the first one, to tell the cause from its consequences."""
FAREWELL_S = 10
"""Time for ranks to exit after they have sent their results."""

TELLING = ("what():", "Watchdog caught", "CUDA error", "CUDA out of memory", "std::bad_alloc")
"""Text in the message that C++ code writes before it aborts; a stack trace follows the message."""

FORK = multiprocessing.get_context("fork")


def _rank(job: Job, index: int, scratch: Path, pipe: Connection, supervisor: int) -> None:
    """Body of one rank: calls the job's function and sends its result or its error."""
    os.setpgid(0, 0)  # processes that the rank starts end with it
    die_with_parent(supervisor)
    here = ranks_here(job)
    local = job.first_local + here.index(index)
    # Every launcher sets these variables, and DeepSpeed reads them.
    places = {"RANK": index, "LOCAL_RANK": local, "WORLD_SIZE": job.world_size}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(job.environment)
    output = os.open(scratch / f"rank{index}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        module, function = job.entry.split(":")
        entry = getattr(importlib.import_module(module), function)
        folder = scratch / "shared"
        progress = lambda doing: pipe.send(("progress", doing))  # noqa: E731
        rank = Rank(index, job.world_size, folder, progress, local, job.meeting)
        result = entry(rank, job.payload)
        pipe.send(("result", result))
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, _one_line(error), traceback.format_exc())))
        raise SystemExit(1) from None


def ranks_here(job: Job) -> list[int]:
    """The ranks that this job forks."""
    return list(range(job.world_size)) if job.ranks is None else job.ranks


def _one_line(error: BaseException) -> str:
    """First line of the error's message; the place in the code if it has none, as an assertion may."""
    text = str(error).strip()
    if text:
        return text.splitlines()[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


class Supervisor:
    """Runs one job until it ends, fails or is cancelled."""

    def __init__(self, job: Job, client: socket.socket, scratch: Path) -> None:
        self.job = job
        self.client = client
        self.scratch = scratch
        self.processes: dict[int, ForkProcess] = {}
        self.pipes: dict[Connection, int] = {}
        self.doing = dict.fromkeys(ranks_here(job), "start-up")
        self.results: dict[int, Any] = {}
        self.failures: list[Ending] = []

    def run(self) -> Ending | None:
        """The job's ending; None if the client has disconnected."""
        kills = oom_kills()
        deadline = time.monotonic() + self.job.timeout_s
        try:
            self._start()
            while self.pipes:
                if time.monotonic() >= deadline:
                    break
                ready = wait([*self.pipes, self.client], timeout=deadline - time.monotonic())
                if self.client in ready:
                    return None  # a client sends one message, so readable means closed
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    self._hear(pipe)
                if self.failures:
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
            self._farewell(0 if self.pipes or self.failures else FAREWELL_S)
        finally:
            self._kill()
        if self.failures:
            cause = min(self.failures, key=innocence)
            return cause.model_copy(update={"out_of_memory": oom_kills() > kills})
        if self.pipes:
            slowest = min(self.pipes.values())
            return Ending(how="timeout", rank=slowest, during=self.doing[slowest])
        return Ending(how="finished", results=[self.results[i] for i in ranks_here(self.job)])

    def _start(self) -> None:
        os.chdir(self.job.folder)
        sys.path[:] = self.job.path
        if self.job.sources is not None:
            sys.path.insert(0, self.job.sources)
            _forget(*(root.name for root in SOURCES))
            with contextlib.suppress(Exception):  # each rank tries again and says what is wrong
                importlib.import_module(self.job.entry.partition(":")[0])  # once for all ranks
        (self.scratch / "shared").mkdir(parents=True, mode=0o700)
        for index in ranks_here(self.job):
            reader, writer = FORK.Pipe(duplex=False)
            process = FORK.Process(
                target=_rank, args=(self.job, index, self.scratch, writer, os.getpid())
            )
            process.start()
            writer.close()  # before the next fork, else the pipe stays open when this rank dies
            self.processes[index] = process
            self.pipes[reader] = index
        pids = [process.pid for process in self.processes.values()]
        _tell(self.client, {"event": "started", "pids": pids, "session": os.getpid()})

    def _hear(self, pipe: Connection) -> None:
        """Receive one message of a rank, or record its death."""
        index = self.pipes[pipe]
        try:
            kind, value = pipe.recv()
        except EOFError:
            del self.pipes[pipe]
            self._note_death(index)
            return
        if kind == "progress":
            self.doing[index] = value
            _tell(self.client, {"event": "progress", "rank": index, "doing": value})
            return
        del self.pipes[pipe]
        if kind == "result":
            self.results[index] = value
        else:
            error, message, trace = value
            self.failures.append(self._failure("error", index, error, message, trace))

    def _note_death(self, index: int) -> None:
        process = self.processes[index]
        process.join(FAREWELL_S)
        code = process.exitcode
        if code is not None and code < 0:
            name, how = signal.Signals(-code).name, "signal"
        else:
            name, how = f"exit code {code}", "error"
        self.failures.append(self._failure(how, index, name, self._last_line(index), None))

    def _failure(
        self, how: Any, index: int, error: str, message: str | None, trace: str | None
    ) -> Ending:
        return Ending(
            how=how, rank=index, error=error, message=message, trace=trace, during=self.doing[index]
        )

    def _last_line(self, index: int) -> str | None:
        log = self.scratch / f"rank{index}.log"
        return last_words(log.read_text(errors="replace") if log.exists() else "")

    def _farewell(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        for process in self.processes.values():
            process.join(max(deadline - time.monotonic(), 0))

    def _kill(self) -> None:
        for process in self.processes.values():
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _forget(*packages: str) -> None:
    """Forget the imports of `packages`, so that they are imported again from the current search path."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def last_words(log: str) -> str | None:
    """The last line of `log` that explains the death of its process; the last line if none does."""
    lines = [line.strip() for line in log.split("\n") if line.strip()]
    telling = [line for line in lines if any(sign in line for sign in TELLING)]
    chosen = telling or lines
    return chosen[-1] if chosen else None


def _tell(client: socket.socket, event: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(json.dumps(event).encode() + b"\n")


def _supervise(client: socket.socket) -> None:
    """Body of a supervisor process: reads one job from `client`, runs it and sends its ending."""
    os.setsid()
    line = client.makefile("rb").readline()
    if not line:
        return
    supervisor = Supervisor(Job.model_validate_json(line), client, _scratch(os.getpid()))
    ending = supervisor.run()
    if ending is not None:
        _tell(client, {"event": "end", "ending": ending.model_dump(mode="json")})


def _scratch(supervisor: int) -> Path:
    return runtime_folder() / f"job-{supervisor}"


def _fork_supervisor(listener: socket.socket, client: socket.socket) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with_parent(server)
        listener.close()
        _supervise(client)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _reap(supervisors: set[int]) -> None:
    for pid in list(supervisors):
        if os.waitpid(pid, os.WNOHANG)[0]:
            supervisors.discard(pid)
            end_session(pid)
            shutil.rmtree(_scratch(pid), ignore_errors=True)


def _preload(accelerator: Accelerator) -> Ending | None:
    """Import all slow packages. Returns the error as an ending, or None."""
    gc.disable()  # imported objects stay alive; searching them for garbage takes a tenth of the import time
    try:
        importlib.import_module("harness.processes.preload")
        importlib.import_module("harness.worlds.base")
        if accelerator != "cpu":
            importlib.import_module(f"harness.worlds.{accelerator}").require_forkable()
    except Exception as error:
        trace = traceback.format_exc()
        return Ending(how="lost", error=type(error).__name__, message=str(error), trace=trace)
    gc.enable()
    return None


def _sweep(folder: Path) -> None:
    """Remove the files and end the processes that killed servers and supervisors left in `folder`."""
    for scratch in folder.glob("job-*"):
        supervisor = int(scratch.name.removeprefix("job-"))
        if not psutil.pid_exists(supervisor):
            end_session(supervisor)  # what its ranks had started, if its client has ended, too
            shutil.rmtree(scratch, ignore_errors=True)
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                path.with_suffix(".log").unlink(missing_ok=True)


def serve(path: Path, accelerator: Accelerator) -> None:
    """Serve jobs on a new socket at `path` until the server is idle or its code is obsolete."""
    _sweep(path.parent)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    if os.fork():
        os._exit(0)  # tells the client that it can connect; clients queue during the imports
    inode = path.stat().st_ino
    problem = _preload(accelerator)
    supervisors: set[int] = set()
    last_busy = time.monotonic()
    while True:
        readable, _, _ = select.select([listener], [], [], POLL_S)
        _reap(supervisors)
        if readable:
            client, _ = listener.accept()
            if problem is None:
                supervisors.add(_fork_supervisor(listener, client))
            else:
                _tell(client, {"event": "end", "ending": problem.model_dump(mode="json")})
            client.close()
        if supervisors:
            last_busy = time.monotonic()
        gone = not path.exists() or path.stat().st_ino != inode
        obsolete = (
            problem is not None
            or gone
            or time.monotonic() - last_busy > IDLE_S
            or fingerprint(accelerator) != path.stem
        )
        if obsolete and not supervisors:
            break
    if not gone:
        path.unlink()  # later clients start a new server; queued clients see this one close
        path.with_suffix(".log").unlink(missing_ok=True)


if __name__ == "__main__":
    serve(Path(sys.argv[2]), cast("Accelerator", sys.argv[1]))
