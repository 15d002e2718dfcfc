"""The planner: the fastest settings that fit, the longest, the fewest GPUs, or the reason why none fits."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from phantoms import NEEDED

from harness import __main__ as command_line
from harness.cells.hardware import load_hardware
from harness.commands import plan
from harness.devices.outside import OUTSIDE_READINGS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = NEEDED
GIB, MIB = 2**30, 2**20


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


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `alst plan tiny-llama ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["alst", "plan", "tiny-llama", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return int(ended.value.code or 0)


def rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[dict[str, Any]]:
    """The rows of a plan."""
    assert asked(monkeypatch, *arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["asked"]["train"]["model"] == "tiny-llama"
    assert answer["versions"]["torch"]
    found: list[dict[str, Any]] = answer["rows"]
    return found


def test_the_fastest_is_first_and_the_longest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room, states stay on the GPUs and no sample is shared. Every row is of the asked batch, leaves the margin
    and beats the rows before it in length. The rows are of several methods.
    """
    hardware = row(tmp_path, GIB)
    found = rows(monkeypatch, capsys, "--seqlen", "4_000", "--gpus", "2", "--hardware", hardware)
    assert "fastest" in found[0]["best"]
    assert "longest" in found[-1]["best"]
    assert (found[0]["sp"], found[0]["dp"]) == (1, 2)
    assert found[0]["train"]["engine"] == {"name": "fsdp2", "offload": False}
    assert {(each["train"]["batch_size"], each["train"]["accumulation"]) for each in found} == {
        (1, 1)
    }
    assert len({each["train"]["method"]["name"] for each in found}) > 1
    speeds, lengths = (
        [each[key] for each in found] for key in ("tokens_per_second_per_gpu", "longest_tokens")
    )
    assert speeds == sorted(speeds, reverse=True)
    assert lengths == sorted(lengths)
    chip = load_hardware(hardware).chip
    assert chip is not None
    assert all(each["prediction"]["total_bytes"] <= 0.95 * chip.usable_bytes for each in found)


def test_less_memory_is_met_by_another_method_or_degree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the stock step does not fit, a row still does, and says what binds and what to do."""
    hardware = row(tmp_path, 700 * MIB)
    found = rows(monkeypatch, capsys, "--seqlen", "20_000", "--gpus", "2", "--hardware", hardware)
    assert all(each["prediction"]["fits"] for each in found)
    assert found[0]["train"]["method"]["name"] != "baseline"
    assert all(each["advice"] and each["prediction"]["time"]["parts"] for each in found)


def test_without_a_number_the_fewest_gpus_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is enough for a small step."""
    hardware = row(tmp_path, 8 * GIB)
    found = rows(monkeypatch, capsys, "--seqlen", "4K", "--hardware", hardware)
    assert {each["train"]["world_size"] for each in found} == {1}
    assert all("fewest GPUs" in each["best"] for each in found)


def test_an_engine_without_a_choice_keeps_states_on_the_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody has to say so."""
    given = "--seqlen 4K --gpus 1 --engine plain --method baseline"
    assert rows(monkeypatch, capsys, *given.split())[0]["train"]["engine"] == {"name": "plain"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpus 2", ["gpu_memory", "GiB per GPU"]),
        ("--gpus 16 --method alst", ["heads", "must divide 8 heads"]),
    ],
)
def test_the_reason_names_the_limit(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The limit is device memory, or heads that do not split over all GPUs. Exit code 1."""
    hardware = row(tmp_path, MIB)
    given = ["--seqlen", "20_000", "--hardware", hardware, *arguments.split()]
    assert asked(monkeypatch, *given) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--seqlen 4K --hardware abacus", "unknown hardware 'abacus'"),
        ("--seqlen 4K --method magic", "does not know method 'magic'"),
        ("--seqlen 1_000_000_000_000 --gpus 8", "does not fit on 8"),
    ],
)
def test_bad_input_is_refused(
    arguments: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2."""
    assert asked(monkeypatch, *arguments.split()) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_plan_is_written_as_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row of the plan; a second time nothing is tried, because the folder is there."""
    out = tmp_path / "out"
    arguments = ("--seqlen", "8K", "--gpus", "2", "--method", "alst", "--emit", str(out), "--json")
    assert asked(monkeypatch, *arguments) == 0
    said = capsys.readouterr()
    first = json.loads(said.out)["rows"][0]["train"]
    assert f"alst: wrote {out / 'run.sh'}, " in said.err
    assert f"sp={first['method']['sp']}," in (out / "train.py").read_text()
    assert asked(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert f"--emit {out}: exists already; name a new folder, or remove it" in said.err
    assert "on a phantom device" not in said.err


def test_an_answer_that_takes_too_long_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the limit, and nothing of Python's."""
    monkeypatch.setattr(plan, "LIMIT_S", 0.001)
    assert asked(monkeypatch, "--seqlen", "8K", "--gpus", "1") == 2
    said = capsys.readouterr().err
    assert "no answer within 0 s; try again on a machine that does nothing else" in said
    assert "Traceback" not in said
