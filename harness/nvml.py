"""What NVML says of the devices: which ones a run sees, and a process that watches them.

NVML is the driver's own library, and its memory is what `nvidia-smi` and the paper read. Every
function takes the library, so that tests hand in another. Imports no torch.

    python -m harness.nvml INDEX,...   # sections on stdin, one a line; readings on stdout at its end
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from alst_impl.config import Frozen

INTERVAL_S = 0.05
"""Between two readings."""
LEAVING = 40
"""Readings that a device in use is given to become free before a run."""
IDLE_BYTES = 2 * 2**30
"""A device that reads more than this before a run is in use, whoever uses it: an idle one reads less
than 1 GiB, which the driver keeps for itself."""


class Device(Frozen):
    """One device that a run can see, or the part of one that MIG made."""

    index: int
    """NVML's number of the device; of a part, that of the whole."""
    uuid: str
    name: str
    memory_bytes: int | None
    """None where NVML does not tell, as of devices that share the host's memory."""
    part: int | None = None
    """Number of the MIG instance; None is a whole device."""


class Section(Frozen):
    """Extremes of all readings while a run did one thing; None where the device does not say."""

    doing: str
    """What rank 0 did, as it reports."""
    seconds: float
    readings: int
    used_bytes: int | None
    """Largest memory in use on the device, by whomever."""
    process_bytes: int | None
    """Largest sum over the processes that NVML lists; None where it did not tell of one of them."""
    sm_hz: list[float] | None
    """Lowest and highest clock of the multiprocessors."""
    watts: float | None
    """Highest power."""
    celsius: float | None
    """Highest temperature."""
    throttled: list[str]
    """Reasons for clocks below the highest, by NVML's names, each seen at least once."""


class DeviceReadings(Frozen):
    """What a device read over one run."""

    device: Device
    before_bytes: int | None
    """In use before the run started."""
    sections: list[Section]
    """In order of time; the same thing done again is another section."""
    strangers: list[str]
    """Processes that do not belong to the run, or what shows that there are some."""


def library() -> Any:
    """NVML, ready. Raises `ValueError` where there is none, saying what is missing."""
    try:
        import pynvml
    except ImportError:
        raise ValueError(
            "package 'nvidia-ml-py' is not installed; pip install nvidia-ml-py"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ValueError(f"no NVIDIA driver answers here (NVML: {error})") from None
    return pynvml


def driver_version() -> str:
    """Of the driver that answers."""
    return _text(library().nvmlSystemGetDriverVersion())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _or_none(nvml: Any, read: Callable[..., Any], *args: Any) -> Any:
    """What `read` gives; None where this device or driver does not offer it."""
    try:
        return read(*args)
    except nvml.NVMLError:
        return None


def handle_of(nvml: Any, device: Device) -> Any:
    """NVML's handle of `device`."""
    whole = nvml.nvmlDeviceGetHandleByIndex(device.index)
    if device.part is None:
        return whole
    return nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, device.part)


