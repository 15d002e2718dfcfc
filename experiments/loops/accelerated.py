"""accelerate. Run: torchrun --nproc-per-node 2 accelerated.py."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from text import Text, options, steps
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, accelerator = options(), Accelerator(cpu=not torch.accelerator.is_available())
model = AutoModelForCausalLM.from_pretrained(args.model)
alst = enable(model, sp=args.sp)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
wrapped, optimizer = accelerator.prepare(model, optimizer)  # not the loader: ranks share samples
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        with nullcontext() if batch is batches[-1] else accelerator.no_sync(wrapped):
            accelerator.backward(wrapped(**alst.shard(batch, num_items=count)).loss)
    optimizer.step()
    optimizer.zero_grad()
if accelerator.is_main_process:
    model.save_pretrained(args.output)
accelerator.end_training()
