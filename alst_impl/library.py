"""ALST in your own training loop, for your own transformers model.

Usage, with one process per device:

    mesh = init_device_mesh(device, (dp, sp), mesh_dim_names=("dp", "sp"))
    alst = enable(model, mesh)  # then DDP, fully_shard or DeepSpeed around it, or nothing
    for batch in loader:  # whole sequences, the same on all ranks of an sp group
        loss = model(**alst.shard(batch["input_ids"], batch["labels"])).loss
        loss.backward()
        alst.average_gradients()  # where no engine does it
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)

Engines average gradients over all ranks, so each rank's loss is scaled for that: averaged over ranks, losses
and gradients are those of the mean over all valid labels.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from alst_impl import hf, safeguards
from alst_impl.data import Batch
from alst_impl.layout import IGNORE_INDEX, Layout
from alst_impl.methods.alst import Alst
from alst_impl.methods.base import check_shardable
from alst_impl.placement import Evidence, Placement
from alst_impl.safeguards import StepLabels

TOLD_NAMES = 3
"""Maximum number of parameters that a warning names."""


class Shard:
    """What `shard` passes to the model's forward beside tensors, in a class that engines pass on unchanged."""

    def __init__(self, num_labels: int, num_items: int, divisor: Tensor, layout: Layout) -> None:
        self.num_labels, self.num_items, self.divisor = num_labels, num_items, divisor
        self.layout = layout


@dataclass
class _Guard:
    """What an enabled model's forward needs for its checks."""

    inner: Any
    """The model's forward with ALST, a bound method."""
    sp: int
    world_size: int
    labels: StepLabels
    stock: bool = False
    """Whether the stock forward runs instead."""


