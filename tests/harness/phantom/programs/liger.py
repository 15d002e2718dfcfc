"""A Liger kernel: the loss from hidden states without full logits."""

import torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

with torch.device("cuda"):
    weight = torch.zeros(128_256, 4096, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.zeros(65_536, 4096, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(65_536, dtype=torch.int64)
LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels).backward()
