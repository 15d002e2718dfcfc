"""Readings of NVML, tested with a fake library."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nvml import GIB, H100, FakeNvml, device

from harness.devices import nvml, sampler
from harness.devices.nvml import throttle_reasons, visible_devices
from harness.devices.sampler import Sampler, lines_of, strangers, watch
from harness.records.readings import Device, DeviceReadings

FOUR = [device(n) for n in range(4)]


@pytest.mark.parametrize(
    ("asked", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-333-aaaa,1", [3]),  # the first decides the kind of all
        ("1,GPU-333-aaaa", [1]),
        ("GPU-1", [1]),  # a unique prefix
        ("", []),
        ("-1", []),
        ("1,7,2", [1]),  # an unknown device ends the list
        ("1,1", []),  # a duplicate empties the list
        ("GPU-1,GPU-111", []),
        ("1gpu2,2ampere", [1, 2]),
        ("GPU-", []),  # a prefix of all names selects none
    ],
)
def test_visible_devices_are_those_of_cuda(asked: str | None, indices: list[int]) -> None:
    """Indices and UUIDs, in the requested order."""
    assert [d.index for d in visible_devices(FakeNvml(FOUR), asked)] == indices


WORDS = [
    "0",
    "1",
    " 2",
    "7",
    "-1",
    "+3",
    "03",
    "1gpu2",
    "",
    "x",
    "GPU-1",
    "GPU-333",
    "GPU-",
    "GPU-7",
]


@pytest.mark.parametrize("first", [*WORDS, "GPU-111-aaaa", "MIG-0"])
def test_torch_sees_the_same_devices(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list of up to three words means the same to us and to torch before CUDA starts."""
    fake = FakeNvml(FOUR)
    uuids = [each["uuid"] for each in FOUR]
    lists = [",".join([first, *rest]) for n in range(3) for rest in product(WORDS, repeat=n)]
    for asked in lists:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
        names = torch.cuda._parse_visible_devices()
        assert names == nvml.named(asked), asked
        if names and isinstance(names[0], str):
            names = torch.cuda._transform_uuid_to_ordinals(names, uuids)
        expected = list(takewhile(lambda index: index < len(FOUR), names))
        assert [d.index for d in visible_devices(fake, asked)] == expected, asked


@pytest.mark.parametrize("asked", ["1", "GPU-1"])
def test_a_lost_device_does_not_affect_others(asked: str) -> None:
    """It keeps its index, so the indices of others do not change."""
    fake = FakeNvml([device(0, lost=True), device(1)])
    assert [d.index for d in visible_devices(fake, asked)] == [1]


@pytest.mark.parametrize("asked", [None, "0", "1,0"])
def test_selecting_a_lost_device_is_a_one_line_error(asked: str | None) -> None:
    """The error names the device and a fix."""
    fake = FakeNvml([device(0, lost=True), device(1)])
    said = r"device 0 does not answer \(NVML: GPU is lost\).*CUDA_VISIBLE_DEVICES"
    with pytest.raises(ValueError, match=said):
        visible_devices(fake, asked)


def test_a_device_that_shares_the_hosts_memory_has_none_of_its_own() -> None:
    """Its memory is None, not 0. Clocks and processes are read as for any other device."""
    (read,) = watched([device(0, unified=True, mhz=2000, processes=[{}, {11: 2 * GIB}])], None)
    (section,) = read.sections
    assert (read.device.memory_bytes, read.before_bytes, section.used_bytes) == (None, None, None)
    assert (section.sm_hz, section.process_bytes) == ([2e9, 2e9], 2 * GIB)


def test_unreported_process_memory_is_none() -> None:
    """The sum over processes is None, too, even if other processes or other readings report memory."""
    found = [{}, {11: 2 * GIB}, {11: 2 * GIB, 12: None}]
    (read,) = watched([device(0, processes=found)], "pids 11 12", None, None)
    assert read.sections[0].process_bytes is None