@dataclass(frozen=True)
class LongSequence:
    """A model whose sequences are sharded over the `sp` axis of `mesh`."""

    model: PreTrainedModel
    mesh: DeviceMesh
    device: torch.device
    evidence: Evidence
    _guard: _Guard

    def shard(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        *,
        num_items: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """This rank's keyword arguments for `model(...)`, from whole sequences. Collective.

        Tensors are int64 [B, S]. `labels` are *not* shifted; -100 is ignored. Positions count from 0 by
        default. `num_items` is the number of valid labels of the whole optimizer step, as `count` returns it;
        a step of several micro-batches needs it. The `.loss` of that call is scaled: its mean over all ranks
        is the stock model's loss, and the mean of the gradients is the stock model's gradient.

        Raises `ValueError` on all ranks if positions restart (packed documents are not supported here),
        if ranks of one sp group hold different samples, if `num_items` is wrong for the step, if parameters
        differ between ranks, or if `fully_shard` does not average gradients over all ranks.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        elif bool((position_ids.diff(dim=1) != 1).any()):
            raise ValueError(
                "position_ids restart inside a sample, but alst.shard(...) takes one document per sample; do "
                "not pack documents"
            )
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        whole = Batch(
            input_ids.cpu(), shifted.cpu(), position_ids.cpu(), Layout(input_ids.shape[1])
        )
        safeguards.check_sharding(self.model, self._guard.world_size)
        num_labels = self._agreed_labels(whole, num_items)
        declared = num_labels if num_items is None else int(num_items)
        self._expect(num_labels, declared)
        layout = Layout(input_ids.shape[1], sp=self._guard.sp, mesh=self.mesh)
        local = layout.cut(whole).to(self.device)
        divisor = torch.tensor(max(declared, 1), device=self.device)
        told = Shard(num_labels, declared, divisor, layout)
        inputs = local.model_inputs()
        inputs.pop("layout", None)
        return {**inputs, "use_cache": False, "shard": told}

    def count(self, labels: Iterable[Tensor]) -> Tensor:
        """Valid labels of one optimizer step on all ranks, int64 scalar: the `num_items` of `shard`. Collective.

        `labels` holds the labels of this rank's micro-batches, each int64 [B, S], whole and not shifted.
        """
        valid = sum(int((x[:, 1:] != IGNORE_INDEX).sum()) for x in labels)
        total = torch.tensor(valid, device=self.device)
        dist.all_reduce(total)
        return total // self.mesh["sp"].size()  # its ranks hold the same samples

    def average_gradients(self) -> None:
        """Average every gradient over all ranks; for replicated parameters without an engine. Collective.

        A gradient that is missing on some ranks counts as zero there. A parameter without a gradient on any
        rank is left alone, and a warning names it. Raises `ValueError` for a sharded model.
        """
        if _is_sharded(self.model):
            raise ValueError(
                "average_gradients() is for replicated parameters; fully_shard and DeepSpeed average "
                "gradients themselves: leave the call out"
            )
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name in self._without_gradient(named):
            del named[name]
        for parameter in named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self._guard.world_size

    def forget(self) -> None:
        """Call this after dropping gradients without an optimizer step. Local."""
        self._guard.labels.forget()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the model is the stock one, to generate or to evaluate whole sequences. Local.

        Each rank computes its own input. MLPs and norms stay tiled, which is exact.
        """
        self._guard.stock = True
        try:
            with hf.stock_attention(self.model):
                yield
        finally:
            self._guard.stock = False

    def _without_gradient(self, named: dict[str, torch.nn.Parameter]) -> list[str]:
        """Names of parameters that have no gradient on any rank, with a warning. Collective."""
        have = torch.tensor([p.grad is not None for p in named.values()], device=self.device).int()
        missing = (have == 0).sum()
        dist.all_reduce(missing)
        if int(missing) == 0:
            return []
        dist.all_reduce(have)
        without = [name for name, n in zip(named, have.tolist(), strict=True) if n == 0]
        if without:
            warnings.warn(
                f"{len(without)} trainable parameters have no gradient on any rank: "
                f"{', '.join(without[:TOLD_NAMES])}{', ...' if len(without) > TOLD_NAMES else ''}; "
                "they are not part of the loss",
                stacklevel=3,
            )
        return without

    def _agreed_labels(self, whole: Batch, num_items: Tensor | int | None) -> int:
        """Valid labels of this micro-batch on all ranks. Raises `ValueError` on all ranks if any differ. Collective."""
        sp, world_size = self.mesh["sp"], self._guard.world_size
        name, parameter = safeguards.witness(self.model)
        seen = torch.tensor([safeguards.digest(whole)], device=self.device)
        other_sample = _differ(seen, sp.get_group())
        declared = seen.new_tensor(-1 if num_items is None else int(num_items))
        found = torch.stack([safeguards.fingerprint(parameter).to(self.device), declared])
        apart = _differ(found, None)
        mine = whole.num_valid().to(self.device) * (sp.get_local_rank() == 0)
        told = torch.cat([mine[None], other_sample.int(), apart.int()])
        # All ranks raise, so none waits for another.
        dist.all_reduce(told)
        num_labels, samples, parameters, counts = told.tolist()
        if samples:
            raise ValueError(
                f"the {sp.size()} ranks of an sp group got different samples, but share one; give them the "
                "same batches: let the sampler count mesh['dp'] ranks, not all ranks (no "
                "accelerator.prepare(loader), and another sampler in a Trainer)"
            )
        if parameters:
            raise ValueError(
                f"parameter '{name}' differs between the {world_size} ranks: gradients were not averaged "
                "over all of them; call alst.average_gradients() before optimizer.step(), or wrap the "
                "model in DDP, fully_shard or DeepSpeed over all ranks"
            )
        if counts:
            raise ValueError(
                f"num_items ({num_items}) differs between ranks; pass alst.count(labels of all "
                "micro-batches of the step), which counts over all ranks"
            )
        return int(num_labels)

    def _expect(self, num_labels: int, declared: int) -> None:
        if not torch.is_grad_enabled():
            return
        labels, parameters = self._guard.labels, list(self.model.parameters())
        if not _is_sharded(self.model) and all(p.grad is None for p in parameters):
            labels.forget()  # gradients were dropped, as a scaler does after an overflow
        labels.expect(num_labels, declared)


def _is_sharded(model: PreTrainedModel) -> bool:
    """Whether gradients of `model` are sharded, or may be stored outside `.grad`."""
    return safeguards.is_deepspeed(model) or any(isinstance(p, DTensor) for p in model.parameters())


def _differ(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Which of `values` (int64 [N]) differ between ranks of `group`, as bool [N]. Collective."""
    largest, smallest = values.clone(), values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return largest != smallest


def _guarded_forward(model: PreTrainedModel, *args: Any, shard: Any = None, **kwargs: Any) -> Any:
    """The forward of an enabled model: takes what `LongSequence.shard` returns, and refuses unsafe calls."""
    guard: _Guard = vars(model)["guard"]
    if guard.stock:
        return type(model).forward(model, *args, **kwargs)
    if shard is None:
        _check_unsharded(guard, kwargs)
        return guard.inner(*args, **kwargs)
    if "num_items_in_batch" in kwargs:
        raise ValueError(
            "num_items_in_batch comes beside alst.shard(...), which counts labels itself; call "
            "model(**alst.shard(...)) alone (in a Trainer: override compute_loss and return that loss)"
        )
    if not shard.layout.trivial:
        kwargs["layout"] = shard.layout
    output = guard.inner(*args, **kwargs, num_items_in_batch=shard.divisor)
    output.loss = output.loss * guard.world_size
    guard.labels.watch(output.loss, shard.num_labels, shard.num_items)
    return output


def _check_unsharded(guard: _Guard, kwargs: dict[str, Any]) -> None:
    stock = "for evaluation or generate(), use `with alst.disabled():`"
    if guard.sp > 1:
        raise ValueError(
            f"the model shares each sample between {guard.sp} ranks and was called without a shard; "
            f"call model(**alst.shard(input_ids, labels)); {stock}"
        )
    if kwargs.get("past_key_values") is not None:
        raise ValueError(f"an enabled model has no key/value cache; {stock}")


def enable(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    host: str = "cpu",
    attention: str = "sdpa",
    checkpoint: bool = True,
    **options: Any,
) -> LongSequence:
    """Enable ALST on `model`, in place; call it before wrapping the model in an engine. Local.

    `model` may be wrapped by peft. `mesh` has the axes `dp` and `sp` and covers all ranks. `options` are the
    fields of `alst_impl.methods.alst.Alst` except `sp`. Other models of the process are untouched. Raises
    `ValueError` for a model that cannot be sharded exactly, naming the part.
    """
    # peft wraps the model; ALST changes the model inside.
    model = getattr(model, "get_base_model", lambda: model)()
    if "guard" in vars(model):
        raise ValueError(f"{type(model).__name__} is enabled already; build another model")
    method = Alst(sp=mesh["sp"].size(), **options)
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"mesh has {mesh.size()} of {dist.get_world_size()} ranks; use a mesh of all ranks"
        )
    check_shardable(model.config.to_dict(), method.sp, "alst", type(model).__name__)
    device = next(model.parameters()).device
    placement = Placement(device, torch.device(host))
    method.enable(model, placement, attention, method.sp)
    if checkpoint:
        method.checkpoint(model, placement)
    model.train()
    guard = _Guard(model.forward, method.sp, mesh.size(), StepLabels())
    vars(model)["guard"] = guard
    hf.set_forward(model, _guarded_forward)
    handle = register_optimizer_step_pre_hook(partial(_before_update, weakref.ref(model)))
    weakref.finalize(model, handle.remove)
    return LongSequence(model, mesh, device, placement.evidence, guard)


def _before_update(
    reference: weakref.ref[PreTrainedModel], optimizer: torch.optim.Optimizer, *_: Any
) -> None:
    """Before any optimizer of the process steps: check that this model's gradients are those of a whole step."""
    model = reference()
    if model is None:
        return
    labels: StepLabels = vars(model)["guard"].labels
    if safeguards.owns(optimizer, model) or (safeguards.is_deepspeed(model) and labels.complete):
        labels.finish()
