"""A fake NVML with devices that a test defines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


class FakeError(Exception):
    """As `pynvml.NVMLError`."""


class FakeNotSupported(FakeError):
    """As `pynvml.NVMLError_NotSupported`."""


class FakeNvml:
    """The functions of pynvml that the suite uses, over devices that are plain dictionaries."""

    NVMLError = FakeError
    NVMLError_NotSupported = FakeNotSupported
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksThrottleReasonNone = 0
    nvmlClocksThrottleReasonAll = 511
    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwThermalSlowdown = 64

    def __init__(self, devices: list[dict[str, Any]]) -> None:
        self.devices = devices

    def nvmlDeviceGetCount(self) -> int:
        """Number of devices, without MIG instances."""
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        """The device's dictionary is its handle."""
        if self.devices[index].get("lost"):
            raise FakeError("GPU is lost")
        return self.devices[index]

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> bytes:
        """Bytes, as some versions return."""
        return str(handle["uuid"]).encode()

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        """Text, as other versions return."""
        return str(handle.get("name", H100))

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:
        """The next reading of a device. The last one repeats."""
        if handle.get("unified"):
            raise FakeNotSupported("Not Supported")
        used = handle.get("used", [0])
        return SimpleNamespace(
            total=80 * GIB, used=used.pop(0) if handle.get("moves") and len(used) > 1 else used[0]
        )

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        """Raises for devices without MIG."""
        if "mig" not in handle:
            raise FakeError("Not Supported")
        return [1 if handle["mig"] else 0, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        """Number of slots, used or not."""
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(
        self, handle: dict[str, Any], part: int
    ) -> dict[str, Any]:
        """The MIG instance in a slot."""
        if part >= len(handle["mig"]):
            raise FakeError("Not Found")
        found: dict[str, Any] = handle["mig"][part]
        return found

    def nvmlDeviceGetClockInfo(self, handle: dict[str, Any], kind: int) -> int:
        """Clock in MHz."""
        return int(self._told(handle, "mhz"))

    def nvmlDeviceGetPowerUsage(self, handle: dict[str, Any]) -> int:
        """Power in milliwatts."""
        return int(self._told(handle, "milliwatts"))

    def nvmlDeviceGetTemperature(self, handle: dict[str, Any], sensor: int) -> int:
        """Temperature in degrees Celsius."""
        return int(self._told(handle, "celsius"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: dict[str, Any]) -> int:
        """Throttle reasons as bits."""
        return int(self._told(handle, "reasons"))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[SimpleNamespace]:
        """The processes that hold memory."""
        found = handle.get("processes", {})
        current = found.pop(0) if isinstance(found, list) and len(found) > 1 else found
        current = current[0] if isinstance(current, list) else current
        return [SimpleNamespace(pid=pid, usedGpuMemory=b) for pid, b in current.items()]

    def _told(self, handle: dict[str, Any], what: str) -> Any:
        if what not in handle:
            raise FakeError("Not Supported")
        return handle[what]


def device(number: int, **more: Any) -> dict[str, Any]:
    """A device without MIG."""
    return {"uuid": f"GPU-{number}{number}{number}-aaaa", **more}
