"""Models that keep some parameters in fp32 train exactly in bf16, each parameter in its own dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from training import assert_same_gradients, config_of, run_steps, train, truth_of

from alst_impl import models, step
from alst_impl.config import TrainConfig
from alst_impl.methods.baseline import Baseline
from alst_impl.placement import Placement
from harness.gate.verdict import TOLERANCES

if TYPE_CHECKING:
    from conftest import Ranks

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **ROUTED,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "dots1": {**ROUTED, "head_dim": 16, "n_shared_experts": 1, "sliding_window": None},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "head_dim": 16,
    },
}
"""Model families whose routers stay in fp32 -> their fields besides `SIZES`."""


def bf16_run(folder: Path, model_type: str, engine: dict[str, Any]) -> TrainConfig:
    """A run of two ranks that share a sample. Parameters are in bf16, except those that the model keeps in fp32."""
    path = folder / f"{model_type}.json"
    path.write_text(json.dumps({"model_type": model_type, **SIZES, **FAMILIES[model_type]}))
    return config_of(
        model=str(path),
        dtype="bfloat16",
        method={"name": "alst", "sp": 2, "tiles": 3},
        engine=engine,
        world_size=2,
        seed=2,  # with this seed, bf16 and fp64 route every token to the same expert
    )


def assert_trains(ranks: Ranks, config: TrainConfig) -> None:
    """Gradients pass the gate, and every parameter keeps the dtype that the model gave it."""
    run = ranks(2)(run_steps, config)[0]
    tolerance = TOLERANCES["bfloat16"]
    truth = truth_of(config).gradients
    assert_same_gradients(run.gradients, truth, tolerance.ratio, tolerance.cosine)
    held = {name: p.dtype for name, p in models.build(config)[0].named_parameters()}
    assert set(held.values()) == {torch.bfloat16, torch.float32}
    assert {name: p.dtype for name, p in run.final.items()} == held


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("engine", [{"name": "fsdp2"}, {"name": "zero"}], ids=["fsdp2", "zero3"])
def test_routers_in_fp32_train_beside_bf16(
    ranks: Ranks, tmp_path: Path, engine: dict[str, Any], model_type: str
) -> None:
    """FSDP2 and ZeRO-3 shard the parameters of both dtypes."""
    assert_trains(ranks, bf16_run(tmp_path, model_type, engine))


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "zero", "stage": 1},
        {"name": "zero", "stage": 2, "offload_optimizer": True},
        {"name": "zero", "offload_optimizer": True, "reduce_scatter": False},
        {"name": "plain"},
    ],
    ids=["zero1", "zero2-offloaded", "zero3-offloaded", "plain"],
)
def test_other_engines_keep_routers_in_fp32(
    ranks: Ranks, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """No engine casts parameters that the model keeps in fp32."""
    assert_trains(ranks, bf16_run(tmp_path, "deepseek_v3", engine))


@pytest.mark.parametrize("engine", [{"name": "fsdp2"}, {"name": "zero"}], ids=["fsdp2", "zero3"])
def test_a_run_of_two_dtypes_resumes_from_its_checkpoint(
    ranks: Ranks, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """The checkpoint has the optimizer states of both dtypes: four steps equal two plus two, to the bit."""
    config, saved = bf16_run(tmp_path, "deepseek_v3", engine), tmp_path / "saved"
    (losses, whole), _ = ranks(2)(train, config, range(4))
    ranks(2)(train, config, range(2), None, saved)
    (rest, resumed), _ = ranks(2)(train, config, range(2, 4), saved)
    assert rest == losses[2:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def start(rank: int, world_size: int, config: TrainConfig) -> str:
    """Body of a rank: the message that refuses the run's start."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "sp"))
    with pytest.raises(ValueError, match=r".") as refusal:
        step.start(config, mesh, Placement(torch.device("cpu")))
    return str(refusal.value)


def test_offloaded_parameters_of_two_dtypes_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed would silently cast all of them to one dtype."""
    engine = {"name": "zero", "offload_param": True}
    (line, _) = ranks(2)(start, bf16_run(tmp_path, "deepseek_v3", engine))
    assert "set offload_param: false" in line


def start_hooked(rank: int, world_size: int, kind: str) -> str:
    """Body of a rank: the refusal of a method whose `apply` registers a hook of `kind` on a parameter."""

    def apply(self: Baseline, model: Any, *_: Any) -> None:
        getattr(model.lm_head.weight, kind)(lambda *_: None)

    pytest.MonkeyPatch().setattr(Baseline, "apply", apply)  # in this process, which ends
    return start(rank, world_size, config_of())


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(ranks: Ranks, kind: str) -> None:
    """Such hooks would be on meta tensors and never fire. The error names method, parameter and a fix."""
    (line,) = ranks(1)(start_hooked, kind)
    assert "method 'baseline' registers a hook on parameter 'lm_head.weight'" in line
    assert "register_full_backward_hook" in line
