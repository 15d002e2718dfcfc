"""TRL's guide "Training Beyond 1M Tokens": SFTTrainer with context parallelism over FSDP2, and layer inputs on the host."""

import os
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from case import LEARNING_RATE, read_case
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

END = "<end>"
case = read_case()


class Gradients(TrainerCallback):
    """Saves the whole gradients of the first step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        """Called after backward."""
        found = {
            name.removeprefix("_fsdp_wrapped_module."): getattr(
                p.grad, "full_tensor", lambda p=p: p.grad
            )()
            for name, p in model.named_parameters()
        }
        case.save(trainer.loss, found)


class Trainer(SFTTrainer):
    """Keeps the loss of a step, which the trainer logs only after the update."""

    loss = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own step."""
        loss = super().training_step(*args, **kwargs)
        self.loss += float(loss) if case.gated else 0.0
        return loss


os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false" if case.gated else "true"
arguments = SFTConfig(
    output_dir="trained",
    use_cpu=case.gated,
    max_length=case.seqlen,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=case.accumulation,
    max_steps=case.steps,
    learning_rate=LEARNING_RATE,
    max_grad_norm=0.0 if case.gated else 1.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    pad_to_multiple_of=2 * case.world_size,
    gradient_checkpointing_kwargs={"offload": not case.gated},
    bf16=not case.gated,
    dataset_kwargs={"skip_prepare_dataset": True},
    model_init_kwargs={"dtype": case.dtype},
    fsdp="full_shard auto_wrap" if case.world_size > 1 else "",
    fsdp_config={
        "version": 2,
        "cpu_offload": case.states == "host",
        "cpu_ram_efficient_loading": not case.gated,
    },
    parallelism_config=ParallelismConfig(cp_size=case.world_size) if case.world_size > 1 else None,
)
rows = [
    {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
    for row in case.rows(case.steps * case.accumulation)
]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({END: 0}, END)), eos_token=END, pad_token=END
)
trainer = Trainer(
    case.model,
    arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Gradients()] if case.gated else [],
)
trainer.train()
