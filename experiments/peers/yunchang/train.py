"""USP: yunchang's attention, Ulysses within a ring, in a stock transformers model."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from case import read_case, refuse
from loop import Batch, build, shard, start, train
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from yunchang import EXTRACT_FUNC_DICT, LongContextAttention, set_seq_parallel_pg
from yunchang.kernels import AttnType

case = read_case()
if case.packed:
    refuse("LongContextAttention takes no bounds of documents")
# The fuser of TorchScript asks for NVRTC, which phantom devices have not. First calls are not fused in any case.
torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])
device = start(case)
ulysses = {8: 2, 4: 2}.get(case.world_size, 1)
ring = case.world_size // ulysses
set_seq_parallel_pg(ulysses, ring, case.rank, case.world_size)
attention = LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)


def usp(
    _: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: object, **options: float
) -> tuple[Tensor, None]:
    """[B, S, H, D] of attention, from [B, H, S, D] queries of this rank, and fewer heads of keys and values."""
    heads = [each.transpose(1, 2) for each in (query, key, value)]
    if case.gated:
        heads = [each.double() for each in heads]  # see `differs` of peer.yaml
    out = attention(*heads, softmax_scale=options.get("scaling"), causal=True)
    return out.to(query.dtype), None


AttentionInterface.register("usp", usp)
AttentionMaskInterface.register("usp", flash_attention_mask)
model = build(case)
model.set_attn_implementation("usp")
model.gradient_checkpointing_enable()
model.train()
shard(case, model, device)


def local(tokens: Tensor) -> Tensor:
    """[1, S / world size] of this rank, from [1, S]: one piece of the front, one of the back."""
    extract = EXTRACT_FUNC_DICT["zigzag"]
    return extract(tokens, case.rank, world_size=case.world_size, rd=ring, ud=ulysses).to(device)


def losses(batches: list[Batch]) -> Iterator[Tensor]:
    """This rank's part of the loss of each micro-batch, times the number of ranks, over which gradients are averaged."""
    shifted = [pad(batch["labels"][:, 1:], (0, 1), value=-100) for batch in batches]
    count = sum(int((labels != -100).sum()) for labels in shifted)
    for batch, labels in zip(batches, shifted, strict=True):
        yield model(
            input_ids=local(batch["input_ids"]),
            position_ids=local(batch["position_ids"]),
            labels=local(labels),
            shift_labels=local(labels),
            num_items_in_batch=count / case.world_size,
            use_cache=False,
        ).loss


def mean(total: Tensor) -> float:
    """The loss of all ranks."""
    dist.all_reduce(total)
    return float(total) / case.world_size


train(case, model, device, losses, mean)
