"""A planned run as a script: it holds the plan's bytes, trains as the stock model does, and is refused where it could not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from loops import SEQLEN, make_folder
from phantoms import NEEDED, cell, stepped
from torch.utils.data.distributed import DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alst_impl.config import TrainConfig
from alst_impl.models import hf_config
from harness.cells.cell import Cell
from harness.phantom.session import DeviceUse, run
from harness.present.emit import emit


def needed(test: Any) -> Any:
    """Marks a test that needs phantom devices."""
    for mark in NEEDED:
        test = mark(test)
    return test


ROOT = Path(__file__).parents[3]
EXACT = 0.005
"""Least relative difference of bytes that is one."""

ALST = {"name": "alst", "sp": 2}
DENSE = {
    "model": "qwen3-8b",
    "method": ALST,
    "engine": {"name": "fsdp2", "offload": True},
    "seqlen": 65_536,
    "world_size": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "dense, states on the host": DENSE,
    "adapters on two cards of 24 GB": {
        "model": "llama3.1-8b",
        "method": ALST,
        "lora": {"rank": 16},
        "seqlen": 32_768,
        "world_size": 2,
        "hardware": "rtx4090",
    },
    "experts": {
        "model": "qwen3-30b-a3b",
        "method": {
            "name": "alst",
            "sp": 4,
            "tile_mlp": False,
            "tile_norm": False,
            "tile_loss": False,
            "offload": False,
        },
        "seqlen": 32_768,
        "world_size": 8,
    },
    "packed documents on two nodes": {
        "model": "qwen3-0.6b",
        "method": {"name": "alst", "sp": 8},
        "data": {"documents": [5_000, 3_000]},
        "seqlen": 32_768,
        "world_size": 16,
        "accumulation": 2,
    },
    "ZeRO-3": {
        "model": "llama3.1-8b",
        "method": {"name": "alst", "sp": 4},
        "engine": "zero",
        "seqlen": 32_768,
        "world_size": 4,
        "optimizer": {"max_grad_norm": 1.0},
    },
}
"""Runs of two layers by what they show."""


@cache
def planned(name: str) -> tuple[Cell, int, int]:
    """A run of `RUNS`, and the allocated and reserved bytes of the suite's own second step of it."""
    of = cell(**{"overrides": {"num_hidden_layers": 2}, "warmup": 1, **RUNS[name]})
    (step,) = stepped(of)
    assert step.memory is not None
    assert step.memory.cuda is not None
    return of, step.memory.peak_bytes, max(step.memory.cuda.reserved_bytes.values())


def emitted(of: Cell, folder: Path) -> Path:
    """`folder` with the script of a cell."""
    emit(of.train, of.hardware, folder, expandable_segments=bool(of.expandable_segments))
    return folder


def used(folder: Path, of: Cell) -> DeviceUse:
    """What `alst phantom --gpus N -- ./run.sh` finds: the bytes of the one rank that runs for all."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = run(
        [str(folder / "run.sh")], of.hardware, gpus=of.train.world_size, limit_s=240,
        base={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.verdict == "fits", (result.reason, result.processes)
    (process,) = result.processes
    assert process.stands_for == of.train.world_size
    (use,) = process.devices
    return use


@needed
@pytest.mark.parametrize("name", RUNS)
def test_a_script_holds_the_bytes_of_the_plan(name: str, tmp_path: Path) -> None:
    """The folder runs as it is, and holds what the suite's own second step does."""
    of, allocated, reserved = planned(name)
    use = used(emitted(of, tmp_path / "out"), of)
    assert use.allocated_bytes == pytest.approx(allocated, rel=EXACT)
    assert use.reserved_bytes == pytest.approx(reserved, rel=EXACT)


@needed
def test_a_script_that_does_something_else_has_other_bytes(tmp_path: Path) -> None:
    """Here it keeps the training states on the device."""
    of, allocated, _ = planned("dense, states on the host")
    folder = emitted(of, tmp_path / "out")
    script = folder / "train.py"
    told = script.read_text()
    script.write_text(told.replace("fully_shard(unit, offload_policy=policy)", "fully_shard(unit)"))
    assert script.read_text() != told
    assert used(folder, of).allocated_bytes > 1.05 * allocated


# -- values ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a model and of text."""
    return make_folder(tmp_path_factory.mktemp("emitted"))


RATE, STEPS, SAMPLES = 1e-2, 3, 2
"""Learning rate, steps, and samples of a step."""


def stock_losses(model: Path, data: Path) -> list[float]:
    """Losses of the stock model under AdamW in one process."""
    stock, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    optimizer = torch.optim.AdamW(stock.parameters(), lr=RATE, weight_decay=0.0)
    texts = [path.read_text() for path in sorted(data.iterdir())]
    order = list(DistributedSampler(texts, num_replicas=1, rank=0, seed=0))
    losses = []
    for step in range(STEPS):
        ids = [
            tokenizer(texts[i], truncation=True, max_length=SEQLEN, return_tensors="pt")
            for i in order[step * SAMPLES : (step + 1) * SAMPLES]
        ]
        labels = torch.tensor(sum(each["input_ids"].shape[1] - 1 for each in ids))
        total = 0.0
        for each in ids:
            found = stock(**each, labels=each["input_ids"], num_items_in_batch=labels).loss
            found.backward()
            total += float(found.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def run_here(folder: Path, **changes: Any) -> list[float]:
    """The losses that `run.sh` prints, on the CPU, after `changes` of its settings."""
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({**yaml.safe_load(settings.read_text()), **changes}))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [folder / "run.sh"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        float(loss) for loss in re.findall(r"^step \d+: loss ([0-9.]+),", done.stdout, re.MULTILINE)
    ]


