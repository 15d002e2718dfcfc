"""Checks for mistakes in a user's training loop that would silently change the training."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alst_impl.data import Batch

BITS = 2**62 - 1
"""Checksums are masked with this, so they are non-negative int64."""


def digest(batch: Batch) -> int:
    """Checksum of the tokens, labels, positions, documents and shape of `batch`, which is on the CPU."""
    shape = (tuple(batch.input_ids.shape), batch.layout.documents)
    low = high = zlib.crc32(repr(shape).encode())
    for tensor in (batch.input_ids, batch.shift_labels, batch.position_ids):
        data = tensor.contiguous().numpy().data
        low, high = zlib.crc32(data, low), zlib.adler32(data, high)
    return (high << 30 ^ low) & BITS


def witness(model: nn.Module) -> tuple[str, nn.Parameter]:
    """Name and value of the smallest trainable parameter, to check that ranks train the same model."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return min(trainable, key=lambda named: named[1].numel())


def fingerprint(parameter: nn.Parameter) -> Tensor:
    """Bits of the fp64 sum of `parameter`, int64 scalar; 0 for a sharded one, because shards differ by rank."""
    # FSDP1 sets `_fsdp_flattened` on the parameters that it manages.
    if isinstance(parameter, DTensor) or hasattr(parameter, "_fsdp_flattened"):
        return torch.zeros((), dtype=torch.int64, device=parameter.device)
    return parameter.detach().double().sum().view(torch.int64) & BITS


def is_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO holds the parameters (stage 3) or their optimizer states (1 and 2)."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether gradients of `model` are sharded, or may be stored outside `.grad`."""
    return is_deepspeed(model) or any(isinstance(p, DTensor) for p in model.parameters())


def check_sharding(model: nn.Module, world_size: int, averaged: int) -> None:
    """Raise `ValueError` unless an engine that shards parameters divides sums over all ranks by `averaged`."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.size() != world_size:
            raise ValueError(
                f"parameter '{name}' is sharded over {parameter.device_mesh.size()} of {world_size} ranks, "
                "so gradients of the others would stay apart; shard it over a mesh of all ranks"
            )
    reduction = "mean" if averaged == world_size else "sum"
    if averaged != world_size and (is_deepspeed(model) or _is_fsdp1(model)):
        raise ValueError(
            f"reduction 'sum' leaves gradients to be summed over ranks, but the engine averages them over "
            f"{world_size}; use enable(..., reduction='mean')"
        )
    for module in model.modules():
        for factor in _divide_factors(module, world_size):
            if factor != averaged:
                raise ValueError(
                    f"{type(module).__name__} divides sums of gradients by {factor:g} "
                    f"(set_gradient_divide_factor), but reduction '{reduction}' needs {averaged} on {world_size} "
                    "ranks; leave the factor alone and use reduction 'mean'"
                )


def _is_fsdp1(model: nn.Module) -> bool:
    return any(hasattr(p, "_fsdp_flattened") for p in model.parameters())


def _divide_factors(module: nn.Module, default: int) -> Iterator[float]:
    """What each of `fully_shard`'s groups divides gradients by: a user's factor, or `default`.

    No public API returns them.
    """
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    for group in groups:
        if group is not None:
            factor: float | None = getattr(group, "gradient_divide_factor", None)
            yield default if factor is None else factor


class StepLabels:
    """Counts the labels of one optimizer step's micro-batches and compares them with the declared number.

    Each micro-batch's loss is divided by the number of labels of the whole step. So all micro-batches must
    declare the same number, and their labels must add up to it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin a step: no gradient of an earlier backward is left."""
        self._declared: int | None = None
        self._seen = 0
        self._scales: list[Tensor] = []

    @property
    def begun(self) -> bool:
        """Whether a backward of this step has run."""
        return self._declared is not None

    def expect(self, labels: int, declared: int) -> None:
        """Raise `ValueError` if a micro-batch of `labels` labels does not belong to the step that has begun."""
        if labels > declared:
            raise ValueError(
                f"num_items ({declared}) is less than the {labels} labels of this micro-batch on all ranks; "
                "pass alst.count(all micro-batches of the step)"
            )
        if not self.begun:
            return
        if declared != self._declared or self._seen + labels > declared:
            raise ValueError(
                f"no optimizer step since a backward that was divided by {self._declared} labels, and now "
                f"comes a micro-batch of {labels} that is divided by {declared}: accumulated gradients "
                "need one count; pass num_items=alst.count(all micro-batches of the step) to "
                "each shard(), or call alst.forget() after dropping gradients"
            )

    def watch(self, loss: Tensor, labels: int, declared: int) -> None:
        """Count the micro-batch of `loss` when backward reaches it."""

        def reached(scale: Tensor) -> None:
            self._declared = declared
            self._seen += labels
            self._scales.append(scale.detach())

        if loss.requires_grad:
            loss.register_hook(reached)

    @property
    def backwards(self) -> int:
        """Number of backwards of this step."""
        return len(self._scales)

    @property
    def complete(self) -> bool:
        """Whether the micro-batches so far hold as many labels as declared."""
        return self._seen == self._declared

    def finish(self) -> None:
        """End the step, before the optimizer updates. Raises `ValueError` if it was not a whole step."""
        if not self.begun:
            return
        declared, seen, scales = self._declared, self._seen, self._scales
        self.forget()
        if seen != declared:
            raise ValueError(
                f"num_items was {declared}, but the micro-batches of this step hold {seen} labels; pass "
                "alst.count(all micro-batches of the step), which counts each sample once"
            )
        if len(scales) > 1:
            _check_undivided(scales)


def _check_undivided(scales: Sequence[Tensor]) -> None:
    """Raise `ValueError` if each loss was divided by the number of losses before backward."""
    factors = [float(scale) for scale in scales]
    if all(math.isclose(factor * len(factors), 1, rel_tol=1e-3) for factor in factors):
        raise ValueError(
            f"each loss of this step was multiplied by {factors[0]:g} before backward, but num_items counts "
            f"all {len(factors)} micro-batches already; do not divide (DeepSpeed: "
            "engine.backward(loss, scale_wrt_gas=False)), and put a weight of your own into num_items"
        )


def owns(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether `optimizer` updates a parameter of `model`."""
    of_model = {id(p) for p in model.parameters()}
    groups: list[dict[str, Any]] = optimizer.param_groups
    return any(id(p) in of_model for group in groups for p in group["params"])
