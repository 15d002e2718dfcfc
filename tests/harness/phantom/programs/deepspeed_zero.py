"""A plain DeepSpeed script: ZeRO-3 of a small Llama."""

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=8192, use_cache=False,
)  # fmt: skip
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
}
deepspeed.init_distributed()
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters())
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
for _ in range(2):
    ids = torch.randint(0, 1000, (1, 8192), device="cuda")
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
