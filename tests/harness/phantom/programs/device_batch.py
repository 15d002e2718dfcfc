"""A loop whose batch is on the device before it is sharded. No byte of it is known: it is too long."""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from alst_impl import enable

dist.init_process_group()
torch.cuda.set_device(0)
config = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=8,
)
with torch.device("cuda"):
    model = LlamaForCausalLM(config).bfloat16()
alst = enable(model, sp=8)
ids = torch.randint(1000, (1, 400_000)).cuda()
model(**alst.shard({"input_ids": ids, "labels": ids.clone()})).loss.backward()
