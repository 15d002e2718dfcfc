"""A step of an enabled model, one sequence over all ranks."""

import os

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from alst_impl import enable

dist.init_process_group("nccl")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
config = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=8192, use_cache=False,
)  # fmt: skip
model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters())
alst = enable(model, sp=dist.get_world_size())
ids = torch.randint(0, 1000, (1, 32_768))
loss = model(**alst.shard({"input_ids": ids, "labels": ids})).loss
loss.backward()
alst.reduce_gradients()
optimizer.step()
optimizer.zero_grad()
