"""PyTorch's DistributedDataParallel. Run: torchrun --nproc-per-node 2 ddp.py."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from text import Text, options, start, steps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
alst = enable(model, sp=args.sp)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        with nullcontext() if batch is batches[-1] else wrapped.no_sync():
            wrapped(**alst.shard(batch, num_items=count)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if dist.get_rank() == 0:
    model.save_pretrained(args.output)
dist.destroy_process_group()
