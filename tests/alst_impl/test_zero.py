"""DeepSpeed around an enabled model, and the sizes of its buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from training import assert_same_gradients, config_of, corpus_of, truth_of

from alst_impl import library, models
from alst_impl.engines.zero import Zero

if TYPE_CHECKING:
    from conftest import Ranks


def gradients_of_zero3(rank: int, world_size: int) -> dict[str, Tensor]:
    """Body of a rank: a user's own ZeRO-3, which partitions the model before `enable`."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    settings["zero_optimization"] |= {"reduce_bucket_size": 10_000}
    model = models.materialize(config_of())
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "sp"))
    alst = library.enable(model, mesh, tiles=3)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    ids, labels, _, _ = corpus_of(config_of()).rows(0)[0]
    loss = engine(**alst.shard({"input_ids": ids[None], "labels": labels[None]})).loss
    engine.backward(loss)
    return {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}


def test_zero3_around_an_enabled_model_has_the_gradients_of_the_stock_model(ranks: Ranks) -> None:
    """Tiled modules are gathered as a unit, also if parameters were partitioned first."""
    ours = ranks(2)(gradients_of_zero3)[0]
    assert_same_gradients(ours, truth_of(config_of()).gradients)


@pytest.mark.parametrize(
    ("options", "num_parameters", "sizes"),
    [
        ({}, 8 * 10**9, (500_000_000, 50_000_000)),
        ({}, 10**6, (500_000, 50_000)),
        ({"reduce_bucket_size": 7, "prefetch_bucket_size": 0}, 10**6, (7, 0)),
    ],
    ids=["large", "small", "asked-for"],
)
def test_buckets_follow_the_model_unless_asked_for(
    options: dict[str, Any], num_parameters: int, sizes: tuple[int, int]
) -> None:
    """A large model gets DeepSpeed's own sizes, which would be most of a small model's memory."""
    settings = Zero(**options).settings(config_of(), False, num_parameters)["zero_optimization"]
    assert (settings["reduce_bucket_size"], settings["stage3_prefetch_bucket_size"]) == sizes
