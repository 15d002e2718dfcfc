"""Ranks that `torchrun` started: who they are, and how they agree on one record.

Under a launcher every rank has an `alst` of its own, which forks that one rank, watches it and tells
the others how it ended: an out-of-memory on one node still becomes a record on the first.
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
"""How long after its own time limit a rank may take to tell how it ended."""


class Launch(Frozen):
    """What `torchrun` tells one rank."""

    rank: int = Field(ge=0)
    world_size: int = Field(ge=1)
    local_rank: int = Field(ge=0)
    local_world_size: int = Field(ge=1)
    address: str
    """Host of the launcher's store."""
    port: int

    @property
    def num_nodes(self) -> int:
        """Machines, each with as many ranks."""
        return self.world_size // self.local_world_size

    @property
    def meeting(self) -> str:
        """The store's `host:port`."""
        return f"{self.address}:{self.port}"

    def check(self, cell: Cell) -> None:
        """Raise `ValueError` unless these are the ranks of `cell`, on as many nodes as its hardware says."""
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
    """The launch that `environment` tells of; None where nothing but this process was started.

    Raises `ValueError` for one that is not torchrun's.
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
    """The launcher's store, under a prefix of our own."""
    from torch.distributed import PrefixStore, TCPStore

    host, _, port = meeting.rpartition(":")
    return PrefixStore(f"alst/{prefix}", TCPStore(host, int(port), is_master=False))


class Meeting:
    """The `alst` processes of one launch, at one cell."""

    def __init__(self, launch: Launch, cell: Cell, store: Store | None = None) -> None:
        self._launch, self._patience_s = launch, 2 * cell.timeout_s + SETTLE_S
        self._store = store or store_at(launch.meeting, f"records/{cell.key}")

    def say(self, what: str, value: str) -> None:
        """Tell all others `value`."""
        self._store.set(what, value)

    def hear(self, what: str) -> str:
        """What somebody says of `what`, once somebody does."""
        self._store.wait([what], dt.timedelta(seconds=self._patience_s))
        return self._store.get(what).decode()

    def hear_all(self, what: str) -> list[str]:
        """What every rank says of `what`, in order."""
        return [self.hear(f"{what} {rank}") for rank in range(self._launch.world_size)]


def combined(endings: Sequence[Ending]) -> Ending:
    """The ending of the whole run: what every rank returned, or the failure that caused the others."""
    failed = [ending for ending in endings if ending.how != "finished"]
    if not failed:
        return Ending(how="finished", results=[r for ending in endings for r in ending.results])
    # Whoever waited for a rank that failed ran out of time, or was told that it is gone.
    return min(failed, key=lambda e: (e.how in ("timeout", "lost"), innocence(e)))


PORT = 29_500
"""Where the first node's torchrun listens."""


def command(cell: Cell, python: str) -> str:
    """The shell words that stand for `alst` where `cell` runs: on one machine itself, which forks all ranks.

    On several it is torchrun on each, started by SLURM inside the job's allocation.
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
    """Machines that `cell` runs on: GPUs come in nodes of their hardware, other ranks share one."""
    if not cell.traits.gpus:
        return 1
    return -(-cell.num_processes // load_hardware(cell.hardware).devices_per_node)


def job_fields(launch: Launch | None) -> dict[str, Any]:
    """What `harness.processes.client.submit` has to know of the ranks that this process forks."""
    if launch is None:
        return {}
    return {
        "ranks": [launch.rank],
        "first_local": launch.local_rank,
        "meeting": launch.meeting,
        "environment": {"LOCAL_WORLD_SIZE": str(launch.local_world_size)},
    }
