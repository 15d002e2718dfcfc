"""Answers that a newcomer found wrong, each with the test that fails where it is wrong again."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from phantoms import NEEDED, cell, estimated, predicted

from alst_impl.models import published
from harness import __main__ as command_line
from harness.cells.cell import Cell
from harness.cells.hardware import FOLDER

pytestmark = NEEDED
ROOT = Path(__file__).parents[2]
FAULTS = {
    "a step time below its own printed lower bound": [
        "formulas/test_steptime.py::test_no_step_is_faster_than_its_bounds",
        "test_faults.py::test_a_step_is_not_below_its_bound_and_has_the_update_of_the_host",
    ],
    "the host's optimizer is left out without a word": [
        "formulas/test_steptime.py::test_the_optimizer_of_the_host_takes_time",
        "test_faults.py::test_a_step_is_not_below_its_bound_and_has_the_update_of_the_host",
    ],
    "products of experts are not counted": [
        "meters/test_cost.py::test_products_with_experts_are_those_of_the_routed_tokens",
        "test_faults.py::test_a_mixture_computes_what_training_needs",
    ],
    "all experts are taken as active": [
        "formulas/test_flops.py::test_experts_that_a_token_is_not_routed_to_do_no_work",
    ],
    "packed documents change no time": [
        "test_predict.py::test_packed_documents_take_less_time",
    ],
    "hardware of unknown speed answers with an H100's": [
        "formulas/test_steptime.py::test_what_is_not_known_is_said",
        "test_faults.py::test_hardware_of_unknown_speed_has_no_time",
    ],
    "the row of the H200 is below a published reading": [
        "cells/test_hardware.py::test_a_row_is_not_below_published_readings_of_it",
    ],
    "a slope of bytes is negative": [
        "test_faults.py::test_a_slope_is_positive_where_a_tile_is_added",
    ],
    "128K is refused": ["cells/test_units.py::test_lengths_as_people_write_them"],
    "K is 1,000 here and 1,024 there": [
        "cells/test_units.py::test_a_printed_length_is_read_as_the_same_number",
        "cells/test_units.py::test_lengths_as_they_are_printed",
    ],
    "a plan mixes rows of 1, 4 and 8 samples": [
        "predict/test_plan.py::test_the_fastest_is_first_and_the_longest_is_there",
    ],
    "a plan knows alst alone": [
        "predict/test_plan.py::test_the_fastest_is_first_and_the_longest_is_there",
    ],
    "a plan puts 78.5 of 80 GiB first": [
        "predict/test_plan.py::test_the_fastest_is_first_and_the_longest_is_there",
        "test_predict.py::test_a_margin_is_left_free",
    ],
    "a search differs from the README by an option that is not named": [
        "test_faults.py::test_a_search_names_its_options_and_the_readme_the_ones_that_differ",
    ],
    "JSON without model, GPUs, hardware and version": [
        "test_faults.py::test_json_says_what_it_is_about",
        "test_predict.py::test_search_prints_the_agreed_keys",
    ],
}
"""Fault -> its tests in this folder."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_tests(fault: str) -> None:
    """They are there by name."""
    for test in FAULTS[fault]:
        file, _, name = test.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What `alst ARGUMENTS` prints."""
    monkeypatch.setattr(sys, "argv", ["alst", *arguments])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code
    return capsys.readouterr().out


def step(model: str, ranks: int, seqlen: int, **settings: Any) -> Cell:
    """A step of our method with states in host memory."""
    return cell(
        **{
            "model": model,
            "method": {"name": "alst", "sp": ranks},
            "engine": {"name": "fsdp2", "offload": True},
            "world_size": ranks,
            "seqlen": seqlen,
            **settings,
        }
    )


@pytest.mark.parametrize(
    ("model", "ranks", "seqlen"), [("llama3.1-8b", 8, 1_024), ("llama3.1-70b", 64, 1_048_576)]
)
def test_a_step_is_not_below_its_bound_and_has_the_update_of_the_host(
    model: str, ranks: int, seqlen: int
) -> None:
    """An 8B model at 1K waits for the host most of the time; a node updates at most 1e9 parameters per second."""
    (found,) = estimated(step(model, ranks, seqlen))
    assert found.time is not None
    assert found.least_seconds_modelled is not None
    assert found.least_seconds_modelled <= found.time.low <= found.time.seconds
    parameters = {"llama3.1-8b": 8.0e9, "llama3.1-70b": 70.6e9}[model]
    assert found.time.parts["update on the host"] > parameters / max(ranks / 8, 1) / 1e9


def test_a_mixture_computes_what_training_needs() -> None:
    """More than forward and backward of the routed experts, by recomputation, and less than all experts would take."""
    wide = {"moe_intermediate_size": 1_024}
    (found,) = estimated(step("tiny-qwen3-moe", 1, 4_096, overrides=wide))
    assert found.cost is not None
    computed = found.cost.matmul_flops + found.cost.attention_flops
    assert 1.0 < computed / found.flops.model_causal < 1.6


def test_hardware_of_unknown_speed_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes are still there."""
    path = tmp_path / "mine.yaml"
    lines = (FOLDER / "h100-80gb.yaml").read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("bf16_flops")))
    arguments = ["predict", "tiny-llama", "--gpus", "1", "--seqlen", "4K", "--hardware", str(path)]
    assert "step: time unknown: hardware" in printed(monkeypatch, capsys, *arguments)
    answer = json.loads(printed(monkeypatch, capsys, *arguments, "--json"))
    assert (answer["step_seconds_modelled"], answer["time"]) == (None, None)
    assert "bf16_flops" in answer["time_unknown"]
    assert answer["allocated_bytes"] > 0


def test_a_search_names_its_options_and_the_readme_the_ones_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search leaves a margin; the README's lengths, which stand beside published ones, leave none."""
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({**published("llama3.1-8b"), "num_hidden_layers": 1}))
    text = printed(monkeypatch, capsys, "search", str(wide), "--gpus", "1")
    (line,) = (line for line in text.splitlines() if line.startswith("options: "))
    for option in (
        "--hardware h100-80gb",
        "--engine fsdp2",
        "--states host",
        "--kernel sdpa",
        "--margin 0.05",
        "--allocator expandable",
    ):
        assert option in line
    rows = [
        row for row in (ROOT / "README.md").read_text().splitlines() if "tokens, Llama-8B" in row
    ]
    assert rows
    assert all("`--margin 0`" in row for row in rows)


def test_json_says_what_it_is_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, GPUs, hardware, margin and versions, defaults too."""
    arguments = ["predict", "tiny-llama", "--gpus", "1", "--seqlen", "4K", "--json"]
    answer = json.loads(printed(monkeypatch, capsys, *arguments))
    asked = answer["asked"]
    assert asked["train"]["model"] == "tiny-llama"
    assert asked["train"]["world_size"] == 1
    assert asked["train"]["batch_size"] == 1
    assert asked["hardware"] == "h100-80gb"
    assert asked["simulation"]["margin"] == 0.05
    assert answer["versions"].keys() == {"alst-bench", "torch", "transformers"}


@pytest.mark.parametrize("seqlen", [1_024, 4_096])
def test_a_slope_is_positive_where_a_tile_is_added(seqlen: int) -> None:
    """Two per cent more tokens take fewer bytes here, because one more tile makes each smaller."""
    found = predicted(step("tiny-llama", 1, seqlen, method={"name": "layerwise"}))
    assert found.bytes_per_local_token is not None
    assert found.bytes_per_local_token > 0
