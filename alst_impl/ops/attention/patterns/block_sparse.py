"""Blocks of tokens that see the last blocks, the first ones, and some at random (BigBird, arXiv:2007.14062)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from alst_impl.ops.attention.patterns.base import Pattern, Run, merged

if TYPE_CHECKING:
    from torch import Tensor, device

    from alst_impl.ops.attention.patterns.base import Sees


class BlockSparse(Pattern):
    """BigBird under a causal mask. Blocks count from the start of a document."""

    block: int = Field(default=64, ge=1)
    """Tokens of a block."""
    window_blocks: int = Field(default=3, ge=1)
    """Number of last blocks that a query sees, its own included."""
    global_blocks: int = Field(default=1, ge=0)
    """First blocks of a document that all later ones see."""
    random_blocks: int = Field(default=3, ge=0)
    """Number of further blocks that all queries of a block see, or all that there are, if fewer."""
    seed: int = Field(default=0, ge=0)
    """Draws them, for a block from its seed and its number alone: all heads, layers, steps and ranks draw the same."""

    def check(self, seqlen: int) -> None:
        if self.block > seqlen:
            raise ValueError(
                f"block ({self.block}) of pattern 'block_sparse' must be at most seqlen ({seqlen}), else one block is the "
                f"whole sequence; use block up to {seqlen}"
            )
        blocks = -(-seqlen // self.block)
        for name in ("window_blocks", "global_blocks", "random_blocks"):
            value = getattr(self, name)
            if value > blocks:
                raise ValueError(
                    f"{name} ({value}) of pattern 'block_sparse' is more than the {blocks} blocks of {self.block} tokens "
                    f"of a sample; use {name} up to {blocks}"
                )

    def sees(self, length: int, device: device) -> Sees:
        import torch

        blocks = -(-length // self.block)
        none = (-1,) * self.random_blocks
        rows = [(*self.drawn(block), *none)[: self.random_blocks] for block in range(blocks)]
        table = torch.tensor(rows, dtype=torch.int32, device=device)  # [blocks, random_blocks]
        size, last, first = self.block, self.window_blocks, self.global_blocks
        count = self.random_blocks

        def seen(query: Tensor, key: Tensor) -> Tensor:
            own, other = query // size, key // size
            found = (own - other < last) | (other < first)
            for index in range(count):
                found = found | (table[own, index] == other)
            return found

        return seen

    def runs(self, first: int, stop: int) -> list[Run]:
        return self._tokens(set().union(*self._seen(first, stop)), stop)

    def whole_runs(self, first: int, stop: int) -> list[Run]:
        return self._tokens(set.intersection(*self._seen(first, stop)), first + 1)

    def _seen(self, first: int, stop: int) -> list[set[int]]:
        """The blocks that each block of queries sees."""
        own = range(first // self.block, (stop - 1) // self.block + 1)
        return [set(self.blocks(block)) for block in own]

    def _tokens(self, blocks: set[int], stop: int) -> list[Run]:
        """Runs of the tokens of `blocks` before `stop`."""
        size = self.block
        return merged((block * size, min((block + 1) * size, stop)) for block in blocks)

    def pairs(self, length: int) -> int:
        total = 0
        for block in range(-(-length // self.block)):
            rows = min(self.block, length - block * self.block)
            earlier = len(self.blocks(block)) - 1
            total += rows * (rows + 1) // 2 + rows * earlier * self.block
        return total

    def blocks(self, block: int) -> list[int]:
        """Blocks of keys that queries of `block` see, itself included."""
        first = range(min(self.global_blocks, block + 1))
        last = range(max(block - self.window_blocks + 1, 0), block + 1)
        return sorted({*first, *last, *self.drawn(block)})

    def drawn(self, block: int) -> tuple[int, ...]:
        """Blocks that queries of `block` see by chance."""
        return _drawn(self.seed, block, self.global_blocks, self.window_blocks, self.random_blocks)


@lru_cache(maxsize=2**16)
def _drawn(seed: int, block: int, first: int, last: int, count: int) -> tuple[int, ...]:
    """`count` of the blocks between the `first` ones and the `last` ones before and with `block`."""
    others = range(first, block - last + 1)
    if not count or not others:
        return ()
    found = np.random.default_rng([seed, block]).choice(
        others, min(count, len(others)), replace=False
    )
    return tuple(sorted(map(int, found)))
