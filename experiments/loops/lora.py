"""Adapters of peft, under DDP. Run: torchrun --nproc-per-node 2 lora.py."""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from text import Text, options, start, steps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
torch.manual_seed(0)  # all ranks begin with the same adapters
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
alst = enable(model, sp=args.sp)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        wrapped(**alst.shard(batch, num_items=count)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if dist.get_rank() == 0:
    model.save_pretrained(args.output)  # the adapters alone
dist.destroy_process_group()
