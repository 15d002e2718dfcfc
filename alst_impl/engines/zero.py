"""DeepSpeed ZeRO stages 1 to 3 over all ranks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.engines.base import Engine, Runtime, Setup, dtypes, optimizer_of
from alst_impl.extras import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.autograd.graph import GradientEdge
    from transformers import PreTrainedModel

    from alst_impl.models.weights import Initializer
    from alst_impl.placement import Placement


SAVED, UNIVERSAL = "saved", "universal"
"""Subfolders of a checkpoint's folder."""
LARGE = 10**9
"""Number of model parameters from which DeepSpeed's default bucket sizes are used."""
REDUCE_BUCKET_SIZE, PREFETCH_BUCKET_SIZE = 500_000_000, 50_000_000
"""DeepSpeed's defaults (deepspeed/runtime/zero/config.py), in elements."""


class ZeroRuntime(Runtime):
    """A DeepSpeed engine. Its average over ranks is undone, so gradients are summed."""

    module: Any

    def __init__(self, engine: Any, placement: Placement) -> None:
        self.module = engine
        self.placement = placement
        self.optimizer = engine.optimizer.optimizer
        self._left = 0

    def start_step(self, num_backwards: int) -> None:
        self._left = num_backwards

    def announce_backward(self) -> None:
        """Tell DeepSpeed that a backward follows, and whether it is the step's last."""
        self._left -= 1
        self.module.set_gradient_accumulation_boundary(self._left == 0)

    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None:
        import torch
        import torch.distributed as dist

        assert isinstance(output, torch.Tensor), "DeepSpeed takes losses"
        assert gradient is None, "DeepSpeed takes losses"
        self.announce_backward()
        # DeepSpeed averages gradients over its data-parallel ranks, which here are all ranks.
        self.module.backward(output * dist.get_world_size(), scale_wrt_gas=False)

    def _update(self) -> Tensor:
        import torch

        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm(), device=self.placement.device)

    def drop_gradients(self) -> None:
        optimizer = self.module.optimizer
        if self.module.zero_optimization_stage() == 3:
            optimizer._partition_all_parameters()  # as its step does at the end
        optimizer.zero_grad()

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.module.module.named_parameters())

    def _gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        gradients = {name: safe_get_full_grad(p) for name, p in self._named() if p.requires_grad}
        return {name: g.detach().cpu() for name, g in gradients.items() if g is not None}

    def _state_dict(self) -> dict[str, Tensor]:
        import deepspeed

        state = {}
        for name, parameter in self._named():
            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().cpu().clone()
        return state

    def save(self, folder: Path) -> None:
        """Write a DeepSpeed checkpoint, and beside it the universal one that `load` reads."""
        import argparse

        import torch.distributed as dist
        from deepspeed.checkpoint import ds_to_universal

        self.module.save_checkpoint(str(folder), tag=SAVED)
        if dist.get_rank() == 0:
            asked = argparse.Namespace(
                input_folder=str(folder / SAVED),
                output_folder=str(folder / UNIVERSAL),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):  # it reports its progress there
                ds_to_universal.main(asked)
        dist.barrier()

    def load(self, folder: Path) -> None:
        import torch

        # DeepSpeed reads this from its configuration at start, when no checkpoint is known yet.
        self.module._config.load_universal_checkpoint = True
        self.module.load_checkpoint(str(folder), tag=UNIVERSAL)
        for state in self.module.optimizer.optimizer.state.values():
            # Stage 3 gives all groups the same tensor, which each group would then increment.
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


