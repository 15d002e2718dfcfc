"""`alst verify`, and the truth it compares with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from samples import measurement

from alst_impl.config import Spec, TrainConfig
from alst_impl.methods.base import load_method
from alst_impl.models import materialize
from harness import truth
from harness.__main__ import main
from harness.cell import Cell
from harness.commands import verify
from harness.record import Measurement

TRAIN = TrainConfig(model="tiny-llama", method={"name": "baseline"}, seqlen=64)


def run_verify(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `alst verify`."""
    monkeypatch.setattr("sys.argv", ["alst", "verify", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_right_method_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: truth in its own process, ranks, comparison; JSON as documented, exit code 0."""
    arguments = [
        "--sp",
        "2",
        "--engine",
        "plain",
        "--seqlen",
        "65",
        "--kv-heads",
        "2",
        "--json",
        "--results",
    ]
    assert run_verify(monkeypatch, *arguments, str(tmp_path)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == [
        "passed",
        "cell",
        "loss",
        "worst",
        "exactness",
        "parameters",
        "evidence",
    ]
    assert answer["passed"] is True
    assert answer["loss"].keys() == {"ours", "truth"}
    model = materialize(TRAIN.model_copy(update={"overrides": {"num_key_value_heads": 2}}))
    compared = {p["parameter"]: p for p in answer["parameters"]}
    assert compared.keys() == dict(model.named_parameters()).keys()
    assert all(abs(p["ratio"] - 1) <= 1e-5 for p in compared.values())
    assert all(1 - p["cosine"] <= 1e-6 for p in compared.values())
    assert answer["worst"] in answer["parameters"]
    assert answer["evidence"]["local_seqlen"] == 33
    promised = load_method(Spec(name="alst", options={"sp": 2})).promises(TRAIN)
    assert all(answer["evidence"][name] > 0 for name in promised)


@pytest.mark.parametrize("passed", [True, False])
def test_exit_code_tells_the_verdict(passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient is exit code 1."""

    def measured(cell: Cell, results: Path) -> Measurement:
        return measurement(cell, passed=passed)

    monkeypatch.setattr(verify, "_measure", measured)
    assert run_verify(monkeypatch, "--sp", "2") == (0 if passed else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sp 3", ["num_attention_heads (8)", "sp (3)", "use sp in [1, 2, 4, 8]"]),
        ("--model no-such", ["no-such", "tiny-llama"]),
        ("--method no-such", ["no-such", "alst"]),
        ("--method baseline --sp 2", ["baseline", "sp"]),
        ("--method alst --pp 2", ["alst", "no option 'pp'"]),
        ("--method seq1f1b --pp 3 --engine plain", ["pp (3)", "2 layers", "use pp up to 2"]),
        ("--method seq1f1b --pp 2 --engine zero", ["engine 'zero'", "'plain' or 'fsdp2'"]),
        ("--engine plain --zero-stage 2", ["--zero-stage 2", "plain"]),
        ("--dtype float64", ["float64", "plain"]),
        ("--mask no-such", ["--mask", "no-such", "border"]),
        ("--sp 0", ["--sp", "0"]),
        ("--option nothing", ["nothing", "key=value"]),
        ("--option nope=1", ["nope", "tile_mlp"]),
        ("--heads 3 --model gpt2", ["gpt2"]),
        ("--method ring --cp 2 --probes", ["--probes", "'cp': 2", "leave it out"]),
        ("--no-such-option", ["--no-such-option"]),
    ],
)
def test_impossible_request_is_one_line(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be run is exit code 2, one helpful line on stderr, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert run_verify(monkeypatch, *arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_help_shows_every_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option is documented with its default, and there is an example."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run_verify(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    options = [
        "model",
        "heads",
        "kv-heads",
        "method",
        "engine",
        "zero-stage",
        "sp",
        "dp",
        "seqlen",
        "batch",
        "accumulation",
        "tiles",
        "offload",
        "no-offload",
        "mask",
        "dtype",
        "seed",
        "world",
        "option",
        "json",
    ]
    assert all(f"--{name}" in text for name in options)
    assert text.count("default:") >= len(options) - 2
    assert "Example" in text


def true_gradients(folder: Path, samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The truth for a saved model."""
    return truth.gradients(str(folder), samples)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3", "tiny-qwen3-moe"])
def test_truth_keeps_packed_documents_apart(model: str, tmp_path: Path) -> None:
    """Documents packed into one sample, told by their positions alone, do not see each other."""
    materialize(TRAIN.model_copy(update={"model": model})).float().save_pretrained(tmp_path)
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    packed = true_gradients(
        tmp_path, {"input_ids": ids, "labels": labels, "position_ids": positions}
    )
    alone = [
        true_gradients(
            tmp_path,
            {
                "input_ids": ids[:, part],
                "labels": labels[:, part],
                "position_ids": positions[:, part],
            },
        )
        for part in (slice(0, 12), slice(12, 30))
    ]
    for name, gradient in packed.items():
        # Each mean is over its own labels: 11 and 17 of 28.
        expected = (alone[0][name] * 11 + alone[1][name] * 17) / 28
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_truth_shares_no_code_of_ours() -> None:
    """The script imports neither package."""
    text = Path(truth.__file__).read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "alst" in line or "harness" in line]