TRAINED: dict[str, dict[str, Any]] = {
    "fsdp2, states on the host": {
        "method": ALST,
        "engine": {"name": "fsdp2", "offload": True},
        "batch_size": SAMPLES,
    },
    "ZeRO-3": {
        "method": {"name": "layerwise", "sp": 2},
        "engine": "zero",
        "accumulation": SAMPLES,
    },
    "plain": {"method": "baseline", "engine": "plain"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_script_trains_as_the_stock_model(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two ranks and real text on the CPU: three steps have the stock model's losses, and what is saved is a stock model."""
    model, data = folders
    train = TrainConfig(
        model=str(model),
        seqlen=SEQLEN,
        world_size=2,
        data={"corpus": str(data)},
        optimizer={"learning_rate": RATE},
        **TRAINED[name],
    )
    folder = tmp_path / "out"
    emit(train, "h100-80gb", folder, expandable_segments=True)
    losses = run_here(folder, output=str(tmp_path / "trained"))
    assert losses == pytest.approx(stock_losses(model, data), rel=2e-6)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert before.keys() == after.keys()
    # Three steps of AdamW change a weight by at most three times the learning rate.
    changes = [float((after[key] - value).abs().max()) for key, value in before.items()]
    assert min(changes) > 0
    assert max(changes) < 1.1 * STEPS * RATE


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_saved_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The first loss is the stock model's, because an adapter begins with no effect. The weights stay."""
    model, data = folders
    train = TrainConfig(
        model=str(model), method=ALST, engine="fsdp2", lora={"rank": 4}, seqlen=SEQLEN, world_size=2,
        data={"corpus": str(data)}, optimizer={"learning_rate": RATE}, batch_size=SAMPLES,
    )  # fmt: skip
    emit(train, "h100-80gb", tmp_path / "out", expandable_segments=True)
    losses = run_here(tmp_path / "out", output=str(tmp_path / "trained"))
    assert losses[0] == pytest.approx(stock_losses(model, data)[0], rel=2e-6)
    assert losses[0] != losses[1]
    stock = AutoModelForCausalLM.from_pretrained(model)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(stock, tmp_path / "trained")
    adapters = {n: p for n, p in adapted.named_parameters() if ".lora_" in n}
    assert adapters
    assert all(float(value.detach().abs().max()) > 0 for value in adapters.values())
    for name, value in before.items():
        held = (
            name
            if name in adapted.base_model.model.state_dict()
            else name.replace(".weight", ".base_layer.weight")
        )
        assert torch.equal(adapted.base_model.model.state_dict()[held], value)


# -- the folder -----------------------------------------------------------------------------------


TINY = {"model": "tiny-llama", "method": ALST, "seqlen": 64, "world_size": 2, "dtype": "bfloat16"}


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    """The message names it and the way out."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train.py").write_text("mine")
    with pytest.raises(ValueError, match=r"out: exists already; name a new folder, or remove it"):
        emit(TrainConfig(**TINY), "h100-80gb", folder, expandable_segments=True)
    assert (folder / "train.py").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """There is none to put it in. Nothing is left behind."""
    with pytest.raises(ValueError, match="No such file or directory; name a new folder"):
        emit(TrainConfig(**TINY), "h100-80gb", tmp_path / "a" / "b", expandable_segments=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"name": "seq1f1b", "pp": 2}}, "'seq1f1b' runs its own schedule .* use one of"),
        ({"data": {"mask": "prefix"}}, "mask is 'prefix'; use mask: none"),
        (
            {"engine": {"name": "plain", "update_in_backward": True}},
            "use update_in_backward: false",
        ),
        ({"engine": "zero", "lora": {"rank": 4}}, "float32 are more than one dtype"),
        ({"world_size": 11, "method": "baseline"}, "--gpus 11: .* use a multiple of 2"),
    ],
)
def test_what_a_script_cannot_do_exactly_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """In one line, before anything is written."""
    with pytest.raises(ValueError, match=message):
        emit(
            TrainConfig(**{**TINY, **settings}),
            "h100-80gb",
            tmp_path / "out",
            expandable_segments=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "tiny-gemma3", "engine": {"name": "fsdp2", "offload": True}, "lora": {"rank": 4}},
        {"model": "tiny-qwen3-moe", "engine": "zero", "data": {"documents": 3}, "world_size": 16},
        {"engine": {"name": "zero", "stage": 1}, "overrides": {"num_hidden_layers": 1}},
        {"engine": "plain", "optimizer": {"name": "sgd"}, "dtype": "float64"},
    ],
)
def test_the_files_are_well_formed(settings: dict[str, Any], tmp_path: Path) -> None:
    """The script is formatted and uses all that it imports, run.sh may be executed, and the model is the planned one."""
    train = TrainConfig(**{**TINY, **settings})
    files = emit(train, "h100-80gb", tmp_path / "out", expandable_segments=False)
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    lint = [
        "check",
        "--select",
        "E,F,W,I",
        "--config",
        "lint.isort.known-first-party=['alst_impl']",
    ]
    for arguments in (["format", "--check"], lint):
        subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--isolated", "--line-length", "120" if arguments is lint else "100",
             tmp_path / "out" / "train.py"],
            check=True,
        )  # fmt: skip
    script = tmp_path / "out" / "run.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert "expandable_segments:False" in script.read_text()
    found, expected = (
        AutoConfig.from_pretrained(tmp_path / "out").to_dict(),
        hf_config(train).to_dict(),
    )
    assert found == {**expected, "_name_or_path": str(tmp_path / "out")}
