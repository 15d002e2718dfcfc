"""Train, then evaluate long samples and generate. Run: torchrun --nproc-per-node 2 evaluate.py."""

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
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for (batch,) in steps(loader, args.steps):
    model(**alst.shard(batch)).loss.backward()
    alst.reduce_gradients()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
batches = list(loader)
count, total = alst.count(batches), torch.zeros((), device=device)
with torch.no_grad():
    for batch in batches:  # samples stay shared, so they may be as long as in training
        total += model(**alst.shard(batch, num_items=count)).loss
loss = alst.reduce_loss(total)
prompt = data.tokenizer("def ", return_tensors="pt").to(device)
with alst.disabled():  # the stock model, with its key/value cache
    text = model.generate(**prompt, max_new_tokens=8, do_sample=False)
if dist.get_rank() == 0:
    print(f"loss {loss:.6f}: {data.tokenizer.decode(text[0])!r}")
    model.save_pretrained(args.output)
dist.destroy_process_group()
