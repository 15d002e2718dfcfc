"""transformers' Trainer. Run: torchrun --nproc-per-node 2 trainer.py."""

import torch
from text import Text, options
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

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
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
model = AutoModelForCausalLM.from_pretrained(args.model)
enable(model, sp=args.sp)
data = Text(args)
trainer = LongTrainer(
    model, arguments, data_collator=data.collate, train_dataset=data, eval_dataset=data
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