def _describe(nvml: Any, index: int, part: int | None = None) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    if part is not None:
        handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, part)
    return Device(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=getattr(_memory(nvml, handle), "total", None),
        part=part,
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """What NVML says of a device's memory; None where it has none of its own."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return None


def _parts(nvml: Any, index: int) -> list[Device] | None:
    """The MIG instances of a device; None where it is not split."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    mode = _or_none(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    found = []
    for part in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(nvml.NVMLError):  # slots without an instance
            found.append(_describe(nvml, index, part))
    return found


class _Silent(Frozen):
    """A device that is there and does not answer."""

    uuid: str = ""
    why: str


def visible_devices(nvml: Any, asked: str | None) -> list[Device]:
    """The devices that CUDA offers when `CUDA_VISIBLE_DEVICES` is `asked` (None: not set), in its order.

    Devices are counted as NVML does, which is what `CUDA_DEVICE_ORDER=PCI_BUS_ID` makes CUDA do. Names
    are whole or the beginning that tells them apart. As in CUDA, the first that names nothing ends the list,
    and one device named twice empties it. Of a device that MIG has split, an index is its first part.
    Raises `ValueError` for a device among them that does not answer; of others that is no matter.
    """
    whole: list[Device | _Silent] = []
    parts: list[Device] = []
    for index in range(_count(nvml)):
        try:
            instances = _parts(nvml, index)
            parts += instances or []
            # A split device without an instance offers nothing, and keeps its number.
            whole.append(instances[0] if instances else _describe(nvml, index))
        except nvml.NVMLError as error:
            whole.append(_Silent(why=f"device {index} does not answer (NVML: {error})"))
    found: list[Device] = []
    for device in whole if asked is None else _chosen(named(asked), whole, parts):
        if isinstance(device, _Silent):
            raise ValueError(f"{device.why}; name devices that do in CUDA_VISIBLE_DEVICES")
        found.append(device)
    return found


def _count(nvml: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        raise ValueError(f"the NVIDIA driver does not count its devices (NVML: {error})") from None


def named(asked: str) -> list[int] | list[str]:
    """What a value of `CUDA_VISIBLE_DEVICES` names: indices, or `GPU-...` or `MIG-...`, as the first does.

    What is of another kind ends the list, and so does a negative index; the same name twice empties it. An
    index may have anything behind it.
    """
    prefix = asked[:4]
    if prefix in ("GPU-", "MIG-"):
        words = asked.split(",")
        alike = list(itertools.takewhile(lambda word: word.startswith(prefix), words))
        return alike if len(set(alike)) == len(alike) else []
    numbers = [re.match(r"[+-]?\d+", word.strip()) for word in asked.split(",")]
    indices = (int(number.group()) if number else -1 for number in numbers)
    counted = list(itertools.takewhile(lambda index: index >= 0, indices))
    return counted if len(set(counted)) == len(counted) else []


def _chosen(
    names: Sequence[int | str], whole: Sequence[Device | _Silent], parts: Sequence[Device]
) -> list[Device | _Silent]:
    found: list[Device | _Silent] = []
    for name in names:
        device = _named(name, whole, parts)
        if device is None:
            break
        if device in found:
            return []
        found.append(device)
    return found


def _named(
    name: int | str, whole: Sequence[Device | _Silent], parts: Sequence[Device]
) -> Device | _Silent | None:
    if isinstance(name, int):
        return whole[name] if name < len(whole) else None
    distinct = {d.uuid: d for d in (*whole, *parts) if d.uuid.startswith(name)}
    return next(iter(distinct.values())) if len(distinct) == 1 else None


# -- watching -------------------------------------------------------------------------------------


def throttle_reasons(nvml: Any, bits: int) -> list[str]:
    """The names of `bits`, as NVML's constants have them; an idle clock is no throttling."""
    prefix, quiet = "nvmlClocksThrottleReason", ("None", "All", "GpuIdle")
    names = [n for n in dir(nvml) if n.startswith(prefix) and n.removeprefix(prefix) not in quiet]
    by_bit = {getattr(nvml, name): name.removeprefix(prefix) for name in names}
    return [name for bit, name in sorted(by_bit.items()) if bits & bit]


class Reading(Frozen):
    """One look at a device."""

    used_bytes: int | None
    processes: dict[int, int | None]
    """Process id -> its bytes, where NVML tells."""
    sm_hz: float | None
    watts: float | None
    celsius: float | None
    throttled: list[str]


def read(nvml: Any, handle: Any) -> Reading:
    """Look at a device once. A MIG instance has memory and processes alone."""
    clock = _or_none(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
    milliwatts = _or_none(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    celsius = _or_none(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    bits = _or_none(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    processes = _or_none(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return Reading(
        used_bytes=getattr(_memory(nvml, handle), "used", None),
        processes={p.pid: p.usedGpuMemory for p in processes},
        sm_hz=None if clock is None else clock * 1e6,
        watts=None if milliwatts is None else milliwatts / 1e3,
        celsius=celsius,
        throttled=throttle_reasons(nvml, bits or 0),
    )


def _first(nvml: Any, handle: Any, pause: Callable[[float], None]) -> Reading:
    """The reading before a run; whoever is leaving the device may take a moment to be gone."""
    reading = read(nvml, handle)
    for _ in range(LEAVING):
        if not reading.processes and (reading.used_bytes or 0) <= IDLE_BYTES:
            break
        pause(INTERVAL_S)
        reading = read(nvml, handle)
    return reading


class _Watched:
    """What a device has read so far, folded into sections."""

    def __init__(self, device: Device, first: Reading) -> None:
        self.device, self.before = device, first
        self.readings: list[Reading] = []
        self.sections: list[Section] = []
        self.processes: dict[int, int] = dict.fromkeys(first.processes, 0)
        """Process id -> most processes that were seen at once with it."""

    def add(self, reading: Reading) -> None:
        self.readings.append(reading)
        for pid in reading.processes:
            seen = self.processes.get(pid, 0)
            self.processes[pid] = max(seen, len(reading.processes))

    def close(self, doing: str, seconds: float) -> None:
        """End the section `doing`, if anything was read in it."""
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
    """Read `devices` until `next_line` gives "".

    `next_line(seconds)` waits so long and gives the next section's name, None if there is none yet, ""
    at the end. A line `pids N ...` says which processes belong to the run.
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
    """Whoever else was on a device.

    `seen` maps each process id to the most processes that were there together with it. In a container
    NVML may number processes as the host does; then none of `ours` is among them, and what counts is
    that a device has one rank.
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
    """A process of its own that watches devices while a run goes on; nothing where there are none.

    It is handed to `harness.client.submit` as part of a listener: what rank 0 reports to be doing begins
    a section.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._process: subprocess.Popen[str] | None = None
        self.readings: list[DeviceReadings] = []
        """Filled in at the end."""

    def __enter__(self) -> Sampler:
        if self._devices:
            root = str(Path(__file__).parents[1])
            search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            listed = json.dumps([device.model_dump() for device in self._devices])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.nvml", listed],
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
        """Whether there are no readings of what was to be watched."""
        return len(self.readings) != len(self._devices)

    def hear(self, event: dict[str, Any], leader: int = 0) -> None:
        """Take an event of the run; `leader` is the rank whose doings make sections."""
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
    """`next_line` of `watch` over an open file or pipe that nothing else reads."""
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
    """Watch the devices in the JSON list `listed`; the first line out says that watching has begun."""
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
