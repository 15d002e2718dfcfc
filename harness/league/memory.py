"""Runs a peer's script on phantom devices: its bytes at one length, and its longest sequence."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness.cells import league
from harness.cells.hardware import load_hardware
from harness.cells.league import Task
from harness.cells.units import bytes_text, length_text
from harness.league.folders import hollow_model
from harness.league.scripts import command, environment
from harness.phantom import session
from harness.phantom.session import Process
from harness.records.league import FRESH, Alive, Step, Verdict

GIB = 2**30
UNIT = 256
"""Lengths of a search are multiples of this many tokens per rank."""
PRECISION = 0.03
"""Relative width of the bracket at which a search ends."""
ATTEMPTS = 12
"""At most, of a search."""
FIRST = 2**17
"""Length that a search tries first where nothing is known."""
LIMIT_S = 1500
FULL = 0.97
"""Share of the device that a first guess fills."""
LINES = 8
"""Largest of what is alive that a record keeps."""

Found = tuple[Verdict, str, Step | None]
"""Verdict, why in a line, and memory."""


def step_at(task: Task, seqlen: int) -> Found:
    """Memory of two steps at `seqlen`. The verdict is "does not fit" as well where a node's host memory would not do."""
    asked = league.league()
    log = FRESH / f"{task.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="league-") as scratch, log.open("w") as file:
        folder = Path(scratch)
        hollow_model(folder / "model", task.model)
        sites = _sites(task, seqlen, folder)
        result = session.run(
            command(
                task,
                task.gpus,
                *("--model", str(folder / "model"), "--seqlen", str(seqlen)),
                *("--states", task.states),
            ),
            asked.hardware,
            gpus=task.gpus,
            outside_bytes=round(asked.outside_gib[task.gpus] * GIB),
            limit_s=LIMIT_S,
            sites=sites,
            hollow_host=True,  # states of a whole model are more than this machine has room for
            output=file.fileno(),
            errors=file.fileno(),
            base=environment(task, folder),
        )
    step = _step(result.processes, seqlen)
    if result.verdict == "no record":
        return "no record", "; ".join([result.reason, *_doubtful(result.processes)]), step
    if result.verdict != "fits":
        return result.verdict, result.reason, step
    assert step is not None
    return _on_host(task, step)


def _sites(task: Task, seqlen: int, folder: Path) -> Path | None:
    """The peer's reviewed reads of unknown values for a run, in `folder`; None if it has none."""
    path = league.folder() / task.peer / "sites.yaml"
    if not path.is_file():
        return None
    shards = task.gpus if league.peers()[task.peer].sequence_parallel else 1
    made = folder / "sites.yaml"
    made.write_text(path.read_text().replace('"{local_tokens}"', str(seqlen // shards)))
    return made


def _doubtful(processes: list[Process]) -> list[str]:
    """Places that read values that nobody knows, and have no answer in `sites.yaml`."""
    reads = [read for process in processes for read in process.reads if read.doubtful]
    places = [
        f"{_short(read.file)}:{read.line} in {read.function}, {read.bytes} bytes" for read in reads
    ]
    return list(dict.fromkeys(places))


def _on_host(task: Task, step: Step) -> Found:
    """The verdict on a step that fits on the device."""
    row = load_hardware(league.league().hardware)
    held = min(task.gpus, row.devices_per_node) * step.host_bytes
    if row.host_memory_bytes is not None and held > row.host_memory_bytes:
        room = bytes_text(row.host_memory_bytes)
        return "does not fit", f"{bytes_text(held)} of host memory, of {room}", step
    return "fits", "ran to its end", step


def _step(processes: list[Process], seqlen: int) -> Step | None:
    used = [(use, process) for process in processes for use in process.devices]
    if not used:
        return None
    use, process = max(used, key=lambda each: each[0].allocated_bytes)
    alive = process.oom.alive if process.oom else use.alive
    return Step(
        seqlen=seqlen,
        allocated_bytes=use.allocated_bytes,
        reserved_bytes=use.reserved_bytes,
        pinned_bytes=process.pinned_bytes,
        pageable_bytes=process.pageable_bytes,
        attention=process.attention,
        alive=[
            Alive(
                where=f"{each.where} ({_short(each.line)})", bytes=each.bytes, tensors=each.tensors
            )
            for each in sorted(alive, key=lambda each: -each.bytes)[:LINES]
        ],
    )


def _short(line: str) -> str:
    """A place in a program, without the folders of this machine."""
    return " ".join("/".join(word.rsplit("/", 3)[-3:]) for word in line.split())


def longest(
    task: Task, known: list[Step], above: int | None
) -> tuple[Verdict, str, Step | None, int | None]:
    """The longest sequence that fits, bracketed to `PRECISION`, and the shortest length seen not to.

    `known` are steps that fit at other lengths, `above` is a length that does not. A line through the last two steps
    gives the first guess.
    """
    fits = max(known, key=lambda step: step.seqlen, default=None)
    reason = ""
    unit = UNIT * task.gpus
    known = sorted(known, key=lambda step: step.seqlen)
    for _ in range(ATTEMPTS):
        seqlen = _next(task, known, above, unit)
        if seqlen is None:
            break
        verdict, said, step = step_at(task, seqlen)
        if verdict == "fits":
            assert step is not None
            fits = step
            known = sorted([*known, step], key=lambda step: step.seqlen)
        elif verdict == "does not fit":
            above, reason = seqlen, said
        else:
            return verdict, f"at {length_text(seqlen)} tokens: {said}", fits, above
    if _next(task, known, above, unit) is not None:
        return "no record", f"no end after {ATTEMPTS} lengths", fits, above
    if fits is None:
        return "does not fit", reason or "no length fits", None, above
    return "fits", reason, fits, above


def _next(task: Task, known: list[Step], above: int | None, unit: int) -> int | None:
    """The length to try next; None if the bracket is narrow enough."""
    low = known[-1].seqlen if known else 0
    guess = _crossing(task, known) if len(known) > 1 else None
    if above is None:
        seqlen = max(guess or 2 * low, low * (1 + PRECISION)) if known else FIRST
        return _rounded(seqlen, low, unit)
    if above - low <= max(unit, PRECISION * low):
        return None
    if guess is None or not low < guess < above:
        guess = (low + above) / 2
    quarter = (above - low) / 4
    seqlen = _rounded(min(max(guess, low + quarter), above - quarter), low, unit)
    return seqlen if seqlen < above else None


def _rounded(seqlen: float, low: int, unit: int) -> int:
    """A multiple of `unit` near `seqlen`, above `low`."""
    return max(int(seqlen / unit), low // unit + 1) * unit


def _crossing(task: Task, known: list[Step]) -> float | None:
    """The length at which a line through the last two steps fills the device; None if it does not rise."""
    asked = league.league()
    first, last = known[-2:]
    slope = (last.reserved_bytes - first.reserved_bytes) / (last.seqlen - first.seqlen)
    room = load_hardware(asked.hardware).usable_bytes - asked.outside_gib[task.gpus] * GIB
    if slope <= 0:
        return None
    return last.seqlen + (FULL * room - last.reserved_bytes) / slope
