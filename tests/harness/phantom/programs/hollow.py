"""Large tensors on the host, far more than this machine has, beside small ones. Prints its findings as JSON."""

import json
import resource

import torch
from phantom_agent import runtime

GIB = 2**30


def resident() -> int:
    """Peak resident set size of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


imported = resident()
shard = torch.zeros(8 * GIB, dtype=torch.bfloat16)
master = shard.clone().float()  # 32 GiB in one block
gradient = torch.zeros_like(master).fill_(1.0)
gradient.mul_(torch.tensor(0.5))
pinned = shard.pin_memory()
view = master.narrow(0, 5, 1000).copy_(torch.ones(1000))
weight = torch.nn.Parameter(master)
weight.grad = gradient
small = torch.nn.Parameter(torch.ones(3))
small.grad = torch.ones(3)
optimizer = torch.optim.AdamW([weight, small], lr=0.5, weight_decay=0.0)
optimizer.step()
ids = torch.arange(4_000_000)
print(
    json.dumps(
        {
            "grown": resident() - imported,
            "bytes": [t.untyped_storage().nbytes() for t in (shard, master, pinned)],
            "pageable": runtime.library().phantom_pageable_peak(),
            "pinned": [
                pinned.is_pinned(),
                torch.cuda.host_memory_stats()["allocated_bytes.current"],
            ],
            "moments": optimizer.state[weight]["exp_avg"].shape == weight.shape,
            "view": view.tolist() == [0.0] * 1000,
            "small": [round(x, 3) for x in small.tolist()],
            "ids": bool((ids.clone() == ids).all())
            and ids.to(torch.int32).sum().item() == 7999998000000,
            "numbers": [(torch.arange(3) == 1).tolist(), torch.full((2,), 2.5).mul_(2).tolist()],
        }
    )
)
