"""A plain FSDP2 training script: two steps of a small Llama."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("cuda:nccl,cpu:gloo")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
config = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=8192, use_cache=False,
)  # fmt: skip
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
model.to_empty(device="cuda")
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    ids = torch.randint(0, 1000, (1, 8192), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
total = torch.tensor([3], device="cuda")
dist.all_reduce(total)
if "PHANTOM_WORLD" in os.environ:
    assert total.item() == 3 * dist.get_world_size()
dist.destroy_process_group()
