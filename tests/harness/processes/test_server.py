"""The fork server: results of ranks, their failures, and cleanup."""

from __future__ import annotations

import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from harness.cells.paths import SOURCES
from harness.processes.client import _socket_path, submit
from harness.processes.jobs import Rank, runtime_folder

Payload = dict[str, Any]


def join(rank: Rank) -> None:
    """Join a gloo group of the job's ranks."""
    store = dist.FileStore(str(rank.scratch / "store"), rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.index, world_size=rank.world_size)


def add_up(rank: Rank, payload: Payload) -> int:
    """Sum of all ranks' numbers and the payload's."""
    rank.progress("adding")
    join(rank)
    total = torch.tensor([rank.index + payload["more"]])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def die_alone(rank: Rank, payload: Payload) -> None:
    """Rank 1 ends itself by a signal; its peer waits for it."""
    join(rank)
    rank.progress("waiting")
    if rank.index == 1:
        os.kill(os.getpid(), payload["signal"])
    dist.barrier()


def fail_alone(rank: Rank, payload: Payload) -> None:
    """Rank 1 raises; its peer waits for it."""
    join(rank)
    if rank.index == 1:
        raise LookupError("of all things")
    dist.barrier()


def sleep(rank: Rank, payload: Payload) -> None:
    """Start a child process, as a compiler would be, and sleep."""
    subprocess.Popen(["sleep", "600"])
    rank.progress("asleep")
    time.sleep(600)


def entry(fn: Callable[..., Any]) -> str:
    """The entry name of `fn` in a job."""
    return f"{fn.__module__}:{fn.__name__}"


class Watch:
    """Listens to a job's events and keeps its process ids, including children of ranks."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.doing: list[str] = []
        self.family: list[psutil.Process] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self.pids = event["pids"]
        else:
            self.doing.append(event["doing"])
        supervisor = psutil.Process(self.pids[0]).parent()
        assert supervisor is not None
        self.family = [supervisor, *supervisor.children(recursive=True)]


def all_gone(processes: list[psutil.Process], patience_s: float = 15) -> bool:
    """Whether all `processes` end within `patience_s`."""
    _, alive = psutil.wait_procs(processes, timeout=patience_s)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive)


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder with a separate server, for tests that damage the server."""
    with tempfile.TemporaryDirectory(prefix="alst-test-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield runtime_folder()
        for process in servers(runtime_folder()):
            process.kill()
            process.wait(10)


def servers(folder: Path) -> list[psutil.Process]:
    """Servers with a socket in `folder`, without supervisors and ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "harness.processes.server" in words and words[-1].startswith(str(folder)):
            found.append(process)
    return [p for p in found if p.parent() not in found]


def test_results_come_back_by_rank() -> None:
    """Every rank's result is returned, and each rank reports its progress."""
    watch = Watch()
    ending = submit(entry(add_up), {"more": 10}, 3, 60, watch)
    assert ending.how == "finished"
    assert ending.results == [33, 33, 33]
    assert watch.doing == ["adding"] * 3
    assert all_gone(watch.family)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_dead_rank_is_the_cause(name: str) -> None:
    """The error names the rank that a signal ended, not the peer that lost its connection."""
    ending = submit(entry(die_alone), {"signal": int(signal.Signals[name])}, 2, 60)
    assert (ending.how, ending.rank, ending.error) == ("signal", 1, name)
    assert ending.during == "waiting"


def test_failed_rank_is_the_cause() -> None:
    """The error names the rank that raised, with its error and traceback."""
    ending = submit(entry(fail_alone), {}, 2, 60)
    assert (ending.how, ending.rank, ending.error) == ("error", 1, "LookupError")
    assert ending.message == "of all things"
    assert ending.trace is not None
    assert "fail_alone" in ending.trace


def test_timeout_ends_the_tree() -> None:
    """After the time limit neither ranks nor their children are left."""
    watch = Watch()
    ending = submit(entry(sleep), {}, 2, 1.5, watch)
    assert ending.how == "timeout"
    assert ending.during == "asleep"
    assert len(watch.family) >= 3
    assert all_gone(watch.family)


ENDS = pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])


@ENDS
def test_killed_supervisor_leaves_nothing(end: signal.Signals) -> None:
    """If the process that supervises the ranks dies, the ranks end, too."""
    watch = Watch()

    def listener(event: dict[str, Any]) -> None:
        watch(event)
        if watch.doing.count("asleep") == 2:
            watch.family[0].send_signal(end)

    ending = submit(entry(sleep), {}, 2, 60, listener)
    assert ending.how == "lost"
    assert all_gone(watch.family)


