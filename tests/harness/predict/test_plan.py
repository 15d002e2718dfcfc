"""The planner: configurations that fit, cheapest first, or the reason why none does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from phantoms import NEEDED

from harness.cells.hardware import load_hardware
from harness.commands import plan as command
from harness.devices.outside import OUTSIDE_READINGS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = NEEDED
GIB, MIB = 2**30, 2**20
PLAIN = {"tiling": False, "offload": False, "offload_states": False}


OUTSIDE_BYTES = int(sum(a - b for a, b in OUTSIDE_READINGS.values()) / len(OUTSIDE_READINGS) * GIB)
"""Memory outside the allocator of one of several ranks."""


def row(folder: Path, room: int) -> str:
    """A hardware file for a device with `room` bytes for the allocator."""
    h100 = load_hardware("h100-80gb")
    assert h100.chip is not None
    chip = h100.chip.model_copy(update={"usable_bytes": OUTSIDE_BYTES + room})
    path = folder / "small.yaml"
    small = h100.model_copy(update={"name": "small", "chip": chip})
    path.write_text(small.model_dump_json())
    return str(path)


def test_with_enough_memory_the_plainest_configuration_is_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It tiles and offloads nothing, with one rank per sample. The JSON has the keys of predict and the settings."""
    assert command.plan("tiny-llama", 20_000, row(tmp_path, 8 * GIB), gpus=2, as_json=True) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["settings"] == {"gpus": 2, "sp": 1, "dp": 2, **PLAIN}
    assert first["fits"]
    assert {"allocated_bytes", "reserved_bytes", "total_bytes", "limit"} <= set(first)


def test_less_memory_needs_a_larger_degree_or_a_higher_rung(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With less memory, a larger degree or a higher rung is chosen, and every option fits."""
    hardware = row(tmp_path, 400 * MIB)
    assert command.plan("tiny-llama", 20_000, hardware, gpus=2, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(option["fits"] for option in found)
    settings = found[0]["settings"]
    assert settings["sp"] == 2 or {k: settings[k] for k in PLAIN} != PLAIN


@pytest.mark.parametrize(
    ("gpus", "words"),
    [(2, ["gpu_memory", "GiB per GPU"]), (16, ["heads", "must divide 8 heads"])],
)
def test_the_reason_names_the_limit(
    gpus: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is device memory, or heads that do not split over all GPUs. Exit code 1."""
    assert command.plan("tiny-llama", 20_000, row(tmp_path, MIB), gpus=gpus) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(word in said for word in words), said


def test_bad_input_is_refused() -> None:
    """The error names unknown models and hardware."""
    with pytest.raises(ValueError, match="unknown model 'nope'"):
        command.plan("nope", 4_096)
    with pytest.raises(ValueError, match="unknown hardware 'abacus'"):
        command.plan("tiny-llama", 4_096, "abacus")
