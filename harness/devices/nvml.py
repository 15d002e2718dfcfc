"""Devices through NVML: which ones a run sees, and their current readings.

NVML is the driver's own library. `nvidia-smi` and the paper report its memory readings. Functions
take the library as an argument, so that tests can pass a fake. Imports no torch.
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
    """NVML, initialised. Raises `ValueError` naming the missing package or driver."""
    try:
        import pynvml
    except ImportError:
        raise ValueError(
            "package 'nvidia-ml-py' is not installed; pip install nvidia-ml-py"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ValueError(f"NVML found no NVIDIA driver on this machine ({error})") from None
    return pynvml


def driver_version() -> str:
    """Version of the NVIDIA driver."""
    return _text(library().nvmlSystemGetDriverVersion())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _or_none(nvml: Any, read: Callable[..., Any], *args: Any) -> Any:
    """Result of `read`; None if this device or driver does not support it."""
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
    """NVML's memory information of a device; None if the device has no memory of its own."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return None


def _parts(nvml: Any, index: int) -> list[Device] | None:
    """The MIG instances of a device; None if MIG is off."""
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
    """A device that NVML counts but cannot read."""

    uuid: str = ""
    why: str


def visible_devices(nvml: Any, asked: str | None) -> list[Device]:
    """The devices that CUDA offers if `CUDA_VISIBLE_DEVICES` is `asked` (None: not set), in CUDA's order.

    Indices are NVML's, which CUDA also uses under `CUDA_DEVICE_ORDER=PCI_BUS_ID`. A name is a UUID
    or a unique prefix of one. As in CUDA, the list ends at the first entry that names no device,
    and is empty if an entry occurs twice. The index of a device with MIG selects its first
    instance. Raises `ValueError` if a selected device does not answer.
    """
    whole: list[Device | _Silent] = []
    parts: list[Device] = []
    for index in range(_count(nvml)):
        try:
            instances = _parts(nvml, index)
            parts += instances or []
            # A device with MIG but without instances offers nothing, but keeps its index.
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
    """Entries of a `CUDA_VISIBLE_DEVICES` value: indices, `GPU-...` names or `MIG-...` names. The
    first entry decides which.

    The list ends at an entry of another kind and at a negative index, and is empty if an entry
    occurs twice. Text after an index is ignored.
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
    """Names of the throttle reasons in `bits`, from NVML's constants. An idle clock is not throttling."""
    prefix, quiet = "nvmlClocksThrottleReason", ("None", "All", "GpuIdle")
    names = [n for n in dir(nvml) if n.startswith(prefix) and n.removeprefix(prefix) not in quiet]
    by_bit = {getattr(nvml, name): name.removeprefix(prefix) for name in names}
    return [name for bit, name in sorted(by_bit.items()) if bits & bit]


class Reading(Frozen):
    """One reading of a device."""

    used_bytes: int | None
    processes: dict[int, int | None]
    """Process id -> its bytes; None if NVML does not report them."""
    sm_hz: float | None
    watts: float | None
    celsius: float | None
    throttled: list[str]


def read(nvml: Any, handle: Any) -> Reading:
    """Read a device once. A MIG instance only has memory and processes."""
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
