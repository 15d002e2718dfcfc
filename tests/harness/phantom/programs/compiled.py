"""Forward and backward of a compiled decoder layer. TorchInductor makes the kernels, and the device launches them."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=16)
config._attn_implementation = "sdpa"
with torch.device("cuda"):
    layer = torch.compile(LlamaDecoderLayer(config, 0).bfloat16())
    x = torch.zeros(1, 4096, 1024, dtype=torch.bfloat16, requires_grad=True)
    cos = sin = torch.ones(1, 4096, 64, dtype=torch.bfloat16)
layer(x, position_embeddings=(cos, sin)).sum().backward()
