"""`alst verify`, and its reference gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import measurement
from transformers import AutoConfig, AutoModelForCausalLM

from alst_impl.config import Spec, TrainConfig
from alst_impl.methods.base import counted, load_method
from alst_impl.models import materialize
from harness.__main__ import main
from harness.cells.cell import Cell
from harness.commands import verify
from harness.gate import truth
from harness.records.record import Measurement

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
    """The full path: truth in a separate process, ranks, comparison, JSON as documented, exit code 0."""
    arguments = [
        "--sp",
        "2",
        "--engine",
        "plain",
        "--seqlen",
        "65",
        "--override",
        "num_key_value_heads=2",
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
    assert all(counted(answer["evidence"], promise) > 0 for promise in promised)


@pytest.mark.parametrize("passed", [True, False])
def test_exit_code_tells_the_verdict(passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient gives exit code 1."""

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
        ("--engine plain --engine-option stage=2", ["'plain'", "stage = 2"]),
        ("--engine-option stage", ["--engine-option stage", "key=value"]),
        ("--dtype float64", ["float64", "plain"]),
        ("--mask no-such", ["--mask", "no-such", "border"]),
        ("--sp 0", ["--sp", "0"]),
        ("--option nothing", ["nothing", "key=value"]),
        ("--option nope=1", ["nope", "tile_mlp"]),
        ("--override num_attention_heads=3 --model gpt2", ["gpt2"]),
        ("--method seq1f1b --pp 2 --engine plain --probes", ["--probes", "pp (2)", "leave it out"]),
        ("--seqlen 1", ["--seqlen 1", "use 2 or more"]),
        ("--seqlen 0.2K", ["'0.2K'", "not a length", "1,024"]),
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
    """An impossible request gives exit code 2 and one helpful line on stderr, and nothing is written."""
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
    """The help shows every option with its default, and an example."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run_verify(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    options = [
        "model",
        "override",
        "method",
        "option",
        "engine",
        "engine-option",
        "sp",
        "dp",
        "seqlen",
        "batch",
        "accumulation",
        "mask",
        "documents",
        "dtype",
        "seed",
        "world",
        "probes",
        "json",
        "results",
    ]
    assert all(f"--{name}" in text for name in options)
    assert text.count("default:") >= len(options) - 2
    assert "Example" in text


def true_gradients(folder: Path, samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The true gradients of a saved model."""
    return truth.gradients(str(folder), samples)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3", "tiny-qwen3-moe"])
def test_truth_keeps_packed_documents_apart(model: str, tmp_path: Path) -> None:
    """Documents packed into one sample do not see each other. Only their positions separate them."""
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


def test_truth_imports_none_of_our_packages() -> None:
    """The script imports neither package."""
    text = Path(truth.__file__).read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "alst" in line or "harness" in line]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.0}
MIXTRAL = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2}
"""Small models. Both draw random numbers without effect."""


def model_of(model_type: str, fields: dict[str, Any]) -> Any:
    """A model in training mode, with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).train()


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("gpt2", SIZES, ["'transformer.drop' (Dropout)", "resid_pdrop (0.1)", "embd_pdrop (0.1)"]),
        ("opt", {**OPT, "dropout": 1e-6}, ["OPTDecoderLayer", "dropout (1e-06)"]),
        ("opt", {**OPT, "layerdrop": 0.01}, ["'model.decoder' (OPTDecoder)", "layerdrop (0.01)"]),
        ("mixtral", {**MIXTRAL, "router_jitter_noise": 1e-3}, ["router_jitter_noise (0.001)"]),
    ],
)
def test_a_step_that_draws_random_numbers_has_no_truth(
    model_type: str, fields: dict[str, Any], words: list[str]
) -> None:
    """Any random draw that can affect the step is refused, however rare. The message names the
    module and the fields to set to 0.
    """
    model, state = model_of(model_type, fields), torch.get_rng_state()
    said = truth.refusal(model, torch.arange(4)[None])
    assert said is not None
    assert all(word in said for word in words), said
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("model_type", "fields"), [("opt", OPT), ("mixtral", MIXTRAL)])
def test_random_draws_without_effect_are_accepted(model_type: str, fields: dict[str, Any]) -> None:
    """OPT draws a number to decide on skipping a layer even with probability 0, so the suggested fix works."""
    assert truth.refusal(model_of(model_type, fields), torch.arange(4)[None]) is None


def test_a_model_that_draws_random_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, with one line before any rank starts. The gradients are not called wrong."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral", **MIXTRAL, "router_jitter_noise": 0.1}))
    arguments = ["--model", str(path), "--seqlen", "8", "--engine", "plain"]
    assert run_verify(monkeypatch, *arguments, "--results", str(tmp_path / "results")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("alst: ")
    assert "draws random numbers" in line
    assert "set router_jitter_noise (0.1) to 0" in line
    assert "Traceback" not in printed.err


def test_a_model_whose_truth_no_machine_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, before the kernel kills what it finds: exit code 2, and the line names both sizes and the way out."""
    arguments = ["--model", "llama3.1-8b", "--override", "intermediate_size=100_000_000"]
    assert run_verify(monkeypatch, *arguments, "--results", str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("fp64, ", "this machine has ", "num_hidden_layers=2")), (
        line
    )