def test_mig_instances_are_selected_by_index_and_uuid() -> None:
    """An index is the first MIG instance, and each instance is visible by its UUID, beside a device without MIG."""
    parts = [{"uuid": f"MIG-{n}", "name": f"{H100} MIG 1g.10gb"} for n in range(2)]
    fake = FakeNvml([device(0, mig=parts), device(1, mig=[])])
    first, second = visible_devices(fake, None)
    assert (first.index, first.part, first.uuid) == (0, 0, "MIG-0")
    assert first.name.endswith("MIG 1g.10gb")
    assert (second.index, second.part, second.name) == (1, None, H100)
    (other,) = visible_devices(fake, "MIG-1")
    assert (other.index, other.part) == (0, 1)


def test_a_missing_library_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is missing: the package, or the driver."""
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with pytest.raises(ValueError, match="found no NVIDIA driver"):
        nvml.library()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(ValueError, match="pip install nvidia-ml-py"):
        nvml.library()


def spoken(*lines: str | None) -> Iterator[str | None]:
    """`next_line` for `watch`: the given lines, then the end."""
    yield from lines
    yield ""


def watched(devices: list[dict[str, Any]], *lines: str | None) -> list[DeviceReadings]:
    """Results of `watch` for devices and lines. The fake clock advances by a second per reading."""
    fake = FakeNvml(devices)
    script, ticks = spoken(*lines), iter(range(1000))
    found = visible_devices(fake, None)
    return watch(fake, found, lambda _: next(script), lambda: next(ticks), lambda _: None)


def test_sections_have_the_extremes_of_their_readings() -> None:
    """Memory, clocks, power, temperature and throttling during each activity that rank 0 reports."""
    one = device(
        0,
        used=[GIB, 3 * GIB, 9 * GIB, 4 * GIB],
        moves=True,
        mhz=1755,
        milliwatts=612_500,
        celsius=61,
        reasons=4 | 64 | 1,
        processes={11: 2 * GIB},
    )
    # The first memory reading describes the device. The second is the one before the run.
    one["used"].insert(0, GIB)
    one["processes"] = [{}, {11: 2 * GIB}]
    (read,) = watched([one], "pids 11", None, "memory step, forward", None)
    assert read.before_bytes == GIB
    assert [s.doing for s in read.sections] == ["start-up", "memory step, forward"]
    start, step = read.sections
    assert (start.used_bytes, start.readings) == (9 * GIB, 2)
    assert step.used_bytes == 4 * GIB
    assert step.process_bytes == 2 * GIB
    assert step.sm_hz == [1755e6, 1755e6]
    assert (step.watts, step.celsius) == (612.5, 61)
    assert step.throttled == ["SwPowerCap", "HwThermalSlowdown"]
    assert read.strangers == []


def test_exiting_processes_are_no_strangers() -> None:
    """Processes of the previous cell may take a moment to exit."""
    leaving = device(0, used=[9 * GIB, 9 * GIB, GIB], moves=True, processes=[{7: None}, {}])
    (read,) = watched([leaving], "pids 11", None)
    assert (read.before_bytes, read.strangers) == (GIB, [])
    staying = device(0, used=[9 * GIB])
    (read,) = watched([staying], "pids 11", None)
    assert read.strangers == ["9.0 GiB in use before the run"]


def test_unsupported_readings_are_none() -> None:
    """A MIG instance has no clock, power or temperature."""
    (read,) = watched([device(0)], None)
    (section,) = read.sections
    assert (section.sm_hz, section.watts, section.celsius, section.throttled) == (
        None,
        None,
        None,
        [],
    )
    assert section.process_bytes is None


def test_several_devices_are_watched_apart() -> None:
    """Each device has its own readings."""
    reads = watched([device(0, used=[GIB]), device(1, used=[5 * GIB])], None)
    assert [r.sections[0].used_bytes for r in reads] == [GIB, 5 * GIB]


READING = nvml.Reading(
    used_bytes=GIB, processes={}, sm_hz=None, watts=None, celsius=None, throttled=[]
)


@pytest.mark.parametrize(
    ("before", "seen", "ours", "found"),
    [
        ({}, {11: 1}, {11}, 0),
        ({}, {11: 2, 99: 2}, {11}, 1),  # a stranger during the run
        ({99: None}, {99: 1, 11: 2}, {11}, 1),  # a stranger before the run
        ({}, {71_234: 1}, {11}, 0),  # a container: our process under the host's id
        ({}, {71_234: 2, 71_999: 2}, {11}, 1),  # our process and a stranger
        ({}, {}, {11}, 0),  # a container that hides all processes
    ],
)
def test_strangers_are_found(
    before: dict[int, int | None], seen: dict[int, int], ours: set[int], found: int
) -> None:
    """Strangers are found by process id, or by their number if the ids are the host's."""
    reading = READING.model_copy(update={"processes": before})
    assert len(strangers(reading, seen, ours)) == found


