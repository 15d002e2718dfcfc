"""This project's `chunked`: a sample in chunks, each with a forward and backward through all layers."""

from collections.abc import Iterator

from case import read_case
from loop import Batch, build, shard, start, train
from torch import Tensor

from alst_impl import enable

case = read_case()
device = start(case)
model = build(case)
chunk = {"chunk": 12} if case.gated else {}  # otherwise samples of the gate would have one chunk
alst = enable(
    model,
    method="chunked",
    sp=case.world_size,
    attention="sdpa" if case.gated else "sdpa_flash",
    **chunk,
)
shard(case, model, device)


def losses(batches: list[Batch]) -> Iterator[Tensor]:
    """The loss of each chunk of each micro-batch, the last chunk first."""
    count = alst.count(batches)
    for batch in batches:
        for inputs in alst.chunks(model, batch, num_items=count):
            yield model(**inputs).loss


train(case, model, device, losses, alst.reduce_loss, reduce_each=True)
