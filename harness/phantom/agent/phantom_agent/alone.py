"""One process as rank R of N without the others: what this rank holds, the others are taken to hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any


def stand_for_all() -> None:
    """Make `init_process_group` return at once. NCCL's groups are PyTorch's own; gloo's are `Echo`."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    from torch.distributed import distributed_c10d as c10d

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = lonely_store()

    def rendezvous(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
        yield store, rank, world_size

    c10d.rendezvous = rendezvous
    c10d.ProcessGroupGloo = echo()  # type: ignore[misc,assignment]


def lonely_store() -> Any:
    """A store that nobody else writes to: what others would have written is empty."""
    from torch.distributed import Store

    class Lonely(Store):
        def __init__(self) -> None:
            super().__init__()
            self.held: dict[str, bytes] = {}

        def set(self, key: str, value: Any) -> None:
            self.held[key] = value.encode() if isinstance(value, str) else bytes(value)

        def get(self, key: str) -> bytes:
            return self.held.get(key, bytes(128))  # NCCL's unique id has 128 bytes

        def add(self, key: str, amount: int) -> int:
            total = int(self.held.get(key, b"0")) + amount
            self.held[key] = str(total).encode()
            return total

        def wait(self, *args: Any) -> None:
            pass

        def check(self, keys: list[str]) -> bool:
            return True

        def set_timeout(self, timeout: timedelta) -> None:
            pass

    return Lonely()


def echo() -> Any:
    """The class of a group on host memory in which all ranks hold what this one holds."""
    import torch
    from torch.distributed import Backend, ProcessGroup, ReduceOp
    from torch.futures import Future

    def done(result: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(result)
        return torch._C._distributed_c10d._create_work_from_future(future)

    class Echo(ProcessGroup):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any = None) -> None:
            super().__init__(rank, size)
            self.ranks = size

        def getBackendName(self) -> str:  # noqa: N802
            return "gloo"

        def _set_sequence_number_for_group(self) -> None:
            pass

        def _reduce(self, tensor: Any, op: Any) -> None:
            if op == ReduceOp.SUM:
                tensor.mul_(self.ranks)
            elif op == ReduceOp.PRODUCT:
                tensor.pow_(self.ranks)
            elif op not in (ReduceOp.MAX, ReduceOp.MIN, ReduceOp.AVG, ReduceOp.BAND, ReduceOp.BOR):
                raise NotImplementedError(f"one rank without the others cannot reduce by {op}")

        def allreduce(self, tensors: Any, opts: Any) -> Any:
            for tensor in tensors:
                self._reduce(tensor, opts.reduceOp)
            return done(tensors)

        reduce = allreduce

        def broadcast(self, tensors: Any, opts: Any) -> Any:
            return done(tensors)

        def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            for output, tensor in zip(outputs, inputs, strict=True):
                for each in output:
                    each.copy_(tensor)
            return done(outputs)

        def _allgather_base(self, output: Any, tensor: Any, opts: Any = None) -> Any:
            output.view(self.ranks, *tensor.shape).copy_(tensor.expand(self.ranks, *tensor.shape))
            return done(output)

        def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            return self.allgather(outputs, inputs) if outputs else done(inputs)

        def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any) -> Any:
            for output, pieces in zip(outputs, inputs, strict=True):
                output.copy_(pieces[self.rank()])
                self._reduce(output, opts.reduceOp)
            return done(outputs)

        def _reduce_scatter_base(self, output: Any, tensor: Any, opts: Any) -> Any:
            output.copy_(tensor.chunk(self.ranks)[self.rank()].view_as(output))
            self._reduce(output, opts.reduceOp)
            return done(output)

        def barrier(self, opts: Any = None) -> Any:
            return done(None)

    assert Backend is not None
    return Echo
