"""What a launcher starts: a rank that holds some bytes of its own device and adds up over all ranks."""

import os

import torch
import torch.distributed as dist

dist.init_process_group("nccl")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
held = torch.zeros(2**20, device="cuda")
dist.all_reduce(held)
dist.destroy_process_group()
