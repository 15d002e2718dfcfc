"""Two steps of transformers' Trainer with DeepSpeed's sequence parallelism. Arguments: tokens, layers."""

import sys
import tempfile

import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

SEQLEN, LAYERS, DEGREE = int(sys.argv[1]), int(sys.argv[2]), 4


class Tokens(Dataset):
    """Samples of one document."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(SEQLEN) % 1000 + index
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(SEQLEN)}


zero = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "seq_parallel_communication_data_type": "bf16",
}
parallelism = ParallelismConfig(
    sp_backend="deepspeed",
    sp_size=DEGREE,
    dp_shard_size=1,
    sp_handler=DeepSpeedSequenceParallelConfig(
        sp_seq_length=SEQLEN, sp_seq_length_is_variable=False, sp_attn_implementation="sdpa"
    ),
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=zero,
        bf16=True,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        parallelism_config=parallelism,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = Qwen3ForCausalLM(  # the shapes of Qwen3-4B
        Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=LAYERS,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151_936,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            max_position_embeddings=SEQLEN,
        )
    )
    Trainer(model=model, args=arguments, train_dataset=Tokens()).train()
