"""PyTorch's fully_shard (FSDP2). Run: torchrun --nproc-per-node 2 fsdp2.py."""

import torch
import torch.distributed as dist
from text import Text, options, start, steps
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
alst = enable(model, sp=args.sp)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)  # over all ranks, so that gradients are averaged over all of them
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        model.set_requires_gradient_sync(batch is batches[-1])
        model(**alst.shard(batch, num_items=count)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    model.save_pretrained(args.output, state_dict=whole)
dist.destroy_process_group()
