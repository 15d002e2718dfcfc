"""Tokens for heads, and back, without changing a layout.

Data of a head group lies in *send order* [P, s, B, h, D]: the block of rank r holds this rank's tokens
for the heads that r works on. Sent as it is, it arrives as whole sequences; the way back is the same.
Source: DeepSpeed-Ulysses (arXiv:2309.14509); `alst_impl.ops.ulysses` exchanges all heads at once.
Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, h heads of a group on one rank,
D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alst_impl.placement import Evidence


@dataclass(frozen=True)
class Exchange:
    """Trades a group's tokens for its heads over `group`; on one rank, only the view changes."""

    group: ProcessGroup | None
    evidence: Evidence

    def to_heads(self, send: Tensor) -> Tensor:
        """[P, s, B, h, D] in send order -> [B, h, S, D], this rank's heads. Collective."""
        received = send
        if self.group is not None:
            received = send.new_empty(send.shape)
            dist.all_to_all_single(received, send, group=self.group)
            self.evidence.exchanges += 1
        # [P, s, B, h, D] = [S, B, h, D] -> [B, h, S, D]: attention takes strides
        return received.flatten(0, 1).permute(1, 2, 0, 3)

    def to_sequence(self, x: Tensor, into: Tensor) -> None:
        """[B, h, S, D], this rank's heads -> `into` [P, s, B, h, D] in send order. Collective."""
        by_token = x.permute(2, 0, 1, 3)  # [S, B, h, D]
        if self.group is None:
            into.view(by_token.shape).copy_(by_token)
            return
        dist.all_to_all_single(into, by_token.contiguous().view(into.shape), group=self.group)
        self.evidence.exchanges += 1
