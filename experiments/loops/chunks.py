"""Samples in chunks, under fully_shard. Run: torchrun --nproc-per-node 2 chunks.py."""

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
alst = enable(model, method="chunked", sp=args.sp, chunk=args.seqlen // (4 * args.sp))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        for inputs in alst.chunks(model, batch, num_items=count):
            model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    model.save_pretrained(args.output, state_dict=whole)
dist.destroy_process_group()
