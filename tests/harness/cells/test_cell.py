"""Cells and experiments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.cells.cell import make_cell
from harness.cells.experiment import load_experiment

SETTINGS = {
    "model": "tiny-llama",
    "method": {"name": "alst", "sp": 2},
    "world_size": 2,
    "seqlen": 64,
}

YAML = """
question: Which?
source: here
base: {model: tiny-llama, engine: plain}
sweeps:
  - axes:
      seqlen: [64, 128]
      _ranks:
        - {world_size: 1, method: baseline}
        - {world_size: 2, method: {name: alst, sp: 2}}
"""


def written(folder: Path, text: str) -> Path:
    """An experiment file with `text`."""
    path = folder / "example.yaml"
    path.write_text(text)
    return path


def test_axes_are_crossed(tmp_path: Path) -> None:
    """Every combination of axes is a cell, and a mapping under `_name` sets its fields together."""
    cells = load_experiment(written(tmp_path, YAML)).cells().values()
    found = [(c.train.seqlen, c.train.world_size, c.train.method.name) for c in cells]
    assert found == [(64, 1, "baseline"), (64, 2, "alst"), (128, 1, "baseline"), (128, 2, "alst")]


def test_key_is_readable_and_stable() -> None:
    """The key names the main settings and is the same in every process and version."""
    assert make_cell(SETTINGS).key.startswith("tiny-llama_alst-sp2_zero_w2_s64_cpu-")
    program = f"from harness.cells.cell import make_cell; print(make_cell({SETTINGS!r}).key)"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == make_cell(SETTINGS).key


def test_key_tells_all_fields_apart() -> None:
    """A field that the slug does not show still changes the key."""
    keys = {make_cell({**SETTINGS, **change}).key for change in ({}, {"seed": 1}, {"steps": 4})}
    assert len(keys) == 3


def test_adapters_without_dropout_keep_their_key() -> None:
    """Records of cells from before adapters could have dropout are theirs; with dropout it is another cell."""
    without = make_cell({**SETTINGS, "lora": {"rank": 4}})
    dropped = make_cell({**SETTINGS, "lora": {"rank": 4, "dropout": 0.05}, "gate": False})
    assert without.key.endswith("-9d82febe")
    assert dropped.key != make_cell({**SETTINGS, "lora": {"rank": 4}, "gate": False}).key


def test_expanding_imports_no_torch() -> None:
    """Sweeps expand without torch, whose import takes seconds."""
    program = (
        "import sys; from pathlib import Path; from harness.cells.experiment import load_experiment\n"
        "[load_experiment(p).cells() for p in Path('experiments').glob('*.yaml')]\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "no-such"}, ["no-such", "tiny-llama"]),
        ({"method": "no-such"}, ["unknown method 'no-such'", "baseline"]),
        ({"method": {"name": "alst", "spp": 2}}, ["alst", "spp", "known keys", "sp"]),
        ({"method": {"name": "alst", "sp": 3}}, ["sp (3)", "world_size (2)", "use sp in [1, 2]"]),
        ({"engine": {"name": "zero", "stage": 5}}, ["zero", "stage", "5"]),
        ({"seqlen": 0}, ["seqlen = 0", "greater than 0"]),
        ({"seqlenn": 5}, ["seqlenn", "known keys", "seqlen"]),
        ({"hardware": "abacus"}, ["abacus", "h100-80gb"]),
        ({"overrides": {"nope": 1}}, ["nope", "hidden_size"]),
        ({"data": {"corpus": "/no/such"}}, ["/no/such", "python-stdlib"]),
        ({"world": "moon"}, ["world", "moon"]),
        ({"lora": {"rank": 4, "dropout": 1}}, ["lora.dropout", "less than 1"]),
        ({"lora": {"rank": 4, "dropout": 0.05}}, ["gate (True)", "other masks", "dropout to 0"]),
    ],
)
def test_bad_settings_name_the_value_and_a_fix(change: dict[str, object], words: list[str]) -> None:
    """Impossible settings fail before anything runs, with one helpful line."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the words are checked below
        make_cell({**SETTINGS, **change})
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("attention", "steps"), [("sdpa", 0), ("flex", 1)])
def test_a_compiled_attention_warms_up(attention: str, steps: int) -> None:
    """Its first calls try kernels, in memory that later calls do not take."""
    engine = {"name": "fsdp2", "offload": True}
    world = {"world": "phantom", "hardware": "h100-80gb"}
    cell = make_cell({**SETTINGS, **world, "engine": engine, "attention": attention})
    assert cell.warmup == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question: [", ["not YAML"]),
        ("- 1", ["must be a mapping"]),
        (YAML.replace("source: here", ""), ["source", "required"]),
        (YAML.replace("question", "qestion"), ["qestion", "known keys"]),
        (YAML.replace("base: {", "base: {seqlem: 3, "), ["seqlem", "known keys"]),
    ],
)
def test_bad_experiment_names_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    """A malformed experiment fails with its file and key."""
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the words are checked below
        load_experiment(path)
    assert all(word in str(raised.value) for word in [str(path), *words]), str(raised.value)
