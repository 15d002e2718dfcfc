"""Ranks that `torchrun` started, and how they agree on one record.

Under a launcher each rank is an `alst` process. It forks one rank, watches it, and tells the others how the rank
ended. So an out-of-memory on any node becomes a record on the first node.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from alst_impl.config import Frozen
from harness.cells.cell import Cell
from harness.cells.hardware import load_hardware
from harness.processes.jobs import Ending, innocence

if TYPE_CHECKING:
    from torch.distributed import Store

SETTLE_S = 60
"""Time after its own limit that a rank has to report how it ended."""


class Launch(Frozen):
    """The place of one rank in a launch, as `torchrun` gives it."""

    rank: int = Field(ge=0)
    world_size: int = Field(ge=1)
    local_rank: int = Field(ge=0)
    local_world_size: int = Field(ge=1)
    address: str
    """Host of the launcher's store; `port` is its port."""
    port: int

    @property
    def num_nodes(self) -> int:
        """Number of machines; all have the same number of ranks."""
        return self.world_size // self.local_world_size

    @property
    def meeting(self) -> str:
        """`host:port` of the store."""
        return f"{self.address}:{self.port}"

    def check(self, cell: Cell) -> None:
        """Raise `ValueError` unless `cell` has this number of ranks, and its hardware this number of nodes."""
        wanted, nodes = cell.num_processes, num_nodes(cell)
        asked = f"{self.num_nodes} nodes x {self.local_world_size} ranks = {self.world_size}"
        if self.world_size != wanted:
            raise ValueError(
                f"{cell.label} runs on {wanted} ranks, but torchrun started {asked}; "
                "set --nnodes and --nproc-per-node to that product"
            )
        if cell.traits.gpus and self.num_nodes != nodes:
            per_node = load_hardware(cell.hardware).devices_per_node
            raise ValueError(
                f"{cell.label} on hardware '{cell.hardware}' ({per_node} devices per node) runs on "
                f"{nodes} nodes, but torchrun started {asked}; use --nnodes {nodes} --nproc-per-node "
                f"{wanted // nodes}, or a hardware row of your own with another devices_per_node"
            )


def launched(environment: Mapping[str, str]) -> Launch | None:
    """The launch that `environment` describes; None if no launcher started this process.

    Raises `ValueError` for a launcher other than torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    names = {
        "rank": "RANK",
        "world_size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_world_size": "LOCAL_WORLD_SIZE",
        "address": "MASTER_ADDR",
        "port": "MASTER_PORT",
    }
    missing = [name for name in names.values() if name not in environment]
    if missing or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        lacking = f"it sets no {missing[0]}" if missing else "its agent keeps no store"
        raise ValueError(f"this launcher is not torchrun: {lacking}; use torchrun")
    return Launch.model_validate({field: environment[name] for field, name in names.items()})


def store_at(meeting: str, prefix: str) -> Store:
    """The launcher's store, with a prefix for our keys."""
    from torch.distributed import PrefixStore, TCPStore

    host, _, port = meeting.rpartition(":")
    return PrefixStore(f"alst/{prefix}", TCPStore(host, int(port), is_master=False))


class Meeting:
    """Messages between the `alst` processes of one launch about one cell."""

    def __init__(self, launch: Launch, cell: Cell, store: Store | None = None) -> None:
        self._launch, self._patience_s = launch, 2 * cell.timeout_s + SETTLE_S
        self._store = store or store_at(launch.meeting, f"records/{cell.key}")

    def say(self, what: str, value: str) -> None:
        """Publish `value` as `what`."""
        self._store.set(what, value)

    def hear(self, what: str) -> str:
        """The value of `what`; waits until a process publishes it."""
        self._store.wait([what], dt.timedelta(seconds=self._patience_s))
        return self._store.get(what).decode()

    def hear_all(self, what: str) -> list[str]:
        """The values of `what` of all ranks, in order of rank."""
        return [self.hear(f"{what} {rank}") for rank in range(self._launch.world_size)]


def combined(endings: Sequence[Ending]) -> Ending:
    """The ending of the whole run: the results of all ranks, or the failure that caused the others."""
    failed = [ending for ending in endings if ending.how != "finished"]
    if not failed:
        return Ending(how="finished", results=[r for ending in endings for r in ending.results])
    # A rank that waited for a failed one ended with `timeout` or `lost`: it is not the cause.
    return min(failed, key=lambda e: (e.how in ("timeout", "lost"), innocence(e)))


PORT = 29_500
"""Port of torchrun on the first node."""


def command(cell: Cell, python: str) -> str:
    """The shell command that runs `alst` for `cell`.

    On one machine it is `alst`, which forks all ranks. On several machines SLURM starts torchrun on each, inside
    the job's allocation.
    """
    nodes = num_nodes(cell)
    if nodes == 1:
        return f"'{python}' -m harness"
    head = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    return (
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 '{python}' -m torch.distributed.run "
        f"--nnodes={nodes} --nproc-per-node={cell.num_processes // nodes} --rdzv-backend=c10d "
        f'--rdzv-endpoint="{head}:{PORT}" --rdzv-id="$SLURM_JOB_ID" -m harness'
    )


def num_nodes(cell: Cell) -> int:
    """Number of machines for `cell`: GPUs come in nodes of their hardware; all other ranks share one machine."""
    if not cell.traits.gpus:
        return 1
    return -(-cell.num_processes // load_hardware(cell.hardware).devices_per_node)


def job_fields(launch: Launch | None) -> dict[str, Any]:
    """Fields of `Job` for the ranks that this process forks."""
    if launch is None:
        return {}
    return {
        "ranks": [launch.rank],
        "first_local": launch.local_rank,
        "meeting": launch.meeting,
        "environment": {"LOCAL_WORLD_SIZE": str(launch.local_world_size)},
    }
