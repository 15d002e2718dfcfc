"""Unsloth's full fine-tuning on one GPU: layer inputs on the host, tiled MLP, chunked loss, compiled layers."""

import os

# It writes modules there, and reads this as it is imported.
os.environ["UNSLOTH_COMPILE_LOCATION"] = os.environ.get("HF_HOME", "trained") + "/compiled"

from unsloth import FastLanguageModel  # changes the libraries below

# isort: split
from case import LEARNING_RATE, read_case, refuse
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

END, PAD = "<end>", "<pad>"
case = read_case()
if case.gated:
    refuse("Unsloth's kernels and its checkpointing need a GPU; on CPUs it runs other code")
if case.states == "host":
    os.environ["UNSLOTH_OFFLOAD_OPTIMIZER_STATE"] = "1"
# By default it page-locks as much as this machine has free, which is not the machine asked about.
os.environ["UNSLOTH_GC_PINNED_MAX_GB"] = "2048"
words = Tokenizer(WordLevel({END: 0, PAD: 1}, END))
folder = os.environ["UNSLOTH_COMPILE_LOCATION"] + "/tokenizer"
PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=PAD).save_pretrained(
    folder
)
model, tokenizer = FastLanguageModel.from_pretrained(
    case.model,
    tokenizer_name=folder,
    max_seq_length=case.seqlen,
    dtype=case.dtype,
    load_in_4bit=False,
    full_finetuning=True,
    use_gradient_checkpointing="unsloth",
    unsloth_tiled_mlp=True,
    offload_embedding=False,
)
arguments = SFTConfig(
    output_dir="trained",
    max_length=case.seqlen,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=case.accumulation,
    max_steps=case.steps,
    learning_rate=LEARNING_RATE,
    optim="adamw_torch_fused",
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    bf16=True,
    dataset_kwargs={"skip_prepare_dataset": True},
)
rows = [
    {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
    for row in case.rows(case.steps * case.accumulation)
]
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    args=arguments,
)
trainer.train()
