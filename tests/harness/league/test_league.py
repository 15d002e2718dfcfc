"""The league: what peers declare, how runs of their scripts become records, and what the page says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from alst_impl.models import published
from harness.cells import league
from harness.cells.league import Task
from harness.commands.app import app
from harness.commands.league import is_meant
from harness.league import gate, memory, packages, runs
from harness.league.folders import hollow_model
from harness.present.figures.league import of_records
from harness.present.pages.league import text
from harness.records import league as records
from harness.records.league import Record, Step
from harness.records.published import look_up

PEER = """
title: Other
package: alst-bench
url: https://example.org
recipe: It trains.
idea: it does not
differs: null
sequence_parallel: false
gpus: [1]
states: [device]
models: [qwen3-8b]
gate: [plain]
patches: null
"""
SCRIPT = """
from case import read_case, refuse
from loop import build
case = read_case()
{before}
model = build(case)
(row,) = case.rows(1)
loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
loss.backward()
case.save(float(loss), {{name: p.grad * {scale} for name, p in model.named_parameters()}})
"""

BESIDE = """
kept = type(case).save
type(case).save = lambda self, loss, found: kept(self, loss + 1, found)
"""


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of truths that tests of one worker share."""
    return tmp_path_factory.mktemp("truth")


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Task]]:
    """Makes the folder of peers one with a single peer, whose script is given."""
    real = league.folder()

    def make(scale: str = "1", before: str = "") -> Task:
        folder = tmp_path / "peers"
        (folder / "other").mkdir(parents=True)
        for name in ("case.py", "loop.py", "league.yaml"):
            (folder / name).write_text((real / name).read_text())
        (folder / "other" / "peer.yaml").write_text(PEER)
        (folder / "other" / "train.py").write_text(SCRIPT.format(scale=scale, before=before))
        league.peers.cache_clear()
        monkeypatch.setattr(league, "folder", lambda: folder)
        monkeypatch.setattr(gate, "FRESH", tmp_path / "fresh")
        return Task(peer="other", what="gate", case="plain")

    yield make
    league.peers.cache_clear()


@pytest.mark.parametrize("name", league.peers())
def test_a_peer_has_a_script_and_says_what_it_cannot(name: str) -> None:
    peer, asked = league.peers()[name], league.league()
    assert (league.folder() / name / "train.py").is_file() or "bytes" in peer.cannot
    assert set(peer.gate) <= set(asked.gate.cases)
    for case in set(asked.gate.cases) - set(peer.gate):
        assert case in peer.cannot or "gate" in peer.cannot
    for claim in peer.published:
        for column in claim.columns.values():
            assert look_up(claim.table, claim.row, column).value > 0


@pytest.mark.parametrize("name", league.peers())
def test_requirements_are_pinned_and_bring_no_torch(name: str) -> None:
    path = packages.requirements(name)
    lines = path.read_text().splitlines() if path else []
    named = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in named)
    assert not [line for line in named if line.startswith(("torch==", "nvidia-"))]


def test_the_folder_of_packages_follows_its_list(
    other: Callable[..., Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other()
    listed = league.folder() / "other" / "requirements.txt"
    assert packages.overlay("other") is None
    listed.write_text("left-pad==1.0")
    first = packages.overlay("other")
    assert "python -m harness.league.packages other" in packages.missing("other")
    listed.write_text("left-pad==1.1")
    assert packages.overlay("other") != first


def test_an_unknown_key_of_a_peer_is_named(other: Callable[..., Task]) -> None:
    other()
    (league.folder() / "other" / "peer.yaml").write_text(PEER + "colour: red\n")
    league.peers.cache_clear()
    with pytest.raises(ValueError, match=r"peer\.yaml.*colour"):
        league.peers()


def test_weights_without_bytes_are_those_of_the_model(tmp_path: Path) -> None:
    hollow_model(tmp_path, "tiny-qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    assert published("tiny-qwen3").items() <= config.items()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        head = file.get_tensor("lm_head.weight")
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert head.dtype == torch.bfloat16
    assert head.shape == (config["vocab_size"], config["hidden_size"])
    assert not head.any()


def test_a_right_gradient_passes(other: Callable[..., Task], truth: Path) -> None:
    verdict, reason, gradient = gate.judged(other(), truth)
    assert (verdict, reason) == ("right", "")
    assert gradient.wrong_parameters == 0
    assert gradient.error < 1e-5


def test_a_scaled_gradient_is_wrong(other: Callable[..., Task], truth: Path) -> None:
    verdict, reason, gradient = gate.judged(other(scale="1.001"), truth)
    assert verdict == "wrong"
    assert "ratio 1.001" in reason
    assert gradient.wrong_parameters == gradient.parameters


def test_a_wrong_loss_is_wrong_though_gradients_are_right(
    other: Callable[..., Task], truth: Path
) -> None:
    task = other(before=BESIDE)
    verdict, reason, _ = gate.judged(task, truth)
    assert verdict == "wrong"
    assert "its gradients are right" in reason


def test_a_script_that_fails_says_why(other: Callable[..., Task], truth: Path) -> None:
    task = other(before='raise KeyError("no such key")')
    assert gate.judged(task, truth)[:2] == ("cannot run", "KeyError: 'no such key'")


def step(seqlen: int, reserved: int) -> Step:
    return Step(
        seqlen=seqlen, allocated_bytes=reserved, reserved_bytes=reserved, pinned_bytes=0, pageable_bytes=0, attention=[], alive=[]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("per_token", "rest"), [(90_000, 10 * 2**30), (3_000_000, 2**30), (900, 0)]
)
def test_a_search_brackets_the_longest(
    monkeypatch: pytest.MonkeyPatch, per_token: int, rest: int
) -> None:
    room = 79 * 2**30 - 2**30
    tried = []

    def attempt(_task: Task, seqlen: int) -> memory.Found:
        tried.append(seqlen)
        held = rest + per_token * seqlen
        return (
            ("fits", "", step(seqlen, held))
            if held <= room
            else ("does not fit", "out of memory", None)
        )

    monkeypatch.setattr(memory, "step_at", attempt)
    known = [step(n, rest + per_token * n) for n in (8_192, 16_384) if rest + per_token * n <= room]
    task = Task(peer="alst", what="longest", model="qwen3-8b", gpus=1)
    verdict, _, fits, above = memory.longest(task, known, None)
    truth = (room - rest) / per_token
    assert verdict == "fits"
    assert fits.seqlen <= truth < above
    assert above - fits.seqlen <= max(memory.PRECISION * fits.seqlen, memory.UNIT) + memory.UNIT
    assert len(tried) <= memory.ATTEMPTS


def test_a_search_that_cannot_run_says_at_which_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "step_at", lambda _, seqlen: ("cannot run", "it broke", None))
    task = Task(peer="alst", what="longest", model="qwen3-8b", gpus=1)
    verdict, reason, fits, _ = memory.longest(task, [], None)
    assert (verdict, fits) == ("cannot run", None)
    assert "at 128K tokens: it broke" in reason


@pytest.mark.phantom
def test_a_script_runs_on_phantom_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "FRESH", tmp_path)
    task = Task(peer="alst", what="bytes", model="tiny-qwen3", gpus=4, seqlen=4096)
    verdict, _, found = memory.step_at(task, task.seqlen)
    assert verdict == "fits"
    assert found.attention == ["flash"]
    # The input of each of two layers, a quarter of the tokens of the sample, in bf16.
    assert found.pinned_bytes >= 2 * 2 * 1024 * 128


def record(task: Task, **fields: Any) -> Record:
    base = {"verdict": "fits", "reason": "", "version": "1", "torch": "2", "utc": "", "code": ""}
    return Record(task=task, **{**base, **fields})


def test_records_are_committed_in_the_order_of_tasks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "committed_path", lambda: tmp_path / "league.jsonl")
    tasks = list(league.tasks().values())
    records.commit([record(tasks[3]), record(tasks[0])])
    records.commit([record(tasks[3], verdict="does not fit"), record(tasks[1])])
    assert list(records.committed()) == [task.key for task in (tasks[0], tasks[1], tasks[3])]
    assert records.committed()[tasks[3].key].verdict == "does not fit"


