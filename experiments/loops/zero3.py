"""DeepSpeed's ZeRO-3. Run: torchrun --nproc-per-node 2 zero3.py."""

import deepspeed
import torch
import torch.distributed as dist
from text import Text, options, start, steps
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from alst_impl import enable

args, device = options(), start()
model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
alst = enable(model, sp=args.sp)
settings = {
    "train_micro_batch_size_per_gpu": args.batch,
    "gradient_accumulation_steps": args.accumulate,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": model.dtype == torch.bfloat16},
}
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
data = Text(args)
loader = DataLoader(data, args.batch, sampler=alst.sampler(data), collate_fn=data.collate)
for batches in steps(loader, args.steps, args.accumulate):
    count = alst.count(batches)
    for batch in batches:
        loss = engine(**alst.shard(batch, num_items=count)).loss
        engine.backward(loss, scale_wrt_gas=False)  # `count` is of the whole step already
        engine.step()
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    if dist.get_rank() == 0:
        model.save_pretrained(args.output)
dist.destroy_process_group()
