"""What NVML says of the devices: which ones a run sees, and what one reads now.

NVML is the driver's own library, and its memory is what `nvidia-smi` and the paper read. Every
function takes the library, so that tests hand in another. Imports no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from alst_impl.config import Frozen
from harness.records.readings import Device


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
