"""Runs one process as rank R of N without the others. All ranks are assumed to have the same data as this one."""

from __future__ import annotations

import copy
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import wraps
from typing import Any


def stand_for_all() -> None:
    """Make `init_process_group` return without waiting for other ranks.

    NCCL groups are PyTorch's own, over the stub library. Collectives on host memory have no stub
    library; this module implements some of them and refuses the others.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return
    from torch.distributed import distributed_c10d as c10d

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = lonely_store()

    def rendezvous(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
        yield store, rank, world_size

    c10d.rendezvous = rendezvous
    helper = c10d._new_process_group_helper

    @wraps(helper)
    def new_group_helper(
        size: int, own: int, ranks: Any, backend: Any, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs.pop("device_id", None)  # a group that is bound to its device is split off another
        return helper(size, own, ranks, without_gloo(backend), *args, **kwargs)

    c10d._new_process_group_helper = new_group_helper  # type: ignore[assignment]
    # PyTorch may also bind a group to its device itself. A split needs the sizes of the parts from
    # the other ranks.
    c10d._get_split_source = no_source
    from torch.distributed import device_mesh

    for module in (c10d, dist, device_mesh):
        if hasattr(module, "split_group"):
            module.split_group = made_anew  # type: ignore[attr-defined]
    for name, replacement in on_host().items():
        if hasattr(c10d, name):
            replaced = host_only(replacement, getattr(c10d, name), name)
            for module in (c10d, dist):
                setattr(module, name, replaced)
    for name, object_collective in OBJECTS.items():
        for module in (c10d, dist):
            setattr(module, name, object_collective)


def launch_one_rank() -> None:
    """Make torchrun, and launchers that call it, become one rank of those that they would start."""
    from torch.distributed.launcher import api

    surroundings: dict[str, str] = json.loads(os.environ["PHANTOM_LAUNCHED"])

    def launch_agent(
        config: Any, entrypoint: Any, args: list[Any], health_check_server: Any = None
    ) -> dict[int, Any]:
        ranks, devices = config.max_nodes * config.nproc_per_node, surroundings["WORLD_SIZE"]
        if str(ranks) != devices:
            sys.exit(
                f"alst phantom: the launcher starts {ranks} ranks; use --gpus {ranks}, not {devices}"
            )
        if not isinstance(entrypoint, str):
            sys.exit("alst phantom: the launcher calls a function in each rank; use --all-ranks")
        os.execvpe(entrypoint, [entrypoint, *map(str, args)], {**os.environ, **surroundings})

    api.launch_agent = launch_agent


def no_source(*args: Any, **kwargs: Any) -> None:
    """Replaces `_get_split_source`: no communicator is split."""


def made_anew(
    parent_pg: Any = None,
    split_ranks: Any = None,
    timeout: timedelta | None = None,
    pg_options: Any = None,
    group_desc: str | None = None,
    **kwargs: Any,
) -> Any:
    """Replaces `split_group` of the default group, whose ranks are the global ones: makes the group
    with `new_group`.
    """
    import torch.distributed as dist

    own = next((ranks for ranks in split_ranks if dist.get_rank() in ranks), None)
    if own is None:
        return None
    return dist.new_group(
        own,
        timeout=timeout,
        pg_options=pg_options,
        group_desc=group_desc,
        use_local_synchronization=True,
    )


def without_gloo(backend: Any) -> str:
    """The name of a backend with gloo replaced by PyTorch's fake backend.

    The fake one is first, because PyTorch hands NCCL's options on to whatever it makes after it.
    """
    name = str(backend).lower()
    if name in ("undefined", "none", ""):
        return "cpu:fake,cuda:nccl"
    return ",".join(
        sorted(name.replace("gloo", "fake").split(","), key=lambda part: "nccl" in part)
    )


def lonely_store() -> Any:
    """A store without other writers. A missing key reads as zeros."""
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
            return all(key in self.held for key in keys)

        def clone(self) -> Any:
            return self

        def set_timeout(self, timeout: timedelta) -> None:
            pass

    return Lonely()


class Done:
    """The work handle of a finished collective."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def host_only(replacement: Callable[..., None] | None, original: Any, name: str) -> Any:
    """A collective that calls `original` for device tensors and `replacement` for host tensors.
    Without a replacement it raises `NotImplementedError`.
    """
    import torch

    signature = inspect.signature(original)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensor = next(
            (each for each in flat([*args, *kwargs.values()]) if isinstance(each, torch.Tensor)),
            None,
        )
        if tensor is None or tensor.device.type != "cpu":
            return original(*args, **kwargs)
        if replacement is None:
            raise NotImplementedError(
                f"'{name}' of host memory needs all ranks, but one rank runs alone; run all ranks"
            )
        asked = signature.bind(*args, **kwargs).arguments
        asynchronous = asked.pop("async_op", False)
        replacement(**asked)
        return Done() if asynchronous else None

    return call


def flat(values: Any) -> Iterator[Any]:
    """The members of nested lists and tuples, in order."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        else:
            yield value


def on_host() -> dict[str, Callable[..., None] | None]:
    """Collective -> its implementation on host tensors, where all ranks have the same data; None if it is refused."""
    import torch.distributed as dist

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op == dist.ReduceOp.SUM:
            tensor.mul_(dist.get_world_size(group))
        elif op not in (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG):
            raise NotImplementedError(
                f"a rank that runs alone cannot reduce by {op}; run all ranks"
            )

    def all_gather(tensor_list: Any, tensor: Any, group: Any = None) -> None:
        for each in tensor_list:
            each.copy_(tensor)

    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, group: Any = None) -> None:
        output_tensor.view(-1, *input_tensor.shape).copy_(
            input_tensor.expand(dist.get_world_size(group), *input_tensor.shape)
        )

    def broadcast(tensor: Any, src: Any = None, group: Any = None, group_src: Any = None) -> None:
        own(src, group, group_src)

    refused = (
        "reduce",
        "gather",
        "scatter",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
    )
    return {
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "all_gather_into_tensor": all_gather_into_tensor,
        "all_gather_single": all_gather_into_tensor,
        "broadcast": broadcast,
        **dict.fromkeys(refused),
    }


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """All ranks contribute a copy of this rank's object."""
    object_list[:] = [copy.deepcopy(obj) for _ in object_list]


def gather_object(
    obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any
) -> None:
    """As `all_gather_object`, on the rank that passes a list."""
    if object_gather_list is not None:
        all_gather_object(object_gather_list, obj)


def broadcast_object_list(
    object_list: list[Any],
    src: int | None = None,
    group: Any = None,
    device: Any = None,
    group_src: int | None = None,
) -> None:
    """Leaves the list as it is. Raises `NotImplementedError` if another rank is the source."""
    own(src, group, group_src)


def own(src: int | None, group: Any, group_src: int | None) -> None:
    """Raises `NotImplementedError` if another rank is the source, because its data does not exist here."""
    import torch.distributed as dist

    sender = (
        group_src
        if group_src is not None
        else dist.get_group_rank(group or dist.distributed_c10d._get_default_group(), src or 0)
    )
    if sender != dist.get_rank(group):
        raise NotImplementedError(
            f"rank {dist.get_rank()} runs alone, but waits for an object from rank {src or 0}; run that rank, or all "
            "ranks"
        )


def barrier(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    """Returns without waiting."""
    return Done() if async_op else None


OBJECTS = {
    "all_gather_object": all_gather_object,
    "gather_object": gather_object,
    "broadcast_object_list": broadcast_object_list,
    "barrier": barrier,
    "monitored_barrier": barrier,
}
