"""Watches one process and writes its report to the session's folder when it ends."""

from __future__ import annotations

import atexit
import json
import os
import sys
from types import TracebackType
from typing import Any

from phantom_agent import history, reads, runtime


class Watch:
    """Observations of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        with open(os.path.join(os.environ["PHANTOM_SESSION"], "sites.json")) as file:
            self.reads = reads.watch(json.load(file))
        self.oom: dict[str, Any] | None = None
        self.error: str | None = None

    def out_of_memory(self, device: int, asked: int, total: int, free: int) -> None:
        """Record an out-of-memory error. The allocator has already released its cache."""
        import torch

        where, line = history.place(
            [
                {"filename": f.f_code.co_filename, "line": f.f_lineno, "name": f.f_code.co_name}
                for f in frames()
            ]
        )
        snapshot = torch.cuda.memory._snapshot()
        self.oom = {
            "device": device,
            "asked_bytes": asked,
            "total_bytes": total,
            "free_bytes": free,
            "where": where,
            "line": line,
            "alive": history.grouped(history.alive(snapshot, device)),
        }

    def initialized(self) -> None:
        """Start to record, after CUDA is initialised in this process. Exits if another CUDA runtime
        is loaded first.
        """
        import torch

        cudart = runtime.first_cudart()
        if cudart is None or not cudart.startswith(
            os.path.realpath(os.environ["PHANTOM_LIBRARIES"])
        ):
            sys.exit(
                f"phantom: another CUDA runtime is loaded first: {cudart}; start without LD_PRELOAD of it"
            )
        history.record()
        torch._C._cuda_attach_out_of_memory_observer(self.out_of_memory)  # type: ignore[attr-defined]

    def write(self) -> None:
        """Write the report of this process if it used a device. A second call overwrites it."""
        import torch

        if os.getpid() != self.pid or not torch.cuda.is_initialized():
            return
        path = os.path.join(os.environ["PHANTOM_SESSION"], f"process-{self.pid}.json")
        with open(f"{path}.partial", "w") as file:
            json.dump(self.report(), file)
        os.replace(f"{path}.partial", path)

    def report(self) -> dict[str, Any]:
        """The report as plain data."""
        import torch

        library = runtime.library()
        launched = runtime.kernels()
        return {
            "pid": self.pid,
            "rank": int(os.environ.get("RANK", "0")),
            "stands_for": int(os.environ.get("PHANTOM_WORLD", "1")),
            "devices": [self.device(i) for i in range(torch.cuda.device_count()) if used(i)],
            "pinned_bytes": library.phantom_host_peak(),
            "pageable_bytes": library.phantom_pageable_peak(),
            "launches": library.phantom_num_launches(),
            "matmuls": library.phantom_num_matmuls(),
            "matmul_flops": library.phantom_matmul_flops(),
            "attention": attention(launched),
            "refused": runtime.refusals(),
            "reads": list(self.reads.found.values()),
            "oom": self.oom,
            "error": self.error,
        }

    def device(self, index: int) -> dict[str, Any]:
        """Peaks of one device, and the allocations alive at the peak."""
        import torch

        stats = torch.cuda.memory_stats(index)
        snapshot = torch.cuda.memory._snapshot()
        return {
            "device": index,
            "name": torch.cuda.get_device_name(index),
            "total_bytes": torch.cuda.get_device_properties(index).total_memory,
            "allocated_bytes": stats["allocated_bytes.all.peak"],
            "reserved_bytes": stats["reserved_bytes.all.peak"],
            "retries": stats["num_alloc_retries"],
            "ooms": stats["num_ooms"],
            "alive": history.grouped(history.alive_at_peak(snapshot, index)),
        }


def used(device: int) -> bool:
    """Whether this process has allocated on `device`."""
    import torch

    return torch.cuda.max_memory_reserved(device) > 0


def frames() -> list[Any]:
    """Python frames, innermost first, without those of this package."""
    frame, found = reads.innermost(), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def attention(launched: dict[str, int]) -> list[str]:
    """The families of attention kernels that ran."""
    families = {
        "flash": ("flash_fwd", "flash_bwd"),
        "efficient": ("fmha_cutlass", "AttentionKernel"),
        "flex": ("flex_attention",),
    }
    return [
        f for f, marks in families.items() if any(m in name for name in launched for m in marks)
    ]


def begin() -> None:
    """Start to watch this process. Called when torch has been imported."""
    import torch

    watch = Watch()
    torch.cuda._lazy_call(watch.initialized)
    atexit.register(watch.write)
    hook, leave = sys.excepthook, os._exit

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        watch.error = f"{kind.__name__}: {error}"
        hook(kind, error, trace)

    def leaving(status: int) -> None:
        watch.write()
        leave(status)

    sys.excepthook = excepthook
    os._exit = leaving  # type: ignore[assignment]
