"""What devices read over a run: data of records. Imports no torch."""

from __future__ import annotations

from alst_impl.config import Frozen


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
