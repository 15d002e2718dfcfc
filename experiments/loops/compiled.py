"""torch.compile, for what lies between the collectives. Run: torchrun --nproc-per-node 2 compiled.py."""

import torch
import torch.distributed as dist
from text import Text, options, start, steps
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
alst = enable(model, sp=args.sp)
model.compile()
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        model(**alst.shard(batch, num_items=count)).loss.backward()
    alst.reduce_gradients()
    optimizer.step()
    optimizer.zero_grad()
if dist.get_rank() == 0:
    model.save_pretrained(args.output)
dist.destroy_process_group()