def test_memory_in_use_before_a_run_is_a_stranger() -> None:
    """The memory of hidden processes still shows."""
    reading = READING.model_copy(update={"used_bytes": 30 * GIB})
    assert strangers(reading, {}, {11}) == ["30.0 GiB in use before the run"]


def test_throttle_reasons_have_nvmls_names() -> None:
    """An idle clock is not a throttle reason."""
    assert throttle_reasons(FakeNvml([]), 1) == []
    assert throttle_reasons(FakeNvml([]), 4) == ["SwPowerCap"]


def test_the_real_library_names_its_reasons() -> None:
    """The installed package has the constants that `throttle_reasons` looks for."""
    import pynvml

    assert throttle_reasons(pynvml, 0x4 | 0x40) == ["SwPowerCap", "HwThermalSlowdown"]
    for name in vars(FakeNvml):
        if name.startswith(("nvml", "NVML")):
            assert hasattr(pynvml, name), name


def test_lines_are_read_as_they_come() -> None:
    """Half a line gives None, two lines at once give two, and the end of the input gives ""."""
    reader, writer = os.pipe()
    with io.FileIO(reader) as stream, io.FileIO(writer, "w") as out:
        next_line = lines_of(stream.fileno())
        assert next_line(0) is None
        out.write(b"pids 1 2\nsta")
        assert next_line(0) == "pids 1 2"
        assert next_line(0) is None
        out.write(b"rt\nstop\n")
        assert [next_line(0), next_line(0), next_line(0)] == ["start", "stop", None]
        out.close()
        assert next_line(0) == ""


def test_a_device_is_passed_to_the_sampler() -> None:
    """The sampler gets its devices as JSON and reads them back equal."""
    (found,) = visible_devices(FakeNvml([device(0)]), None)
    assert Device(**found.model_dump()) == found


STAND_IN = """
from fake_nvml import FakeError as NVMLError
from fake_nvml import GIB, FakeNvml, device

fake = FakeNvml([device(0, used=[GIB])])
globals().update({n: getattr(fake, n) for n in dir(fake) if n.startswith(("nvml", "NVML_"))})


def nvmlInit():
    pass
"""


def test_the_sampler_is_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the progress of rank 0, and its readings arrive when the run has ended."""
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    helpers = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{helpers}")
    one = Device(index=0, uuid="GPU-0", name=H100, memory_bytes=80 * GIB)
    with Sampler([one]) as sampler:
        sampler.hear({"event": "started", "pids": [11, 12]})
        sampler.hear({"event": "progress", "rank": 1, "doing": "nobody asked"})
        sampler.hear({"event": "progress", "rank": 0, "doing": "step 1/2"})
    (read,) = sampler.readings
    assert (read.device, read.before_bytes) == (one, GIB)
    assert [s.doing for s in read.sections] == ["start-up", "step 1/2"]


def test_without_devices_nothing_is_watched() -> None:
    """Runs on other hardware start no sampler process."""
    with Sampler([]) as sampler:
        sampler.hear({"event": "started", "pids": [11]})
    assert sampler.readings == []
    assert not sampler.ended_early


def test_a_dead_sampler_is_told_from_one_without_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a record would not mention strangers and look like any other."""
    (tmp_path / "pynvml.py").write_text("raise ImportError('no driver any more')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = Device(index=0, uuid="GPU-0", name=H100, memory_bytes=80 * GIB)
    with Sampler([one]) as sampler:
        sampler.hear({"event": "started", "pids": [11]})
    assert sampler.ended_early


def test_losing_a_device_during_a_run_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler ends without a traceback, and the run learns that it was not watched."""
    one = device(0)
    (found,) = visible_devices(FakeNvml([one]), None)
    monkeypatch.setattr(sampler, "library", lambda: FakeNvml([{**one, "lost": True}]))
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        with pytest.raises(SystemExit, match=r"a device stopped answering .*GPU is lost"):
            sampler.main(f"[{found.model_dump_json()}]")
