"""StreamBP's StreamModel on one GPU: backward passes of layers, head and loss in chunks of the sequence."""

import torch
from case import LEARNING_RATE, Case, read_case, refuse
from streambp import StreamModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def build(case: Case) -> PreTrainedModel:
    """The model: on the CPU with its weights under the gate, otherwise on the device with weights of any value."""
    config = AutoConfig.from_pretrained(case.model)
    # Rotary positions as transformers 4 writes them.
    rotary = config.rope_parameters
    config.rope_theta = rotary.pop("rope_theta")
    config.rope_scaling = None if rotary["rope_type"] == "default" else rotary
    if case.gated:
        return AutoModelForCausalLM.from_pretrained(
            case.model, config=config, torch_dtype=case.dtype
        )
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(config, torch_dtype=case.dtype)


def on_host(weights: list[Tensor]) -> list[Tensor]:
    """Page-locked copies of `weights`, which the optimizer updates."""
    return [torch.empty_like(each, device="cpu", pin_memory=True) for each in weights]


case = read_case()
if case.packed:
    refuse("StreamBP makes its own causal mask, which has no bounds of documents")
model = build(case)
model.train()
chunk = min(500, case.seqlen // 4)  # 500 is its default; short samples have four, too
stream = StreamModel(
    model,
    gradient_accumulation_steps=case.accumulation,
    logits_chunk_size=chunk,
    checkpoint_chunk_size=chunk,
)
stream.gradient_checkpointing_enable()
weights = list(stream.parameters())
updated = weights
if case.states == "host":
    updated = on_host(weights)
    gradients = on_host(weights)
    for held, gradient in zip(updated, gradients, strict=True):
        held.grad = gradient
optimizer = torch.optim.AdamW(updated, lr=LEARNING_RATE)
for _ in range(case.steps):
    total = torch.zeros((), device=case.device)
    for row in case.rows(case.accumulation):
        ids, labels = (row[name][None].to(case.device) for name in ("input_ids", "labels"))
        # Its forward pass is followed by the backward pass at once.
        loss = stream(ids, torch.ones_like(ids), labels=labels, use_cache=False).loss
        total += loss / case.accumulation
    if case.gated:
        case.save(
            float(total),
            {
                name.replace("base_layer.", "").replace("self_attn.self_attn", "self_attn"): p.grad
                for name, p in model.named_parameters()
            },
        )
    if case.states == "host":
        for weight, held in zip(weights, updated, strict=True):
            held.grad.copy_(weight.grad)
            weight.grad = None
    optimizer.step()
    if case.states == "host":
        for weight, held in zip(weights, updated, strict=True):
            weight.data.copy_(held)
    else:
        optimizer.zero_grad()
