"""Runs a command on phantom devices and gathers what its processes report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
from pydantic import Field, TypeAdapter, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells.yamls import read_yaml
from harness.phantom.load import device_of, environment

SMALL = 16
"""Largest read, in bytes, that can decide a program's control flow."""


class Site(Frozen):
    """A reviewed place in a program that reads an unknown device value."""

    file: str
    """Suffix of the source file's path."""
    function: str
    """Name of the function, qualified or not; `*` matches any function of the file."""
    line: str | None = None
    """Part of the reading line or of the three lines after it; None matches any line of the function."""
    answer: bool | int | float = 0
    """Value that the read returns."""
    why: str
    """Why the program then does what it would do on a device."""


class Read(Frozen):
    """Reads of unknown values, of one size at one place."""

    file: str
    line: int
    function: str
    bytes: int
    count: int
    caller: str | None
    """The nearest calling line outside installed packages; None if that is the reading line."""
    answer: bool | int | float | None
    why: str | None
    """None at a place that is not reviewed."""

    @property
    def doubtful(self) -> bool:
        """Whether the value may have decided control flow at a place that is not reviewed."""
        return self.why is None and self.bytes <= SMALL


class Held(Frozen):
    """Tensors that one line allocated."""

    where: str
    line: str
    bytes: int
    tensors: int
    largest_bytes: int


class DeviceUse(Frozen):
    """What one process used of one device."""

    device: int
    name: str
    total_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    retries: int
    ooms: int
    alive: list[Held]
    """Allocations at the peak, largest first."""


class OutOfMemory(Frozen):
    """The last allocation that failed."""

    device: int
    asked_bytes: int
    total_bytes: int
    free_bytes: int
    where: str
    line: str
    alive: list[Held]


class Process(Frozen):
    """What one process did."""

    pid: int
    rank: int
    stands_for: int
    """Number of ranks that it ran for: itself, and those that were not started."""
    devices: list[DeviceUse]
    pinned_bytes: int
    pageable_bytes: int
    """Peak of other host memory, of blocks of 16 MiB and more."""
    launches: int
    matmuls: int
    matmul_flops: int
    attention: list[str]
    """Families of attention kernels that were launched."""
    refused: list[str]
    reads: list[Read]
    oom: OutOfMemory | None
    error: str | None


class Result(Frozen):
    """What a command did on phantom devices."""

    verdict: Literal["fits", "does not fit", "no record", "cannot run"]
    reason: str
    command: list[str]
    hardware: str
    gpus: int
    rank: int | None
    """The rank that was asked for."""
    hollow_host: bool
    """Whether large float tensors on the host were never written."""
    seconds: float = Field(description="How long this took here; no time of a device.")
    processes: list[Process]

    @property
    def exit_code(self) -> int:
        """0: fits; 1: does not fit; 2: no verdict."""
        return {"fits": 0, "does not fit": 1}.get(self.verdict, 2)


def reviewed_sites(more: Path | None = None) -> list[Site]:
    """The sites of this package and those in the YAML file `more`."""
    found: list[Site] = []
    for path in filter(None, (more, Path(__file__).with_name("sites.yaml"))):
        if not path.is_file():
            raise ValueError(f"--sites {path}: no such file")
        try:
            found += TypeAdapter(list[Site]).validate_python(read_yaml(path))
        except ValidationError as error:
            raise ValueError(explain(error, f"sites '{path}'", sorted(Site.model_fields))) from None
    return found


class HostMemory(Exception):
    """A command takes more of this machine's memory than it may."""


def rank_environment(rank: int, world_size: int, devices_per_node: int) -> dict[str, str]:
    """Launcher variables of rank `rank` of `world_size`, which runs alone."""
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank}: with --gpus {world_size} ranks are 0 to {world_size - 1}")
    local = min(devices_per_node, world_size)
    return {
        "PHANTOM_WORLD": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }


