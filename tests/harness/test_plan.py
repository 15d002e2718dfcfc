"""Which settings fit: the cheapest first, or the reason why none does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness.cell import make_cell
from harness.commands import plan as command
from harness.hardware import Hardware
from harness.plan import LADDER, Plan, make_plan
from harness.predict import OUTSIDE_BYTES

MIB = 2**20


def planned(memory: int, seqlen: int = 20_000, gpus: int | None = 4, **machine: Any) -> Plan:
    """A plan for a tiny model on a device with `memory` bytes of its own use."""
    hardware = Hardware(
        name="small",
        memory_bytes=OUTSIDE_BYTES + memory,
        devices_per_node=4,
        source="made up",
        **machine,
    )
    settings = {"model": "tiny-llama", "method": "alst", "seqlen": seqlen, "dtype": "bfloat16"}
    cell = make_cell({**settings, "world": "sim", "engine": "fsdp2"})
    return make_plan(cell.train, hardware, gpus, None)


def test_with_room_the_plainest_setting_comes_first() -> None:
    """Nothing tiled, nothing offloaded, one rank per sample."""
    found = planned(4096 * MIB)
    first = found.options[0]
    assert (first.sp, first.dp, first.rung) == (1, 4, LADDER[0])
    assert first.prediction.fits
    assert first.prediction.bytes_per_local_token is not None


def test_less_memory_asks_for_more() -> None:
    """What fits in less is a larger degree or a higher rung, and every option does fit."""
    roomy, tight = planned(4096 * MIB), planned(300 * MIB)
    assert tight.options
    assert all(option.prediction.fits for option in tight.options)
    assert (tight.options[0].sp, LADDER.index(tight.options[0].rung)) > (1, 0)
    assert roomy.options[0].prediction.total_bytes > tight.options[0].prediction.total_bytes


def test_the_reason_names_the_limit() -> None:
    """Device memory, then heads that do not split over all GPUs, then host memory."""
    assert planned(1 * MIB).limit == "gpu_memory"
    stopped = planned(1 * MIB, gpus=16)
    assert stopped.limit == "heads"
    assert "must divide 8 heads" in (stopped.reason or "")
    host = planned(4096 * MIB, host_memory_bytes=1 * MIB)
    assert (host.options, host.limit) == ([], "host_memory")
    assert "host memory" in (host.reason or "")


def test_json_has_the_keys_of_predict_and_the_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One record per setting that fits."""
    assert command.plan("tiny-llama", 4_096, "h100-80gb", gpus=1, as_json=True) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["settings"]["gpus"] == 1
    assert {"live_bytes", "total_bytes", "bytes_per_local_token", "fits", "limit"} <= set(first)


def test_bad_input_is_refused() -> None:
    """Unknown models and hardware are named."""
    with pytest.raises(ValueError, match="unknown model 'nope'"):
        command.plan("nope", 4_096)
    with pytest.raises(ValueError, match="unknown hardware 'abacus'"):
        command.plan("tiny-llama", 4_096, "abacus")
