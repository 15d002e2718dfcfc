"""Trainer with packed documents, without padding. Run: torchrun --nproc-per-node 2 packed.py."""

import torch
from text import Text, options
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from alst_impl import LongSequenceTrainer, enable


class LongTrainer(LongSequenceTrainer, Trainer):
    """Trainer whose ranks share samples."""


args = options()
arguments = TrainingArguments(  # starts the process group
    args.output,
    use_cpu=not torch.accelerator.is_available(),
    per_device_train_batch_size=args.batch,
    gradient_accumulation_steps=args.accumulate,
    max_steps=args.steps,
    learning_rate=args.lr,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,  # does not clip
    save_strategy="no",
    report_to=[],
)
model = AutoModelForCausalLM.from_pretrained(args.model)
enable(model, sp=args.sp)
# One row of documents, with positions that restart and offsets: none sees another.
collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
trainer = LongTrainer(model, arguments, data_collator=collate, train_dataset=Text(args))
trainer.train()
trainer.save_model()
