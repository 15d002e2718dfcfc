"""One step of the released ALST stack, as rank 0 of eight. Prints what ran as JSON."""

import json
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from phantom_agent import runtime
from torch import nn
from torch.distributed import init_device_mesh
from transformers import PreTrainedModel

from alst_impl.config import TrainConfig
from alst_impl.data import Batch
from alst_impl.layout import Layout
from alst_impl.models.weights import Initializer
from alst_impl.placement import Placement
from alst_impl.step import accumulate_gradients, check, start


class Undrawn(Initializer):
    """Weights without values."""

    def values(
        self, model: PreTrainedModel, path: str, module: nn.Module
    ) -> dict[str, torch.Tensor]:
        held = {**module._parameters, **module._buffers}
        return {k: torch.empty_like(v, device="cuda") for k, v in held.items() if v is not None}


world_size = int(os.environ["WORLD_SIZE"])
config = TrainConfig(
    model="qwen3-32b",
    overrides={"num_hidden_layers": 2},
    method={
        "name": "deepspeed_alst", "sp": world_size, "liger": True, "tile_loss": False, "offload": True
    },
    engine={"name": "zero", "offload_optimizer": True, "offload_param": True,
            "seq_parallel_communication_data_type": "bf16"},
    seqlen=65_536,
    world_size=world_size,
    dtype="bfloat16",
)  # fmt: skip
check(config)
torch.cuda.init()
dist.init_process_group("nccl")
mesh = init_device_mesh("cuda", (1, world_size), mesh_dim_names=("dp", "sp"))
on_host: list[int] = []
placement = Placement(
    torch.device("cuda", 0),
    on_host=lambda tensor: on_host.append(tensor.untyped_storage().nbytes()),
)
method, running = start(config, mesh, placement, Undrawn(0))
tokens = torch.zeros(1, config.seqlen, dtype=torch.long)
whole = Batch(tokens, tokens, torch.arange(config.seqlen)[None], Layout(config.seqlen))
batch = method.shard(whole, replace(method.layout(config.seqlen), mesh=mesh))
running.start_step(1)
accumulate_gradients(method, running, [batch.to(placement.device)])
running.update()
print(
    json.dumps(
        {
            "local": placement.evidence["local_seqlen"],
            "tiles": placement.evidence["tiles"],
            "offloaded": [placement.evidence["offloaded_bytes"], *on_host],
            "kernels": sorted(runtime.kernels()),
        }
    )
)