@ENDS
def test_client_that_leaves_ends_the_tree(end: signal.Signals) -> None:
    """Ctrl-C and a client that is ended end the ranks."""
    program = (
        "from harness.processes.client import submit\n"
        f"submit({entry(sleep)!r}, {{}}, 2, 60, lambda e: print(e.get('pids', ''), flush=True))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as client:
        assert client.stdout is not None
        ranks = [
            psutil.Process(int(pid)) for pid in client.stdout.readline().strip("[]\n").split(",")
        ]
        client.stdout.readline()  # wait until one rank sleeps
        client.send_signal(end)
    assert all_gone(ranks)


def test_server_leaves_with_its_socket(own_server: Path) -> None:
    """A server ends when its socket is removed, because no client can reach it."""
    assert submit(entry(add_up), {"more": 0}, 1, 60).how == "finished"
    (server,) = servers(own_server)
    (socket,) = own_server.glob("*.sock")
    socket.unlink()
    assert all_gone([server])


def test_killed_server_is_replaced(own_server: Path) -> None:
    """A killed server leaves a dead socket. The next job starts a new server."""
    assert submit(entry(add_up), {"more": 0}, 1, 60).how == "finished"
    (server,) = servers(own_server)
    server.kill()
    server.wait(10)
    assert submit(entry(add_up), {"more": 1}, 1, 60).results == [1]


@ENDS
def test_a_server_that_ends_takes_its_job_along(own_server: Path, end: signal.Signals) -> None:
    """The client is told that the job is lost, its ranks end, and the next job starts a new server."""
    watch = Watch()

    def listener(event: dict[str, Any]) -> None:
        watch(event)
        if watch.doing == ["asleep"]:
            for server in servers(own_server):
                server.send_signal(end)

    assert submit(entry(sleep), {}, 1, 60, listener).how == "lost"
    assert all_gone(watch.family)
    assert submit(entry(add_up), {"more": 1}, 1, 60).results == [1]


def leave_early(rank: Rank, payload: Payload) -> None:
    """Rank 1 ends without a result and without an error; its peer waits for it."""
    join(rank)
    if rank.index == 1:
        os._exit(0)
    dist.barrier()


def test_a_rank_that_leaves_early_is_the_cause() -> None:
    """An exit code of 0 without a result is a failure."""
    ending = submit(entry(leave_early), {}, 2, 60)
    assert (ending.how, ending.rank, ending.error) == ("error", 1, "exit code 0")


def interrupt_itself(rank: Rank, payload: Payload) -> None:
    """Ctrl-C reaches the rank."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_an_interrupted_rank_ends_the_job() -> None:
    """As an error of that rank."""
    ending = submit(entry(interrupt_itself), {}, 1, 60)
    assert (ending.how, ending.error) == ("error", "KeyboardInterrupt")


def give_back(rank: Rank, payload: Payload) -> int:
    """Nothing but the payload."""
    return int(payload["number"])


def test_300_quick_jobs_in_a_row_leave_nothing(own_server: Path) -> None:
    """All results are right; then the server holds few files, and no process and no folder of a job."""
    for number in range(300):
        assert submit(entry(give_back), {"number": number}, 1, 60).results == [number]
    (server,) = servers(own_server)
    assert eventually(lambda: not server.children() and not list(own_server.glob("job-*")))
    assert server.num_fds() < 50


def eventually(holds: Callable[[], bool], patience_s: float = 15) -> bool:
    """Whether `holds` within `patience_s`: the server takes leave of its last child once a second."""
    deadline = time.monotonic() + patience_s
    while not holds() and time.monotonic() < deadline:
        select.select([], [], [], 0.05)
    return holds()


def test_a_file_in_the_place_of_the_socket_is_replaced(own_server: Path) -> None:
    """Whatever it is: nobody listens there."""
    _socket_path("cpu").write_text("no socket")
    assert submit(entry(add_up), {"more": 1}, 1, 60).results == [1]
    assert stat.S_IMODE(own_server.stat().st_mode) == 0o700, "no other user can enter"
    assert own_server.stat().st_uid == os.getuid()


THEIRS = """
import harness
from harness.processes.client import submit

def where(rank, payload):
    return harness.__file__

if __name__ == "__main__":
    print(submit("theirs:where", {}, 1, 60).results[0])
"""


def test_a_server_of_another_checkout_is_left_alone(own_server: Path, tmp_path: Path) -> None:
    """Each checkout's jobs run its own code, and neither ends the other's server."""
    assert submit(entry(add_up), {"more": 1}, 1, 60).results == [1]
    (ours,) = servers(own_server)
    for package in SOURCES:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(SOURCES[0].parent / "experiments", tmp_path / "experiments")
    (tmp_path / "theirs.py").write_text(THEIRS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(
        [sys.executable, "theirs.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "harness" / "__init__.py")
    assert len(servers(own_server)) == 2
    assert submit(entry(add_up), {"more": 2}, 1, 60).results == [2]
    assert ours.is_running()


def test_a_folder_that_is_a_link_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another user of the temporary folder may have made it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / f"alst-{os.getuid()}").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="open to other users"):
        runtime_folder()


def test_folder_of_others_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A runtime folder that others can write to is refused, because they could impersonate the server."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runtime_folder().chmod(0o777)
    with pytest.raises(ValueError, match="open to other users"):
        runtime_folder()
