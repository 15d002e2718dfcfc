"""ALST as its authors released it: their classes, unmodified, called as they call them.

Sources: deepspeed/runtime/sequence_parallel/ulysses_sp.py and the tutorial "Arctic Long Sequence Training
(ALST) for HF Transformers integration"; with `liger` and `offload`, ArcticTraining's recipes
(arctic_training/trainer/sft_trainer.py, model/liger_factory.py, monkey_patches.py). Its results are measured,
not assumed to be correct.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.extras import require
from alst_impl.layout import Layout
from alst_impl.methods.base import Method, check_sharded
from alst_impl.sources.base import load_source

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.engines.base import Runtime
    from alst_impl.placement import Evidence, Placement


class DeepspeedAlst(Method):
    """DeepSpeed's UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter, TiledMLP and a tiled loss."""

    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree."""
    tile_mlp: bool = True
    """Compute MLPs with TiledMLP."""
    tile_loss: bool = True
    """Compute logits and loss in tiles: sum over tokens, then divide, as in the tutorial."""
    tiled_by: Literal["sequence_tiled_compute", "TiledFusedLogitsLoss"] = "sequence_tiled_compute"
    """Which of DeepSpeed's two implementations of the tiled loss to use."""
    trainer_loss: bool = False
    """Combine the ranks' losses with the function that transformers' Trainer calls, not as in the tutorial.
    It needs an untiled loss."""
    tiles: int | None = Field(default=None, ge=1)
    """Number of tiles of MLP and loss; None follows the tutorial: `hidden_size` rows per tile."""
    liger: bool = False
    """Use Liger-Kernel's norms, RoPE and fused logits and loss, and its SwiGLU if the MLP is not tiled.
    Liger and tiling both replace the MLP (arXiv:2506.13996, section 5.4). Liger needs a CUDA device. It
    replaces the RoPE of the model's Python module for the whole process."""
    offload: bool = False
    """Keep checkpointed layer inputs in host memory, with ArcticTraining's blocking copies to unpinned memory."""

    def require(self) -> None:
        if self.liger:
            require("liger of method 'deepspeed_alst'", "peers", "liger_kernel", "triton")
        if self.offload:
            _arctic_patches()

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "deepspeed_alst")
        if config.engine.name != "zero":
            raise ValueError(
                f"method 'deepspeed_alst' runs under DeepSpeed only, not engine '{config.engine.name}'; "
                "use engine 'zero'"
            )
        if config.attention.name not in ("sdpa", "flash_attention_2"):
            raise ValueError(
                f"method 'deepspeed_alst' hands attention to transformers, which has no '{config.attention}'; "
                "use sdpa or flash_attention_2"
            )
        if config.seqlen % self.sp:
            raise ValueError(
                f"seqlen ({config.seqlen}) must be divisible by sp ({self.sp}) for method "
                f"'deepspeed_alst', which does not pad; use {config.seqlen // self.sp * self.sp}"
            )
        if self.sp > 1 and len(load_source(config.data.source).seqlens(config.seqlen)) > 1:
            raise ValueError(
                f"DeepSpeed's attention takes batch_size ({config.batch_size}) sequences in every step, but source "
                f"'{config.data.source.name}' has more in steps of shorter ones; use method 'alst'"
            )
        if self.trainer_loss and (self.tile_loss or self.sp == 1):
            raise ValueError(
                f"trainer_loss needs a sharded sequence and an untiled loss, but sp is {self.sp} and tile_loss is "
                f"{self.tile_loss}; set sp to 2 or more and tile_loss to false"
            )
        if self.liger and (self.tile_loss or self.trainer_loss):
            other = "tile_loss" if self.tile_loss else "trainer_loss"
            raise ValueError(
                f"liger computes the loss, and so does {other}; set {other}: false, or liger: false"
            )
        if self.offload and not config.checkpoint:
            raise ValueError(
                "offload moves checkpointed layer inputs, but checkpoint is false; set offload: false"
            )

    def layout(self, length: int) -> Layout:
        return Layout(length, sp=self.sp)

    def promises(self, config: TrainConfig) -> set[str]:
        promised = {"tiles"} if self.tile_mlp or self.tile_loss else set()
        return promised | {"offloaded_bytes"} if self.offload else promised

    def mpu(self) -> ModuleType | None:
        if self.sp == 1:
            return None
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        state: ModuleType = parallel_state_sp
        return state

    def shard(self, batch: Batch, layout: Layout) -> Batch:
        """DeepSpeed's own data loader shards the batch."""
        group = layout.group("sp")
        if group is None:
            return batch
        assert layout.mesh is not None, "it has a group"
        import torch
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

        from alst_impl.data import Batch as Shard
        from alst_impl.layout import IGNORE_INDEX

        labels = torch.nn.functional.pad(batch.shift_labels[:, :-1], (1, 0), value=IGNORE_INDEX)
        whole = {"input_ids": batch.input_ids, "labels": labels, "position_ids": batch.position_ids}
        # The adapter gathers on a device that the group supports, and returns shards in host memory.
        device = torch.device(layout.mesh.device_type)
        loader = UlyssesSPDataLoaderAdapter([whole], group.rank(), group, self.sp, device)
        # All ranks of the group pass the same sample, and the adapter yields it once per rank.
        shard = next(loader)
        return Shard(shard["input_ids"], shard["shift_labels"], shard["position_ids"], layout)

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        self.require()
        self._refuse_host(placement)
        import deepspeed
        import torch.distributed as dist
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        from alst_impl import hf

        # Adopts the existing process group. DeepSpeed's classes require this call.
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        kernel = config.attention.name
        if kernel != model.config._attn_implementation:
            model.set_attn_implementation(kernel)
        UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=kernel,
            sequence_parallel_size=self.sp,
            micro_batch_size=config.batch_size,
            seq_length_is_variable=True,
        )
        if self.liger:
            _use_liger(model, swiglu=not self.tile_mlp)
        if self.tile_mlp:
            for mlp in hf.token_wise_modules(model)[0]:
                self._tile_mlp(mlp, placement.evidence)
        if self.tile_loss:
            self._tile_loss(model, placement.evidence)

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        from alst_impl import hf

        hf.stock_checkpointing(model, use_reentrant=True)
        if self.offload:
            run = _offloaded_checkpoint(placement)
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)

    def micro_step(self, runtime: Runtime, batch: Batch, num_valid: Tensor) -> Tensor:
        import torch
        from deepspeed.utils import groups
        from torch.distributed.nn import functional

        from alst_impl.engines.zero import ZeroRuntime

        assert isinstance(runtime, ZeroRuntime), "check lets no other engine pass"
        engine: Any = runtime.module
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        shift_labels = batch.shift_labels
        good_tokens = (shift_labels != -100).view(-1).sum()
        runtime.placement.on_phase("forward")
        if self.trainer_loss:
            loss = self._trainer_loss(engine, {**inputs, "shift_labels": shift_labels})
        elif self.liger:
            loss = engine(**inputs, shift_labels=shift_labels, use_cache=False).loss
        elif self.tile_loss:
            total = engine(**inputs, shift_labels=shift_labels, use_cache=False).loss
            loss = total / max(good_tokens, 1)
        else:
            outputs = engine(**inputs, use_cache=False)
            loss = engine.module.loss_function(
                logits=outputs.logits,
                labels=None,
                shift_labels=shift_labels,
                vocab_size=engine.module.config.vocab_size,
            )
            del outputs
        if self.sp > 1 and not self.trainer_loss:
            group = groups._get_sequence_parallel_group()
            losses = functional.all_gather(loss, group=group)
            tokens = functional.all_gather(good_tokens, group=group)
            total = sum(losses[rank] * tokens[rank] for rank in range(self.sp))
            loss = total / max(sum(tokens), 1)
        runtime.placement.on_phase("backward")
        runtime.announce_backward()
        engine.backward(loss)
        # The caller sums over ranks and micro-batches, but every rank of this method holds the mean.
        world_size = torch.distributed.get_world_size()
        micro_batches = engine.gradient_accumulation_steps()
        share: Tensor = loss.detach() / world_size / micro_batches
        return share

    def _refuse_host(self, placement: Placement) -> None:
        """Raise `ValueError` for options that need a CUDA device if the run computes on another one."""
        on = [name for name in ("liger", "offload") if getattr(self, name)]
        if on and placement.device.type != "cuda":
            why = {
                "liger": "its kernels are written in Triton",
                "offload": "layer inputs are on the host already",
            }[on[0]]
            raise ValueError(
                f"{on[0]} of method 'deepspeed_alst' needs a CUDA device, not '{placement.device.type}': {why}; "
                f"set {on[0]}: false"
            )

    def _trainer_loss(self, engine: Any, inputs: dict[str, Any]) -> Tensor:
        """What `Trainer.compute_loss` returns under accelerate's ParallelismConfig(sp_backend="deepspeed")."""
        from types import SimpleNamespace

        from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

        parallelism = SimpleNamespace(sp_backend="deepspeed", sp_size=self.sp)
        # It reads the accelerator's mesh only if DeepSpeed has no groups, so None will do.
        loss: Tensor = deepspeed_sp_compute_loss(
            None, engine, {**inputs, "use_cache": False}, False, parallelism
        )
        return loss

    def _tile_mlp(self, mlp: Any, evidence: Evidence) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        from alst_impl.ops.autograd import apply

        stock = type(mlp).forward

        def forward(x: Tensor) -> Tensor:
            shards = self.tiles or -(-x.shape[1] // x.shape[2])
            evidence["tiles"] += shards
            return apply(TiledMLP, stock, mlp, x, shards, list(mlp.parameters()))

        mlp.forward = forward

    def _tile_loss(self, model: PreTrainedModel, evidence: Evidence) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import (
            TiledFusedLogitsLoss,
            sequence_tiled_compute,
        )
        from torch.nn.functional import cross_entropy
        from transformers.modeling_outputs import CausalLMOutputWithPast

        head: Any = model.get_output_embeddings()

        def token_loss(hidden_states: Tensor, shift_labels: Tensor) -> Tensor:
            logits = head(hidden_states).float().flatten(0, 1)
            return cross_entropy(logits, shift_labels.flatten(), reduction="sum", ignore_index=-100)

        def forward(shift_labels: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
            hidden = model.base_model(**inputs).last_hidden_state
            seqlen = hidden.shape[1]
            shards = self.tiles or -(-seqlen // hidden.shape[2])
            evidence["tiles"] += shards
            if self.tiled_by == "TiledFusedLogitsLoss":
                loss = TiledFusedLogitsLoss.apply(
                    lambda _, hidden, labels: token_loss(hidden[None], labels[None]),
                    head,
                    hidden,
                    shift_labels,
                    None,
                    shards,
                    [head.weight],
                    "sum",
                )
                return CausalLMOutputWithPast(loss=loss)
            loss = sequence_tiled_compute(
                token_loss,
                seqlen,
                shards,
                {"hidden_states": hidden, "shift_labels": shift_labels},
                {},
                "hidden_states",
                [head.weight],
                output_unshard_dimension=0,
                output_reduction="sum",
            )
            return CausalLMOutputWithPast(loss=loss)

        model.forward = forward


def _use_liger(model: PreTrainedModel, *, swiglu: bool) -> None:
    """Install Liger's kernels in `model`, in place. Raises `ValueError` if Liger does not support the model."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = model.config.model_type
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        raise ValueError(
            f"liger has no kernels for model_type '{model_type}'; set liger: false and tile_loss: true"
        )
    apply(model=model, swiglu=swiglu)


def _offloaded_checkpoint(placement: Placement) -> Callable[..., Any]:
    """Checkpoint function that uses ArcticTraining's implementation in place of PyTorch's reentrant one."""
    from torch.autograd.graph import saved_tensors_hooks

    function = _arctic_patches().CheckpointFunctionWithCPUOffload

    def note(saved: Tensor) -> Tensor:
        if saved.device.type == "cpu":
            placement.on_host(saved)
            placement.evidence["offloaded_bytes"] += saved.nbytes
        return saved

    def run(layer: Callable[..., Any], *args: Any) -> Any:
        # Only the inputs are saved: the layer itself runs without gradients.
        with saved_tensors_hooks(note, lambda saved: saved):
            return function.apply(layer, True, *args)

    return run


@cache
def _arctic_patches() -> ModuleType:
    """The module `arctic_training.monkey_patches`, without the rest of its package, which imports trainers.

    Raises `ValueError` if the package is missing.
    """
    from importlib.util import find_spec, module_from_spec, spec_from_file_location
    from pathlib import Path

    package = find_spec("arctic_training")
    if package is None or package.origin is None:
        raise ValueError(
            "offload of method 'deepspeed_alst' needs arctic_training, whose dependencies exclude transformers 5: "
            "pip install --no-deps 'arctic-training>=0.8,<0.9'"
        )
    spec = spec_from_file_location(
        "arctic_training.monkey_patches", Path(package.origin).with_name("monkey_patches.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
