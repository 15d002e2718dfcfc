"""Random numbers of a model that several ranks run: the masks of dropout.

Dropout makes a step one draw of a distribution, so a step over shards or tiles is not the stock step of the same
seed. It is the *same training* in this sense: a mask has the stock one's distribution; the masks of any two tokens,
modules, samples and passes are independent; and recomputation repeats the masks of forward. Loss and gradients then
have the distribution of the stock model's, and so its mean. In evaluation, and at p=0, they are the stock model's.

Each rank draws the masks of its own tokens from a stream of its own, whatever state its generators have: with equal
seeds, as transformers' `set_seed` gives all ranks, every shard would get the masks of the first. Modules that all
ranks run on the whole sequence (`alst_impl.hf.gathered`) draw the same masks on all of them.

Streams follow from `Layout.draws` alone. A run of the suite names them by its seed and samples, and `alst.shard` by
numbers from the ranks' generators, so the same seeds repeat a step. A second pass over what `alst.shard` returned
repeats its masks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from alst_impl.ops.memory.recompute import drawing

if TYPE_CHECKING:
    from alst_impl.layout import Layout


def of_rank(layout: Layout, device: torch.device) -> AbstractContextManager[None]:
    """Context of a pass over this rank's tokens, whose random numbers no other rank and no other slice draws."""
    if layout.draws is None:
        return nullcontext()
    return drawing(device, layout.draws, "rank", dist.get_rank(), layout.part)


def of_group(layout: Layout, device: torch.device, place: int) -> AbstractContextManager[None]:
    """Context whose random numbers are equal on all ranks that share a sample. `place` numbers the contexts of a pass."""
    if layout.draws is None:
        return nullcontext()
    return drawing(device, layout.draws, "group", place)
