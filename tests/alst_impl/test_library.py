"""ALST in a user's training loop, as the documentation shows it."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small import batches, stock_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from alst_impl import hf, library

if TYPE_CHECKING:
    from conftest import Ranks


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An AdamW with a large eps, which keeps updates proportional to gradients."""
    return torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-2)


def documented_loop() -> str:
    """The indented block of the module's docstring."""
    lines = (library.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def test_the_readme_shows_the_loop_that_is_tested() -> None:
    """README and module docstring have the same lines."""
    readme = Path(library.__file__).parents[1] / "README.md"
    assert documented_loop().strip() in readme.read_text()


def train(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    """Body of a rank: runs the documented loop literally. Returns the trained parameters."""
    model = stock_model()
    names: dict[str, Any] = {
        "init_device_mesh": init_device_mesh,
        "enable": library.enable,
        "model": model,
        "optimizer": adamw(model),
        "loader": batches(),
        "device": "cpu",
        "dp": 1,
        "sp": world_size,
        "folder": f"{folder}/{rank}",
    }
    exec(documented_loop(), names)  # noqa: S102  our own text
    evidence = names["alst"].evidence
    assert evidence["exchanges"] > 0
    assert evidence["offloaded_bytes"] > 0
    assert evidence["tiles"] > 0
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_documented_loop_trains_as_stock_and_saves_a_stock_model(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Two AdamW steps at sp 2 equal those of plain transformers; the saved folder is a plain model."""
    trained = ranks(2)(train, str(tmp_path))
    model = stock_model()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model)
    for batch in batches():
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in trained:
        for name, p in model.named_parameters():
            change, expected = state[name] - initial[name], p.detach() - initial[name]
            assert float((change - expected).norm()) <= 1e-5 * float(expected.norm()), name

    same = stock_model()
    same.load_state_dict(trained[0], strict=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype=torch.float64)
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, same.eval()(ids).logits)
    assert type(loaded) is Qwen3ForCausalLM
    config = (tmp_path / "0" / "config.json").read_text()
    assert json.loads(config).get("_attn_implementation") is None
    assert f'"{hf.ATTENTION}"' not in config


EXTRAS = (
    "deepspeed",
    "harness",
    "matplotlib",
    "pandas",
    "peft",
    "psutil",
    "pynvml",
    "scipy",
    "seaborn",
    "snakemake",
    "yaml",
)


def train_without_extras(rank: int, world_size: int, folder: str) -> list[str]:
    """Body of a rank: `train` in a process that cannot import modules of an extra."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*EXTRAS, "alst_impl"):
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(EXTRAS))
    globals()["library"] = importlib.import_module("alst_impl.library")
    train(rank, world_size, folder)
    return [name for name in EXTRAS if sys.modules[name] is not None]


def test_the_documented_loop_needs_no_extra(ranks: Ranks, tmp_path: Path) -> None:
    """It runs and saves without DeepSpeed and without the packages that only the harness uses."""
    assert ranks(2)(train_without_extras, str(tmp_path)) == [[], []]


def refuse(rank: int, world_size: int) -> None:
    """Body of a rank: inputs that cannot be exact are refused."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "sp"))
    ids = torch.zeros(1, 6, dtype=torch.long)
    model = stock_model()
    alst = library.enable(model, mesh)
    with pytest.raises(ValueError, match="position_ids restart"):
        alst.shard(ids, ids, torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        model(**alst.shard(ids, ids), attention_mask=torch.ones_like(ids))
    wrong = stock_model()
    wrong.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="Qwen3ForCausalLM' has attention dropout"):
        library.enable(wrong, mesh)


def test_inexact_settings_are_refused(ranks: Ranks) -> None:
    """Restarting positions, a padding mask and attention dropout are refused."""
    ranks(1)(refuse)
