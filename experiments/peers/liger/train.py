"""Liger's kernels in a stock transformers model: fused head and loss, fused MLP, norms and rotary positions."""

from collections.abc import Iterator

from case import read_case, refuse
from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3
from loop import Batch, build, shard, start, train
from torch import Tensor

APPLY = {"llama": apply_liger_kernel_to_llama, "qwen3": apply_liger_kernel_to_qwen3}

case = read_case()
if case.gated:
    refuse("Liger's kernels are written in Triton, which needs a GPU")
device = start(case)
model = build(case)
APPLY[model.config.model_type](model=model)
model.gradient_checkpointing_enable()
model.train()
shard(case, model, device, ends_apart=False)


def losses(batches: list[Batch]) -> Iterator[Tensor]:
    """The loss of each micro-batch."""
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        inputs = {name: tokens.to(device) for name, tokens in batch.items()}
        yield model(**inputs, use_cache=False, num_items_in_batch=count).loss


train(case, model, device, losses)
