"""ALST as released, as DeepSpeed's tutorial puts it into a loop: Ulysses, TiledMLP, Liger's loss, layer inputs on the host."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import torch
from case import LEARNING_RATE, read_case
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    TiledMLP,
    UlyssesSPAttentionHF,
    UlyssesSPDataLoaderAdapter,
)
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

case = read_case()
zero: dict[str, Any] = {"stage": 3}
if case.states == "host":
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not case.gated}
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": case.accumulation,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": not case.gated},
    "zero_optimization": zero,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "sequence_parallel_size": case.world_size,
}


def arctic_patches() -> ModuleType:
    """ArcticTraining's patches. The rest of its package wants an older transformers."""
    package = find_spec("arctic_training")
    path = Path(package.origin).with_name("monkey_patches.py")
    spec = spec_from_file_location("monkey_patches", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiled(mlp: torch.nn.Module, stock: Any) -> Any:
    """Forward of an MLP in tiles of as many tokens as the model is wide."""

    def forward(x: Tensor) -> Tensor:
        shards = -(-x.shape[1] // x.shape[2])
        return TiledMLP.apply(stock, mlp, x, shards, list(mlp.parameters()))

    return forward


__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes
deepspeed.init_distributed("gloo" if case.gated else "nccl")
mpu = UlyssesSPAttentionHF.register_with_transformers(
    model_name_or_path=case.model,
    core_attn_implementation="sdpa",
    sequence_parallel_size=case.world_size,
    micro_batch_size=1,
    seq_length_is_variable=True,
)
_of_this_scope = HfDeepSpeedConfig(config)  # makes from_pretrained shard weights as it reads them
model = AutoModelForCausalLM.from_pretrained(
    case.model, dtype=case.dtype, attn_implementation="sdpa"
)
if not case.gated:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, swiglu=False)
    arctic_patches().monkey_patch_checkpoint_function_with_cpu_offload()
for layer in model.model.layers:
    layer.mlp.forward = tiled(layer.mlp, type(layer.mlp).forward)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
group = mpu.get_sequence_parallel_group() if mpu else None
count = case.steps * case.accumulation
samples = case.rows(count)
# Ranks of a group take turns to give a sample, which all of them then share.
mine = [samples[i % count] for i in range(case.rank, count + case.rank, case.world_size)]
rows = [{name: row[None] for name, row in each.items()} for each in mine]
loader = rows
if mpu:
    loader = UlyssesSPDataLoaderAdapter(rows, case.rank, group, case.world_size, engine.device)
total = 0.0
for given in islice(loader, count):
    batch = {name: tokens.to(engine.device) for name, tokens in given.items()}
    if not mpu:  # the adapter shifts labels
        batch["shift_labels"] = pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    shift_labels = batch.pop("shift_labels")
    if case.gated:
        logits = engine(**batch, use_cache=False).logits
        loss = engine.module.loss_function(
            logits=logits, labels=None, shift_labels=shift_labels, vocab_size=logits.shape[-1]
        )
    else:
        loss = engine(**batch, shift_labels=shift_labels, use_cache=False).loss
    if mpu:
        tokens = (shift_labels != -100).view(-1).sum()
        losses, counts = all_gather(loss, group=group), all_gather(tokens, group=group)
        loss = sum(losses[i] * counts[i] for i in range(case.world_size)) / max(sum(counts), 1)
    engine.backward(loss)
    total += float(loss.detach()) if case.gated else 0.0
    if case.gradients is not None and engine.is_gradient_accumulation_boundary():
        gradients = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
        case.save(total / case.accumulation, gradients)
    engine.step()
torch.distributed.destroy_process_group()
