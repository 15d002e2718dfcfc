"""A small model, its data and its true gradients, for tests of other people's training loops."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3Config, Qwen3ForCausalLM

from alst_impl import LongSequence, enable

LENGTH = 21
LAUNCHER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""Variables that accelerate requires, although the group already exists."""
METHODS: list[dict[str, Any]] = [
    {"sp": 2},
    {"sp": 2, "method": "layerwise"},
    {"cp": 2, "method": "ring"},
    {"sp": 1, "cp": 2, "method": "usp"},
]
"""Options of `enable` for two ranks that share each sample, by every method that shards sequences."""


def stock_model(dtype: torch.dtype = torch.float64) -> Qwen3ForCausalLM:
    """A small Qwen3 with fixed weights."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).to(dtype)


def batches() -> list[dict[str, Tensor]]:
    """Two batches of two samples. Most tokens of the second batch are prompts."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for prompt in (0, 15):
        ids = torch.randint(50, (2, LENGTH), generator=generator)
        labels = ids.clone()
        labels[1, :15] = -100
        labels[:, :prompt] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def stock_gradients(model: Any, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the mean loss over all labels of `data` in one process, from the model's own forward."""
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    for batch in data:
        model(**batch, num_items_in_batch=torch.tensor(num_items), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def enabled(sp: int, model: Any = None, **options: Any) -> tuple[Any, LongSequence]:
    """A small model under ALST, over `sp` ranks."""
    model = stock_model() if model is None else model
    mesh = init_device_mesh("cpu", (dist.get_world_size() // sp, sp), mesh_dim_names=("dp", "sp"))
    return model, enable(model, mesh, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer over all parameters with a gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def whole(gradient: Any) -> Tensor:
    """The full gradient, even if `fully_shard` has sharded it."""
    tensor: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Full gradients by name."""
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
