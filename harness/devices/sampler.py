"""A separate process that samples devices during a run. Imports no torch.

python -m harness.devices.sampler DEVICES   # stdin: section names, one per line; stdout: readings, at the end
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.devices.nvml import Reading, handle_of, library, read
from harness.records.readings import Device, DeviceReadings, Section

INTERVAL_S = 0.05
"""Time between two readings."""
LEAVING = 40
"""Maximum number of readings to wait for a device to become free before a run."""
IDLE_BYTES = 2 * 2**30
"""A device that reads more than this before a run is in use. An idle device reads less than 1 GiB,
which the driver reserves."""


def _first(nvml: Any, handle: Any, pause: Callable[[float], None]) -> Reading:
    """The reading before a run. Waits a moment for exiting processes to leave the device."""
    reading = read(nvml, handle)
    for _ in range(LEAVING):
        if not reading.processes and (reading.used_bytes or 0) <= IDLE_BYTES:
            break
        pause(INTERVAL_S)
        reading = read(nvml, handle)
    return reading


class _Watched:
    """Readings of one device, aggregated into sections."""

    def __init__(self, device: Device, first: Reading) -> None:
        self.device, self.before = device, first
        self.readings: list[Reading] = []
        self.sections: list[Section] = []
        self.processes: dict[int, int] = dict.fromkeys(first.processes, 0)
        """Process id -> largest number of processes that were seen together, itself included."""

    def add(self, reading: Reading) -> None:
        self.readings.append(reading)
        for pid in reading.processes:
            seen = self.processes.get(pid, 0)
            self.processes[pid] = max(seen, len(reading.processes))

    def close(self, doing: str, seconds: float) -> None:
        """End section `doing`. A section without readings is dropped."""
        if self.readings:
            self.sections.append(_section(doing, seconds, self.readings))
        self.readings = []


def _section(doing: str, seconds: float, readings: Sequence[Reading]) -> Section:
    clocks = [r.sm_hz for r in readings if r.sm_hz is not None]
    told = [list(r.processes.values()) for r in readings if r.processes]
    held = [sum(b for b in each if b is not None) for each in told if None not in each]
    return Section(
        doing=doing,
        seconds=seconds,
        readings=len(readings),
        used_bytes=max((r.used_bytes for r in readings if r.used_bytes is not None), default=None),
        process_bytes=max(held, default=None) if len(held) == len(told) else None,
        sm_hz=[min(clocks), max(clocks)] if clocks else None,
        watts=max((r.watts for r in readings if r.watts is not None), default=None),
        celsius=max((r.celsius for r in readings if r.celsius is not None), default=None),
        throttled=list(dict.fromkeys(name for r in readings for name in r.throttled)),
    )


def watch(
    nvml: Any,
    devices: Sequence[Device],
    next_line: Callable[[float], str | None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[DeviceReadings]:
    """Read `devices` until `next_line` returns "".

    `next_line(seconds)` waits up to `seconds` and returns the name of the next section, None if
    there is none yet, "" at the end. A line `pids N ...` lists the processes of the run.
    """
    handles = [handle_of(nvml, device) for device in devices]
    watched = [_Watched(d, _first(nvml, h, pause)) for d, h in zip(devices, handles, strict=True)]
    ours: set[int] = set()
    doing, begin = "start-up", clock()
    while (line := next_line(INTERVAL_S)) != "":
        if line is not None and line.startswith("pids "):
            ours = {int(word) for word in line.split()[1:]}
        elif line is not None:
            for each in watched:
                each.close(doing, clock() - begin)
            doing, begin = line.strip(), clock()
        for each, handle in zip(watched, handles, strict=True):
            each.add(read(nvml, handle))
    for each in watched:
        each.close(doing, clock() - begin)
    return [_finished(each, ours) for each in watched]


def _finished(watched: _Watched, ours: set[int]) -> DeviceReadings:
    return DeviceReadings(
        device=watched.device,
        before_bytes=watched.before.used_bytes,
        sections=watched.sections,
        strangers=strangers(watched.before, watched.processes, ours),
    )


def strangers(before: Reading, seen: dict[int, int], ours: Iterable[int]) -> list[str]:
    """Messages about processes on a device that do not belong to the run.

    `seen` maps each process id to the largest number of processes seen together with it, itself
    included. In a container NVML may report the host's process ids, so `seen` has none of `ours`.
    Then the test is whether the device of one rank ever had several processes.
    """
    found = [f"process {pid} before the run" for pid in before.processes]
    used = before.used_bytes or 0
    if not found and used > IDLE_BYTES:
        found = [f"{used / 2**30:.1f} GiB in use before the run"]
    ours = set(ours)
    others = [pid for pid in seen if pid not in before.processes and pid not in ours]
    if ours & set(seen):
        found += [f"process {pid} during the run" for pid in others]
    elif any(seen[pid] > 1 for pid in others):
        found.append(
            f"{max(seen[pid] for pid in others)} processes at once on the device of one rank"
        )
    return found


class Sampler:
    """Runs the sampler process during a run. Does nothing without devices.

    `hear` is part of the listener that `harness.processes.client.submit` takes. Each progress
    report of rank 0 begins a section.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._process: subprocess.Popen[str] | None = None
        self.readings: list[DeviceReadings] = []
        """Set when the sampler has ended."""

    def __enter__(self) -> Sampler:
        if self._devices:
            root = str(Path(__file__).parents[2])
            search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            listed = json.dumps([device.model_dump() for device in self._devices])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.devices.sampler", listed],
                env={**os.environ, "PYTHONPATH": search},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; the end of its input ends it
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # the first reading is from before the run
        return self

    @property
    def ended_early(self) -> bool:
        """Whether the sampler ended without readings of its devices."""
        return len(self.readings) != len(self._devices)

    def hear(self, event: dict[str, Any], leader: int = 0) -> None:
        """Handle an event of the run. Progress reports of rank `leader` begin sections."""
        if event["event"] == "started":
            self._say("pids " + " ".join(map(str, event["pids"])))
        elif event["rank"] == leader:
            self._say(event["doing"])

    def _say(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(" ".join(line.split()) + "\n")
                self._process.stdin.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        output, _ = self._process.communicate()
        if self._process.returncode == 0:
            self.readings = [DeviceReadings(**raw) for raw in json.loads(output)]


def lines_of(descriptor: int) -> Callable[[float], str | None]:
    """A `next_line` for `watch` that reads a file or pipe. Nothing else may read it."""
    waiting = bytearray()

    def next_line(seconds: float) -> str | None:
        if b"\n" not in waiting:
            readable, _, _ = select.select([descriptor], [], [], seconds)
            if not readable:
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return ""
            waiting.extend(chunk)
        if b"\n" not in waiting:
            return None
        line, _, rest = bytes(waiting).partition(b"\n")
        waiting[:] = rest
        return line.decode() or " "

    return next_line


def main(listed: str) -> None:
    """Watch the devices in the JSON list `listed`. The first output line says that watching has begun."""
    nvml = library()
    devices = [Device(**raw) for raw in json.loads(listed)]
    next_line = lines_of(sys.stdin.fileno())
    announced = False

    def announcing(seconds: float) -> str | None:
        nonlocal announced
        if not announced:  # `watch` asks for the first time after its first reading
            announced = True
            print(flush=True)
        return next_line(seconds)

    try:
        readings = watch(nvml, devices, announcing)
    except nvml.NVMLError as error:
        sys.exit(f"alst: a device stopped answering while it was watched (NVML: {error})")
    print(json.dumps([r.model_dump(mode="json") for r in readings]))


if __name__ == "__main__":
    main(sys.argv[1])
