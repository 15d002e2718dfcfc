"""Readings of devices over a run, as records keep them. Imports no torch."""

from __future__ import annotations

from alst_impl.config import Frozen


class Device(Frozen):
    """One device that a run can see, or one MIG instance of it."""

    index: int
    """NVML's index of the device; an instance has the index of its device."""
    uuid: str
    name: str
    memory_bytes: int | None
    """None if NVML does not report it, as for devices that share the host's memory."""
    part: int | None = None
    """Index of the MIG instance; None for a whole device."""


class Section(Frozen):
    """Extremes of all readings during one activity of a run; None if the device does not report a value."""

    doing: str
    """The activity, as rank 0 reports it."""
    seconds: float
    readings: int
    used_bytes: int | None
    """Largest memory in use on the device, by all processes."""
    process_bytes: int | None
    """Largest sum over the processes that NVML lists; None if it does not report one of them."""
    sm_hz: list[float] | None
    """Lowest and highest clock of the multiprocessors."""
    watts: float | None
    """Highest power."""
    celsius: float | None
    """Highest temperature."""
    throttled: list[str]
    """Reasons for reduced clocks that were seen at least once, by NVML's names."""


class DeviceReadings(Frozen):
    """Readings of one device over one run."""

    device: Device
    before_bytes: int | None
    """Memory in use before the run started."""
    sections: list[Section]
    """In order of time; a repeated activity is a new section."""
    strangers: list[str]
    """Processes that do not belong to the run, or evidence that such processes exist."""
