"""Save, and go on at another sp, under fully_shard.

Run: torchrun --nproc-per-node 2 resume.py --sp 2 --steps 10
Then: torchrun --nproc-per-node 4 resume.py --sp 4 --steps 20
"""

from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from text import Text, options, start, steps
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
alst = enable(model, sp=args.sp)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
checkpoint, done = Path(args.output, "checkpoint"), 0
if checkpoint.exists():
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "done": done}
    dcp.load(state, checkpoint_id=checkpoint)  # in any number of ranks
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    done = state["done"]
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in islice(steps(loader, args.steps, args.accumulate), done, None):
    count = alst.count(batches)
    for batch in batches:
        model.set_requires_gradient_sync(batch is batches[-1])
        model(**alst.shard(batch, num_items=count)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
weights, moments = get_state_dict(model, optimizer)
state = {"model": weights, "optimizer": moments, "done": args.steps}
dcp.save(state, checkpoint_id=checkpoint)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    model.save_pretrained(args.output, state_dict=whole)
dist.destroy_process_group()
