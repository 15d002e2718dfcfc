"""TRL's SFTTrainer with packed documents. Run: torchrun --nproc-per-node 2 sft.py."""

import torch
from datasets import Dataset
from text import documents, options
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from alst_impl import LongSequenceTrainer, enable


class LongSFTTrainer(LongSequenceTrainer, SFTTrainer):
    """SFTTrainer whose ranks share samples."""


args = options()
arguments = SFTConfig(  # starts the process group
    args.output,
    use_cpu=not torch.accelerator.is_available(),
    packing=True,  # whole documents beside each other; none sees another
    max_length=args.seqlen,
    per_device_train_batch_size=args.batch,
    gradient_accumulation_steps=args.accumulate,
    max_steps=args.steps,
    learning_rate=args.lr,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,  # does not clip
    bf16=False,  # computes in the model's dtype
    gradient_checkpointing=False,  # enable() checkpoints
    save_strategy="no",
    report_to=[],
)
model = AutoModelForCausalLM.from_pretrained(args.model)
enable(model, sp=args.sp)
data = Dataset.from_dict({"text": documents(args.data)})
tokenizer = AutoTokenizer.from_pretrained(args.model)
trainer = LongSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.save_model()