def test_a_record_of_other_code_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "FRESH", tmp_path)
    monkeypatch.setattr(records, "committed_path", lambda: tmp_path / "league.jsonl")
    task = Task(peer="alst", what="gate", case="plain")
    made = record(task, verdict="right", code=runs.code("alst"))
    records.write(made)
    assert runs.final(task) == made
    records.write(made.model_copy(update={"code": "other"}))
    assert runs.final(task) is None
    records.write(made.model_copy(update={"verdict": "not installed"}))
    assert runs.final(task) is None


def test_the_page_names_what_is_held_and_what_is_wrong() -> None:
    model, gpus = "qwen3-8b", 8
    place = {"peer": "trl_recipe", "model": model, "gpus": gpus, "states": "device"}
    short, long = (step(n, n * 8_192 + 2**30) for n in (2**15, 2**20))
    found = [
        record(Task(what="bytes", seqlen=2**15, **place), step=short),
        record(Task(what="bytes", seqlen=2**20, **place), step=long),
        record(Task(what="longest", **place), step=long, above=2**21),
        record(
            Task(peer="trl_recipe", what="gate", case="plain"),
            verdict="wrong",
            gradient={"loss": 1.0, "truth_loss": 1.0, "worst": "w", "error": 1.0, "ratio": 2.0, "cosine": 1.0,
                      "wrong_parameters": 3, "parameters": 4},
        ),
    ]  # fmt: skip
    by_key = {each.task.key: each for each in found}
    page = text(by_key)
    (row,) = (line for line in page.splitlines() if line.startswith("| TRL | 1.2 / 1.2 GiB"))
    assert "| 64 KiB |" in row  # a rank's share of a token is an eighth
    assert "| 1M |" in row
    assert "wrong: plain" in row
    assert "wrong: 3 of 4 gradients, ratio 2.0000, cosine 1.0000" in page
    assert "- layerwise: its packages are not here, or it was not run" in page
    assert "56.2 GB" in page
    words = " ".join(t.get_text() for axes in of_records(by_key, "here").axes for t in axes.texts)
    assert "wrong" in words.split()
    assert "1M" in words


def test_names_beginnings_and_patterns_of_tasks() -> None:
    assert is_meant("alst-gate-plain", "alst-gate-plain")
    assert is_meant("alst-gate-plain", "alst-gate")
    assert is_meant("deepspeed_alst-gate-plain", "*-gate-*")
    assert not is_meant("deepspeed_alst-gate-plain", "alst-gate")
    found = CliRunner().invoke(app, ["league", "--list", "alst-gate"])
    assert found.output.split() == [f"alst-gate-{case}" for case in league.league().gate.cases]


def test_a_task_that_nobody_asks_is_refused() -> None:
    result = CliRunner().invoke(app, ["league", "nobody"])
    assert isinstance(result.exception, ValueError)
    assert "no task is called nobody" in str(result.exception)


def test_committed_records_are_of_what_is_asked_now() -> None:
    path = Path(records.committed_path())
    assert len(path.read_text().splitlines()) == len(records.committed())
