"""Without an engine. Run: torchrun --nproc-per-node 2 bare.py."""

import torch
import torch.distributed as dist
from text import Text, options, start, steps
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
alst = enable(model, sp=args.sp)  # then DDP, fully_shard or DeepSpeed, if any
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count, total = alst.count(batches), torch.zeros((), device=device)
    for batch in batches:
        loss = model(**alst.shard(batch, num_items=count)).loss
        loss.backward()
        total += loss.detach()
    alst.reduce_gradients()  # engines do it themselves
    optimizer.step()
    optimizer.zero_grad()
    print(alst.reduce_loss(total))
if dist.get_rank() == 0:
    model.save_pretrained(args.output)  # a stock model
dist.destroy_process_group()
