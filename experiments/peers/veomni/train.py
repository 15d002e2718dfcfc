"""VeOmni's trainer: Ulysses on FSDP2, gradient checkpointing, and layer inputs on the host."""

import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from case import LEARNING_RATE, read_case
from torch import Tensor
from veomni.arguments.arguments_types import (
    AcceleratorConfig,
    CheckpointConfig,
    DataArguments,
    FSDPConfig,
    MixedPrecisionConfig,
    ModelArguments,
    OffloadConfig,
    OpsImplementationConfig,
    OptimizerConfig,
    TrainingArguments,
    VeOmniArguments,
)
from veomni.trainer.base import BaseTrainer
from veomni.trainer.callbacks import TrainerState

# Only now: transformers asks at import whether the distribution is installed.
sys.path.append(str(Path(__file__).parent / "kernels"))
case = read_case()
if case.gated:
    dist.init_process_group("gloo")


class Trainer(BaseTrainer):
    """Trains on the run's samples, and records gradients as the optimizer gets them."""

    def _build_model_assets(self) -> None:
        self.model_assets = []

    def _build_data_transform(self) -> None:
        pass

    def _build_dataset(self) -> None:
        self.args.compute_train_steps(case.steps * case.accumulation)

    def _build_dataloader(self) -> None:
        self.train_dataloader = [self._micro_batches() for _ in range(case.steps)]

    def _micro_batches(self) -> list[dict[str, Tensor]]:
        return [self.collate_fn([row]) for row in case.rows(case.accumulation)]

    def _init_callbacks(self) -> None:
        self._callbacks = []
        self.state = TrainerState()
        self.optimizer.register_step_pre_hook(lambda *_: self._record())

    def _record(self) -> None:
        if case.gradients is not None:
            named = self.model.named_parameters()
            self.gradients = {name: p.grad.full_tensor() for name, p in named}

    def on_step_end(self, loss: float, **_: object) -> None:
        """Save what was recorded."""
        if case.gradients is not None:
            case.save(loss, self.gradients)


kernels = "eager" if case.gated else "liger_kernel"
with tempfile.TemporaryDirectory() as folder:
    Trainer(
        VeOmniArguments(
            model=ModelArguments(
                config_path=case.model,
                model_path=case.model if case.gated else None,
                ops_implementation=OpsImplementationConfig(
                    attn_implementation="flash_attention_4",
                    cross_entropy_loss_implementation=kernels,
                    rms_norm_implementation=kernels,
                    swiglu_mlp_implementation=kernels,
                    rotary_pos_emb_implementation=kernels,
                    load_balancing_loss_implementation="eager",
                ),
            ),
            data=DataArguments(train_path="", max_seq_len=case.seqlen),
            train=TrainingArguments(
                dyn_bsz=False,
                micro_batch_size=1,
                global_batch_size=case.accumulation,
                init_device="meta",
                optimizer=OptimizerConfig(
                    lr=LEARNING_RATE, max_grad_norm=1e9 if case.gated else 1.0
                ),
                accelerator=AcceleratorConfig(
                    ulysses_size=case.world_size,
                    fsdp_config=FSDPConfig(
                        offload=case.states == "host",
                        mixed_precision=MixedPrecisionConfig(
                            enable=case.gated, param_dtype="float32"
                        ),
                    ),
                    offload_config=OffloadConfig(enable_async_activation=not case.gated),
                ),
                checkpoint=CheckpointConfig(output_dir=folder),
            ),
        )
    ).train()
