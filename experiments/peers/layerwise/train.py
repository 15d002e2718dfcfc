"""This project's `layerwise`: forward and backward layer by layer, without an autograd graph of the model."""

from collections.abc import Iterator

from case import read_case
from loop import Batch, build, shard, start, train
from torch import Tensor

from alst_impl import enable

case = read_case()
device = start(case)
model = build(case)
alst = enable(
    model, method="layerwise", sp=case.world_size, attention="sdpa" if case.gated else "sdpa_flash"
)
shard(case, model, device)


def losses(batches: list[Batch]) -> Iterator[Tensor]:
    """The loss of each micro-batch."""
    count = alst.count(batches)
    for batch in batches:
        yield model(**alst.shard(batch, num_items=count)).loss


train(case, model, device, losses, alst.reduce_loss)
