"""transformers' Trainer with accelerate's sequence parallelism: Ulysses of DeepSpeed on ZeRO-3, as their guide sets it up."""

from typing import Any

import deepspeed
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from case import LEARNING_RATE, read_case
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

case = read_case()


class LossTrainer(Trainer):
    """Keeps the loss of a step, which the trainer logs only after the update."""

    loss = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own step."""
        loss = super().training_step(*args, **kwargs)
        self.loss += float(loss) if case.gated else 0.0
        return loss


class Gradients(TrainerCallback):
    """Saves the whole gradients of the first step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        """Called after backward."""
        case.save(trainer.loss, {n: safe_get_full_grad(p) for n, p in model.named_parameters()})


if case.gated:  # compiling its own all-reduce takes minutes, and gloo has one
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
zero: dict[str, Any] = {"stage": 3}
if case.states == "host":
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
arguments = TrainingArguments(
    "trained",
    use_cpu=case.gated,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=case.accumulation,
    max_steps=case.steps,
    learning_rate=LEARNING_RATE,
    max_grad_norm=0.0 if case.gated else 1.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    bf16=not case.gated,
    gradient_checkpointing=True,
    use_liger_kernel=not case.gated,
    deepspeed={
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    },
    parallelism_config=ParallelismConfig(
        sp_size=case.world_size,
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        ),
    )
    if case.world_size > 1
    else None,
)
model = AutoModelForCausalLM.from_pretrained(
    case.model, dtype=case.dtype, attn_implementation="sdpa"
)
trainer = LossTrainer(
    model,
    arguments,
    train_dataset=case.rows(case.steps * case.accumulation),
    callbacks=[Gradients()] if case.gated else [],
)
trainer.train()
