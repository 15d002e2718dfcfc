"""`alst phantom`: runs a training command on CUDA devices that have memory but no arithmetic."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.phantom.session import Held, Process, Read, Result, run

GIB = 2**30


Command = Annotated[list[str], typer.Argument(help="The command, after `--`.")]
Gpus = Annotated[
    int, typer.Option("--gpus", help="Devices; with a launcher or --rank, ranks on all nodes.")
]
HardwareName = Annotated[
    str, typer.Option("--hardware", help="Row of the hardware table, or a YAML file with one.")
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        help="Run this rank of --gpus alone. With a launcher in the command, it is 0 by default.",
    ),
]
AllRanks = Annotated[
    bool, typer.Option("--all-ranks", help="Let a launcher in the command start all its ranks.")
]
OutsideGib = Annotated[
    float,
    typer.Option(
        "--outside-gib",
        help="GiB of each device outside PyTorch's allocator: CUDA's context, kernels, NCCL.",
    ),
]
LimitS = Annotated[
    float, typer.Option("--limit", help="Seconds after which the command is stopped.")
]
Sites = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        help="YAML list of places in your own code that may read values that are not known.",
    ),
]
HollowHost = Annotated[
    bool | None,
    typer.Option(
        "--hollow-host/--full-host",
        help="Never write float tensors of 1 MiB or more on the host. Offload of models larger than this machine's "
        "memory then runs; the values of these tensors are zeros.",
        show_default="if they would take half of this machine's free memory",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def phantom(
    command: Command,
    gpus: Gpus = 1,
    hardware: HardwareName = "h100-80gb",
    rank: Rank = None,
    outside_gib: OutsideGib = 0.0,
    limit_s: LimitS = 3600,
    sites: Sites = None,
    hollow_host: HollowHost = None,
    all_ranks: AllRanks = False,
    as_json: AsJson = False,
) -> int:
    """Say whether a training command fits, on a machine without a GPU.

    The command runs unmodified on PyTorch's CUDA build, over a CUDA runtime in which memory is real and
    arithmetic is not. It reports peak memory allocated and reserved by rank, page-locked host memory, the real
    out-of-memory error, and what is alive at the peak. It does not report times, losses or other values made on
    the device, rows of the CUDA profiler, or replays of CUDA graphs.

    Where the command starts its ranks with torchrun (or a launcher that calls it), one of them runs for all, which are
    assumed to hold the same memory. With --rank it is that one, also of a command that is one process. With --all-ranks
    they all run; collectives have no results then.

    If the program reads a value of 16 bytes or less that is not known, the verdict is `no record`, unless that place
    in the code is reviewed. Exit code 0: fits. 1: does not fit. 2: no record, or cannot run.

    Examples: alst phantom -- python train.py; alst phantom --gpus 4 -- torchrun --nproc-per-node 4 train.py;
    alst phantom --gpus 64 --rank 0 -- python train.py; alst phantom --gpus 8 -- ./run.sh
    """
    if not 0 < limit_s < math.inf:
        raise ValueError(f"--limit {limit_s}: must be a positive number of seconds, such as 3600")
    if not math.isfinite(outside_gib):
        raise ValueError(f"--outside-gib {outside_gib}: must be a number of GiB, such as 1.5")
    if rank is not None and all_ranks:
        raise ValueError(f"--rank {rank} runs one rank, and --all-ranks all; leave one of them out")
    if rank is not None and Path(command[0]).name == "deepspeed":
        raise ValueError(
            f"--rank runs one process, and {command[0]} starts several; write `python SCRIPT` after `--`"
        )
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = run(
            command,
            hardware,
            gpus,
            rank,
            round(outside_gib * GIB),
            limit_s,
            sites,
            hollow_host,
            output=sys.stderr.fileno() if as_json else None,
            on_progress=lambda seconds, used: status.update(
                f"{seconds:.0f} s, {used / GIB:.1f} GiB in use on the fullest device"
            ),
            all_ranks=all_ranks,
        )
    print(result.model_dump_json(indent=1) if as_json else text(result))
    return result.exit_code


def text(result: Result) -> str:
    """The result as lines for a terminal; the last one is the verdict."""
    lines = []
    for process in result.processes:
        lines += used(process)
        if process.attention:
            lines.append(f"  attention kernels: {', '.join(process.attention)}")
    fullest = max(
        (
            (use.allocated_bytes, process, use)
            for process in result.processes
            for use in process.devices
        ),
        key=lambda each: each[0],
        default=None,
    )
    failed = next((process for process in result.processes if process.oom), None)
    if failed is not None and failed.oom is not None:
        oom = failed.oom
        lines.append(
            f"out of memory on rank {failed.rank}: {oom.asked_bytes / GIB:.2f} GiB asked, {oom.free_bytes / GIB:.2f} "
            f"GiB free, in {oom.where} ({oom.line}); alive then:"
        )
        lines += held(oom.alive)
    elif fullest is not None:
        lines.append(f"alive at the peak of rank {fullest[1].rank}:")
        lines += held(fullest[2].alive)
    lines += reads(result)
    return "\n".join([*lines, verdict(result)])


def verdict(result: Result) -> str:
    """One line: whether it fits, what the fullest device holds, and which ranks ran."""
    said = [f"{result.verdict}: {result.reason}"]
    uses = [(use, process) for process in result.processes for use in process.devices]
    if uses:
        use, process = max(uses, key=lambda each: each[0].reserved_bytes)
        said.append(
            f"{use.reserved_bytes / GIB:.2f} of {use.total_bytes / GIB:.2f} GiB reserved, "
            f"{use.allocated_bytes / GIB:.2f} allocated on {result.hardware}"
        )
        if process.stands_for > 1:
            said.append(f"rank {process.rank} ran for all {process.stands_for}")
    if result.hollow_host:
        said.append("large tensors on the host were not written (--hollow-host)")
    return f"{'; '.join(said)} ({result.seconds:.1f} s here)"


def used(process: Process) -> list[str]:
    """One line for each device of a process."""
    return [
        f"rank {process.rank}, device {use.device} ({use.name}): allocated {use.allocated_bytes / GIB:.2f} GiB, "
        f"reserved {use.reserved_bytes / GIB:.2f} of {use.total_bytes / GIB:.2f} GiB, {use.retries} retries; "
        f"host pinned {process.pinned_bytes / GIB:.2f} GiB, other {process.pageable_bytes / GIB:.2f} GiB"
        for use in process.devices
    ]


def held(alive: Sequence[Held]) -> list[str]:
    """One line for each line of the program that holds memory."""
    return [
        f"  {each.bytes / GIB:8.3f} GiB in {each.tensors} tensors, largest {each.largest_bytes / GIB:.3f}: "
        f"{each.where} ({each.line})"
        for each in alive
    ]


def reads(result: Result) -> list[str]:
    """One line for each read of an unknown value, answered or not, and what to do about them."""
    found: dict[tuple[str, int, int], Read] = {}
    for process in result.processes:
        for read in process.reads:
            found.setdefault((read.file, read.line, read.bytes), read)
    lines = []
    for read in found.values():
        place = f"{read.file}:{read.line} in {read.function}" + (
            f", from {read.caller}" if read.caller else ""
        )
        if read.why is not None:
            lines.append(f"unknown value answered {read.answer} at {place}: {read.why}")
        elif read.doubtful:
            lines.append(f"unknown value of {read.bytes} bytes read (answered 0) at {place}")
    if any(read.doubtful for read in found.values()):
        lines.append(
            "If none of them changes what the program allocates, list them in a YAML file for --sites: "
            "'- {file: ..., function: ..., answer: 0, why: ...}'"
        )
    return lines
