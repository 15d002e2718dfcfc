"""ALST inside somebody's own training loop, around their own transformers model.

The whole of it, with one process per device:

    mesh = init_device_mesh(device, (dp, sp), mesh_dim_names=("dp", "sp"))
    alst = enable(model, mesh)
    for batch in loader:  # whole sequences, the same on all ranks of an sp group
        loss = model(**alst.shard(batch["input_ids"], batch["labels"])).loss
        loss.backward()
        alst.sum_gradients()  # or an engine that sums, not averages, over all ranks
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from alst_impl.data import IGNORE_INDEX, Batch, shard_sequence
from alst_impl.methods.alst import Alst
from alst_impl.methods.base import check_shardable
from alst_impl.placement import Evidence, Placement


@dataclass(frozen=True)
class LongSequence:
    """A model whose sequences are sharded over the `sp` axis of `mesh`."""

    model: PreTrainedModel
    mesh: DeviceMesh
    device: torch.device
    evidence: Evidence

    def shard(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """This rank's keyword arguments for `model(...)`, from whole sequences. Collective.

        All arguments are int64 [B, S]; `labels` are *not* shifted (-100 ignores), positions count from
        0 by default. The `.loss` of that call is an addend: the sum over all ranks is the mean over
        all valid labels, so gradients have to be summed over ranks, not averaged. Raises
        `ValueError` for positions that restart: packed documents need `alst_impl.data.Batch`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        elif bool((position_ids.diff(dim=1) != 1).any()):
            raise ValueError(
                "position_ids restart inside a sample: pass a Batch with its documents instead"
            )
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        whole = Batch(input_ids.cpu(), shifted.cpu(), position_ids.cpu())
        sp = self.mesh["sp"]
        local = shard_sequence(whole, sp.size(), sp.get_local_rank()).to(self.device)
        num_valid = local.num_valid()
        dist.all_reduce(num_valid)
        return {
            **local.model_inputs(),
            "num_items_in_batch": num_valid.clamp(min=1),
            "use_cache": False,
        }

    def sum_gradients(self) -> None:
        """Sum every gradient over all ranks; for models that no engine shards. Collective."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def enable(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    host: str = "cpu",
    attention: str = "sdpa",
    checkpoint: bool = True,
    **options: Any,
) -> LongSequence:
    """Put ALST into `model`, in place; call before wrapping it in an engine. Local.

    `mesh` has the axes `dp` and `sp`. `options` are those of `alst_impl.methods.alst.Alst` but `sp`.
    Other models of the process are untouched. Raises `ValueError` for a model that cannot be sharded
    exactly, naming the part.
    """
    method = Alst(sp=mesh["sp"].size(), **options)
    check_shardable(model.config.to_dict(), method.sp, "alst", type(model).__name__)
    device = next(model.parameters()).device
    placement = Placement(device, torch.device(host))
    method.enable(model, mesh, placement, attention)
    if checkpoint:
        method.checkpoint(model, placement)
    model.train()
    return LongSequence(model, mesh, device, placement.evidence)