class Zero(Engine):
    """DeepSpeed ZeRO with PyTorch's optimizers, so no optimizer is compiled on first use."""

    stage: Literal[1, 2, 3] = 3
    """What is sharded: optimizer states (1), gradients too (2), parameters too (3)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""
    offload_param: bool = False
    """Keep parameter shards in host memory (stage 3 only)."""
    reduce_scatter: bool = True
    """Reduce gradients to their owner instead of to all ranks."""
    reduce_bucket_size: int | None = Field(default=None, ge=1)
    """Size of the gradient reduction bucket, in elements.
    None is DeepSpeed's default of 500 million for models of at least `LARGE` parameters. Smaller models,
    whose memory it would dominate, get a proportional size."""
    prefetch_bucket_size: int | None = Field(default=None, ge=0)
    """Parameter elements that stage 3 prefetches; None scales DeepSpeed's default of 50 million likewise."""
    seq_parallel_communication_data_type: Literal["fp32", "bf16"] = "fp32"
    """Dtype of gradient reduction under DeepSpeed's own sequence parallelism; the released ALST recipes use bf16."""

    @property
    def updates_on_host(self) -> bool:
        return self.offload_optimizer

    def require(self) -> None:
        require("engine 'zero'", "zero", "deepspeed")

    def check(self, config: TrainConfig) -> None:
        if config.dtype == "float64":
            raise ValueError(
                "engine 'zero' does not support dtype float64, because DeepSpeed returns fp32 gradients; use engine "
                "'plain' or 'fsdp2'"
            )
        if self.offload_param and self.stage != 3:
            raise ValueError(
                f"offload_param needs sharded parameters, but stage is {self.stage}; use stage 3"
            )

    def start(self, setup: Setup) -> Runtime:
        self.require()
        import deepspeed

        model, config, placement, mpu = setup.model, setup.config, setup.placement, setup.mpu
        mixed = len(dtypes(model)) > 1
        if mixed and self.offload_param:
            raise ValueError(
                f"{type(model).__name__} has parameters of several dtypes {dtypes(model)}, but offload_param of "
                "DeepSpeed keeps all parameters in one; set offload_param: false"
            )
        settings = self.settings(config, mixed, sum(p.numel() for p in model.parameters()))
        if mpu is not None:
            settings["sequence_parallel_size"] = mpu.get_sequence_parallel_world_size()
            settings["seq_parallel_communication_data_type"] = (
                self.seq_parallel_communication_data_type
            )
        if self.stage == 3:
            self._shard(model, setup.initializer, settings, placement)
        else:
            setup.initializer.fill(model, model, placement.device)
        optimizer = optimizer_of(_by_dtype(model), config)
        with _defragmented_by_dtype() if mixed else contextlib.nullcontext():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
            )
        return ZeroRuntime(engine, placement)

    @staticmethod
    def _shard(
        model: PreTrainedModel,
        initializer: Initializer,
        settings: dict[str, Any],
        placement: Placement,
    ) -> None:
        """Fill and partition module by module, so a process holds its shards and one whole module."""
        import deepspeed

        for module in model.modules():
            if next(module.parameters(recurse=False), None) is None:
                continue
            initializer.fill(model, module, placement.device)
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=model.dtype)
        initializer.fill(model, model, placement.device)  # buffers of modules without parameters

    def settings(self, config: TrainConfig, mixed: bool, num_parameters: int) -> dict[str, Any]:
        """DeepSpeed's configuration for a model of `num_parameters`, `mixed` if they are of several dtypes."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_scatter": self.reduce_scatter,
            "reduce_bucket_size": _bucket_size(
                self.reduce_bucket_size, REDUCE_BUCKET_SIZE, num_parameters
            ),
            "stage3_prefetch_bucket_size": _bucket_size(
                self.prefetch_bucket_size, PREFETCH_BUCKET_SIZE, num_parameters
            ),
            "stage3_param_persistence_threshold": 0,
        }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_param:
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.accumulation,
            # DeepSpeed clips at 1.0 unless told otherwise.
            "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
            # Enabled, it casts every parameter. Disabled, it keeps dtypes and reduces all gradients in fp32.
            "bf16": {"enabled": config.dtype == "bfloat16" and not mixed},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }


def _bucket_size(asked: int | None, default: int, num_parameters: int) -> int:
    """`asked` if given, else `default`, scaled down for a model below `LARGE` parameters."""
    return default * min(num_parameters, LARGE) // LARGE if asked is None else asked


def _by_dtype(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one dtype each, because DeepSpeed flattens each group."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trainable if p.dtype == dtype] for dtype in dtypes(model)]
    return [{"params": group} for group in groups if group]


class _Buffers:
    """Flat buffers of several dtypes, addressed as one concatenated buffer."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Like `Tensor.narrow` on the concatenated buffers; a range never spans two dtypes."""
        for buffer in self._buffers:
            if start < buffer.numel():
                return buffer.narrow(dim, start, length)
            start -= buffer.numel()
        raise AssertionError("beyond the last buffer")


@contextlib.contextmanager
def _defragmented_by_dtype() -> Iterator[None]:
    """Make stage 3, which assumes one dtype, move shards into one flat buffer per dtype."""
    import itertools

    from deepspeed.runtime.zero import stage3

    stock = stage3.defragment

    def defragment(tensors: list[Tensor]) -> _Buffers:
        runs = itertools.groupby(tensors, key=lambda tensor: tensor.dtype)
        return _Buffers([stock(list(run)) for _, run in runs])

    stage3.defragment = defragment
    try:
        yield
    finally:
        stage3.defragment = stock