@contextlib.contextmanager
def session_folder() -> Iterator[Path]:
    """Folder that the processes of a run share; removed after the run."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="phantom-"))
    except OSError as error:
        raise ValueError(
            f"no folder for the run in {tempfile.gettempdir()}: {error.strerror}"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    command: Sequence[str],
    hardware: str,
    gpus: int = 1,
    rank: int | None = None,
    outside_bytes: int = 0,
    limit_s: float = 3600,
    sites: Path | None = None,
    hollow_host: bool | None = None,
    output: int | None = None,
    errors: int | None = None,
    base: Mapping[str, str] = os.environ,
    on_progress: Callable[[float, int], None] | None = None,
    *,
    all_ranks: bool = False,
) -> Result:
    """Run `command` on `gpus` devices of the row `hardware`, or only as rank `rank` of `gpus`.

    A launcher in it starts that rank alone (by default 0), or `all_ranks`. With `hollow_host`, large float tensors
    on the host are never written; with None, the command starts again like that once it takes half of this machine's
    free memory. `output` and `errors` are descriptors of files for what it prints. `on_progress(seconds, bytes)` is
    called a few times a second with the memory in use on the fullest device. Raises `ValueError` if the command cannot be started.
    """
    from harness.cells.hardware import load_hardware

    row = load_hardware(hardware)
    devices = gpus if rank is None else min(gpus, row.devices_per_node)
    device = device_of(hardware, devices, outside_bytes)
    ranked = rank_environment(rank or 0, gpus, row.devices_per_node)
    told = {
        **base,
        **({} if rank is None else ranked),
        **({} if all_ranks else {"PHANTOM_LAUNCHED": json.dumps(ranked)}),
    }
    listed = json.dumps([site.model_dump() for site in reviewed_sites(sites)])

    def once(hollow: bool, host_bytes: float) -> Result:
        begin = time.monotonic()
        with session_folder() as folder:
            (folder / "sites.json").write_text(listed)
            surroundings = environment(folder, device, told)
            if hollow:
                surroundings["PHANTOM_HOLLOW_HOST"] = "1"
            ended = follow(
                command, surroundings, folder, limit_s, host_bytes, (output, errors), on_progress
            )
            processes = _processes(folder)
        verdict, reason = judge(ended, processes, limit_s)
        return Result(
            verdict=verdict, reason=reason, command=list(command), hardware=hardware, gpus=gpus, rank=rank,
            hollow_host=hollow, seconds=time.monotonic() - begin, processes=processes,
        )  # fmt: skip

    if hollow_host is not None:
        return once(hollow_host, math.inf)
    try:
        return once(False, spare_bytes())
    except HostMemory as error:
        print(f"alst phantom: {error}; once more with --hollow-host", file=sys.stderr)
        return once(True, math.inf)


def _processes(folder: Path) -> list[Process]:
    """What the processes of a session left in its `folder`, by rank."""
    files = sorted(folder.glob("process-*.json"))
    found = [Process(**json.loads(file.read_text())) for file in files]
    return sorted(found, key=lambda process: process.rank)


def follow(
    command: Sequence[str],
    surroundings: Mapping[str, str],
    folder: Path,
    limit_s: float,
    host_bytes: float,
    printed: tuple[int | None, int | None],
    on_progress: Callable[[float, int], None] | None,
) -> int | None:
    """Run `command` and return its exit code; None if it was stopped after `limit_s` seconds.

    `printed` are the files for its output and its errors.

    Raises `HostMemory` if it was stopped because it took more than `host_bytes` of this machine's memory.
    """
    program = shutil.which(command[0], path=surroundings["PATH"])
    if program is None:
        raise ValueError(f"command '{command[0]}' does not exist")
    process = subprocess.Popen(
        [program, *command[1:]],
        env=dict(surroundings),
        stdout=printed[0],
        stderr=printed[1],
        start_new_session=True,
    )
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < limit_s:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if (taken := resident(process.pid)) > host_bytes:
                    raise HostMemory(
                        f"the command takes {taken / 2**30:.1f} GiB of this machine's memory"
                    ) from None
                if on_progress is not None:
                    on_progress(time.monotonic() - begin, in_use(folder / "ledger"))
        return None
    finally:
        stop(process)


def spare_bytes() -> float:
    """Bytes of this machine's memory that a command may take: half of those that are free."""
    free: int = psutil.virtual_memory().available
    return free / 2


def resident(pid: int) -> int:
    """Bytes of this machine's memory that process `pid` and its children have to themselves."""
    found = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = each.memory_info()
                found += memory.rss - memory.shared
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group of `process`, including all its children."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def in_use(ledger: Path) -> int:
    """Bytes in use on the fullest device."""
    try:
        with ledger.open("rb") as file:
            head = file.read(64 * 8)
    except OSError:
        return 0
    return max(
        (int.from_bytes(head[i : i + 8], "little") for i in range(0, len(head), 8)), default=0
    )


def judge(
    ended: int | None, processes: Sequence[Process], limit_s: float
) -> tuple[Literal["fits", "does not fit", "no record", "cannot run"], str]:
    """The verdict and its reason."""
    refused = sorted({name for process in processes for name in process.refused})
    also = f"; refused: {', '.join(refused)}" if refused else ""
    doubtful = [read for process in processes for read in process.reads if read.doubtful]
    if ended is None:
        return "cannot run", f"not done after {limit_s:.0f} s; a longer --limit may be needed"
    if ended != 0 and any(process.oom for process in processes):
        return "does not fit", "out of memory"
    if ended != 0:
        errors = list(dict.fromkeys(process.error for process in processes if process.error))
        why = f"ended with exit code {ended}" if ended > 0 else f"was ended by signal {-ended}"
        return "cannot run", f"the command {why}{': ' + errors[0] if errors else ''}{also}"
    if not processes:
        return "cannot run", "the command used no CUDA device"
    if refused:
        return "no record", f"the program went on after a refusal{also}"
    if doubtful:
        return (
            "no record",
            f"values that nobody knows were read at {len(doubtful)} places, named below",
        )
    caught = sum(device.ooms for process in processes for device in process.devices)
    return (
        "fits",
        f"after {caught} out-of-memory errors that the program caught"
        if caught
        else "ran to its end",
    )
