"""Covering arrays, their CSV file, and `alst matrix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from alst_impl.config import OptimizerConfig, TrainConfig
from harness.__main__ import main
from harness.cells.experiment import load_experiment
from harness.cells.grid import Matrix, merge
from harness.gate.gradients import compare, compare_update, stock_change
from harness.gate.truths import Truth
from harness.gate.verdict import explain_failure
from harness.processes import client
from harness.processes.jobs import Ending

FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "engine": {"plain": {"engine": "plain"}, "fsdp2": {"engine": "fsdp2"}},
    "sp": {
        "1": {"method": {"sp": 1}},
        "2": {"method": {"sp": 2}},
        "3": {"method": {"sp": 3}},
    },
    "dp": {"1": {"dp": 1}, "2": {"dp": 2}},
    "batch": {"1": {"batch_size": 1}, "2": {"batch_size": 2}},
}
BECAUSE = "num_attention_heads (8) must be divisible by sp (3)"
YAML = {
    "question": "Which?",
    "source": "here",
    "base": {
        "model": "tiny-llama",
        "method": {"name": "alst"},
        "seqlen": 16,
        "warmup": 0,
        "steps": 0,
        "timed": False,
    },
    "matrix": {
        "factors": FACTORS,
        "triples": [["engine", "sp", "dp"]],
        "part": ["engine", "sp"],
        "refused": [{"when": {"sp": ["3"]}, "because": BECAUSE}],
    },
}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small matrix with its rows."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(YAML, sort_keys=False))
    assert command(monkeypatch, str(path), "--write") == 0
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `alst matrix`."""
    monkeypatch.setattr("sys.argv", ["alst", "matrix", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_rows_cover_and_obey_the_rules(experiment: Path) -> None:
    """Rows cover all pairs and the named triples, no running row is refused, and each refusal occurs once."""
    loaded = load_experiment(experiment)
    assert loaded.matrix
    rows = [row.levels for row, _ in loaded.matrix_cells()]
    assert not loaded.matrix.missing(rows)
    assert len(rows) == 8  # engine x sp x dp; they also cover the batches
    assert all(row["sp"] != "3" for row in rows)
    (refused,) = [row for row in loaded.rows if row.refused]
    assert refused.levels == {"engine": "plain", "sp": "3", "dp": "1", "batch": "1"}
    assert BECAUSE in str(refused.refused)


def test_a_missing_row_is_noticed(experiment: Path) -> None:
    """Without one of the rows, a triple is missing."""
    loaded = load_experiment(experiment)
    assert loaded.matrix
    rows = [row.levels for row, _ in loaded.matrix_cells()]
    assert loaded.matrix.missing(rows[1:])


def test_the_covering_part_shows_all_pairs_of_its_factors(experiment: Path) -> None:
    """It has no more rows than needed."""
    loaded = load_experiment(experiment)
    assert loaded.matrix
    rows = [row.levels for row, _ in loaded.matrix_cells()]
    part = loaded.matrix.covering(rows)
    assert len(part) == 4
    assert {(r["engine"], r["sp"]) for r in part} == {(r["engine"], r["sp"]) for r in rows}


def test_levels_become_one_cell(experiment: Path) -> None:
    """Options of a plug-in are merged over factors. The number of ranks is sp times dp."""
    loaded = load_experiment(experiment)
    cells = [(row.levels, cell.train) for row, cell in loaded.matrix_cells()]
    for levels, train in cells:
        assert train.method.options["sp"] == int(levels["sp"])
        assert train.world_size == int(levels["sp"]) * int(levels["dp"])
        assert train.batch_size == int(levels["batch"])
    assert len(loaded.cells()) == len(cells)


def test_merging_changes_neither_side() -> None:
    """Many rows share the same levels."""
    under, over = {"method": {"name": "alst"}, "dp": 1}, {"method": {"sp": 2}}
    assert merge(under, over) == {"method": {"name": "alst", "sp": 2}, "dp": 1}
    assert under == {"method": {"name": "alst"}, "dp": 1}
    assert over == {"method": {"sp": 2}}


def test_a_refusal_rule_that_does_not_hold_is_an_error(experiment: Path) -> None:
    """A rule is an error if its levels can run or are refused for another reason."""
    loaded = load_experiment(experiment)
    assert loaded.matrix
    for levels, said in ((["2"], "it can run"), (["3"], "must be divisible")):
        rule = {"when": {"sp": levels}, "because": "of the weather"}
        wrong = Matrix(**{**loaded.matrix.model_dump(), "refused": [rule]})
        with pytest.raises(ValueError, match=said):
            loaded.model_copy(update={"matrix": wrong}).refusals()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "0/3"], ["--part 0/3", "I/N"]),
        (["--part", "4/3"], ["--part 4/3", "covering"]),
        (["--part", "some"], ["--part some"]),
        (["--part", "99/99"], ["--part 99/99", "at most"]),
        (["--jobs", "0"], ["--jobs"]),
    ],
)
def test_an_impossible_request_is_one_line(
    experiment: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and a line with the fix."""
    capsys.readouterr()
    assert command(monkeypatch, str(experiment), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace("fsdp2", "fsdp3"), "no level 'fsdp3'"),
        (lambda text: text.replace("batch", "size", 1), "columns are not the factors"),
        (lambda text: text.replace("plain,2,", "plain,3,"), "must be divisible by sp"),
        (None, "alst matrix --write"),
    ],
)
def test_rows_that_are_not_of_the_experiment_are_refused(
    experiment: Path,
    edit: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the file if it was edited by hand or is missing."""
    rows = experiment.with_suffix(".csv")
    rows.write_text(edit(rows.read_text())) if edit else rows.unlink()
    capsys.readouterr()
    assert command(monkeypatch, str(experiment)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_an_experiment_without_a_matrix_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the command that runs the experiment."""
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "question: Which?\nsource: here\nsweeps: [{base: {model: tiny-llama, method: alst, seqlen: 64}}]\n"
    )
    assert command(monkeypatch, str(path)) == 2
    assert "alst run" in capsys.readouterr().err


def test_a_cell_with_a_record_does_not_run_again(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first cell runs and passes. Its record is kept, and the next run uses it."""
    arguments = [str(experiment), "--part", "1/8", "--results", str(tmp_path / "results")]
    assert command(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "1 cells run: 1 passed, 0 failed; 1 refused" in said
    (path,) = (tmp_path / "results" / "cells" / "small").glob("*.json")
    written = path.stat().st_mtime_ns
    assert command(monkeypatch, *arguments) == 0
    assert path.stat().st_mtime_ns == written


def test_a_cell_that_fails_is_exit_code_1(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The levels of its row are named, for any kind of failure."""

    def lost(*_: object) -> Ending:
        return Ending(how="error", rank=0, error="RuntimeError", message="broken", during="start")

    monkeypatch.setattr(client, "submit", lost)
    arguments = [str(experiment), "--part", "2/8", "--results", str(tmp_path / "results")]
    assert command(monkeypatch, *arguments) == 1
    said = capsys.readouterr().out
    assert "setup_error" in said
    assert "broken" in said
    assert "engine=" in said


WEIGHTS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
GRADIENTS = {"a": torch.tensor([0.3, -0.4]), "b": torch.tensor([1.2])}


def test_the_stock_change_of_sgd_is_the_clipped_gradient() -> None:
    """By hand: clipping a norm of 1.3 to 0.65 halves every gradient. The weights do not change."""
    before = {name: w.double() for name, w in WEIGHTS.items()}
    gradients = {name: g.double() for name, g in GRADIENTS.items()}
    sgd = OptimizerConfig(name="sgd", learning_rate=10.0, max_grad_norm=0.65)
    change = stock_change(before, gradients, sgd)
    for name, g in gradients.items():
        torch.testing.assert_close(change[name], -5 * g, rtol=1e-5, atol=0)
        torch.testing.assert_close(before[name], WEIGHTS[name].double())


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_wrong_update_of_right_gradients_fails(tmp_path: Path, factor: float) -> None:
    """The error names the parameter and says that its update is wrong."""
    exact = {name: g.double() for name, g in {**GRADIENTS, "loss": torch.tensor(2.0)}.items()}
    save_file(exact, tmp_path / "truth.safetensors")
    truth = Truth(exact=str(tmp_path / "truth.safetensors"))
    sgd = OptimizerConfig(name="sgd", learning_rate=10.0)
    train = TrainConfig(model="tiny-llama", method="baseline", seqlen=8, optimizer=sgd)
    gate = compare(GRADIENTS, 2.0, truth, train)
    assert gate.passed
    after = {name: WEIGHTS[name] - 10 * g for name, g in GRADIENTS.items()}
    after["b"] = WEIGHTS["b"] - 10 * factor * GRADIENTS["b"]
    judged = compare_update(gate, WEIGHTS, after, truth, train)
    assert judged.passed == (factor == 1.0)
    if not judged.passed:
        assert explain_failure(judged, train).startswith("update of b: ratio 1.1")


def test_bf16_may_lose_what_the_stock_model_loses_in_bf16(tmp_path: Path) -> None:
    """Twice the stock model's error is allowed. A parameter without such an error has the usual tolerance."""
    exact = {name: g.double() for name, g in {**GRADIENTS, "loss": torch.tensor(2.0)}.items()}
    rounded = {**exact, "a": exact["a"] * 1.2}
    files = {"exact": tmp_path / "exact.safetensors", "rounded": tmp_path / "rounded.safetensors"}
    save_file(exact, files["exact"])
    save_file(rounded, files["rounded"])
    truth = Truth(**{name: str(file) for name, file in files.items()})
    train = TrainConfig(model="tiny-llama", method="baseline", seqlen=8, dtype="bfloat16")
    for name, factor, passed in (("a", 1.35, True), ("a", 1.45, False), ("b", 1.06, False)):
        ours = {**GRADIENTS, name: GRADIENTS[name] * factor}
        assert compare(ours, 2.0, truth, train).passed == passed, (name, factor)
