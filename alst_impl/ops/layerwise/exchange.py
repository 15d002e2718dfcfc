"""All-to-alls that exchange tokens for heads, and back, without a change of layout.

Data of a head group is in *send order* [P, s, B, h, D]: the block of rank r holds this rank's tokens for the
heads that r works on. Sent without a copy, it arrives as whole sequences. The way back is the same.
Source: DeepSpeed-Ulysses (arXiv:2309.14509); `alst_impl.ops.attention.ulysses` exchanges all heads at once.
Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, h heads of a group on one rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from alst_impl.placement import Evidence


class Arriving:
    """Whole sequences of a rank's heads, possibly from an exchange that is still running."""

    def __init__(
        self, received: Tensor, sent: Tensor | None = None, work: Work | None = None
    ) -> None:
        self._received, self._sent, self._work = received, sent, work

    def arrive(self) -> Tensor:
        """This rank's heads, [B, h, S, D]. Later computation waits for the exchange."""
        if self._work is not None:
            self._work.wait()
            self._sent = self._work = None
        # [P, s, B, h, D] = [S, B, h, D] -> [B, h, S, D]: attention takes strides
        return self._received.flatten(0, 1).permute(1, 2, 0, 3)


@dataclass(frozen=True)
class Exchange:
    """Exchanges the tokens of a head group for its heads over `group`; on one rank, only the view changes."""

    group: ProcessGroup | None
    evidence: Evidence
    overlap: bool = False
    """Let started exchanges overlap with other work."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return 0 if self.group is None else self.group.rank()

    def start(self, send: Tensor, into: Tensor | None = None) -> Arriving:
        """Start the exchange: [P, s, B, h, D] in send order -> [B, h, S, D], this rank's heads. Collective.

        `into` is free memory of the shape of `send` for the result; with `overlap` it is not used.
        """
        if self.group is None:
            return Arriving(send)
        received = send.new_empty(send.shape) if into is None or self.overlap else into
        work = dist.all_to_all_single(received, send, group=self.group, async_op=self.overlap)
        self.evidence["exchanges"] += 1
        return Arriving(received, send, work) if self.overlap else Arriving(received)

    def to_sequence(self, x: Tensor, into: Tensor) -> None:
        """[B, h, S, D], this rank's heads -> `into` [P, s, B, h, D] in send order. Collective."""
        by_token = x.permute(2, 0, 1, 3)  # [S, B, h, D]
        if self.group is None:
            into.view(by_token.shape).copy_(by_token)
            return
        dist.all_to_all_single(into, by_token.contiguous().view(into.shape), group=self.group)
        self.evidence["exchanges"] += 1
