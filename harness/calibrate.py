"""Measures what a device holds beyond live tensors, one operator at a time. Runs on one forked rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alst_impl.config import Attention, Frozen
from alst_impl.ops.attention import attend
from alst_impl.ops.offload import HostOffload, checkpoint
from alst_impl.placement import Placement
from harness.calibration import Scratch, Stage, Timing
from harness.processes import Rank
from harness.worlds.cuda import Meter, ScratchProbe, alone

RUNS = 3
"""Of each timing, after one that warms up."""
K = 1024


class Shapes(Frozen):
    """What is measured; small ones test the code, not a device."""

    tokens: list[int] = [16 * K, 32 * K, 64 * K, 128 * K]
    """Of attention."""
    heads: list[tuple[int, int]] = [(32, 8), (32, 32), (4, 1)]
    """Query and kv heads: Llama-3.1-8B's, kv heads repeated, and one of eight ranks."""
    head_dim: int = 128
    rows: int = 4 * K
    """Tokens of a tile of MLP, norm or loss."""
    hidden: int = 4 * K
    intermediate: int = 14_336
    vocab: int = 128_256
    layer_tokens: list[int] = [4 * K, 32 * K, 128 * K]
    """Of the layer inputs whose offload is timed."""
    dtype: str = "bfloat16"


class Bench:
    """Runs things alone on a device, and notes what they hold and take."""

    def __init__(self, meter: Meter, shapes: Shapes) -> None:
        self.meter, self.shapes = meter, shapes
        self.device = meter.device
        self.scratch: list[Scratch] = []
        self.timings: list[Timing] = []
        self.refused: dict[str, str] = {}

    def random(self, *sizes: int) -> Tensor:
        """A leaf on the device, in the dtype of the shapes."""
        dtype = getattr(torch, self.shapes.dtype)
        return torch.randn(*sizes, dtype=dtype, device=self.device, requires_grad=True)

    def try_out(self, name: str, sizes: dict[str, int], run: Callable[[], Tensor]) -> None:
        """Forward and backward of `run` under the probe, then timed; a refusal is a finding."""
        try:
            self._note(name, sizes, run)
            self._time(name, sizes, run)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # the device is lost to this process
            self.refused[f"{name} {sizes}"] = " ".join(str(error).split())[:200]
        self.meter.empty_cache()

    def _note(self, name: str, sizes: dict[str, int], run: Callable[[], Tensor]) -> None:
        probe = ScratchProbe(self.meter)
        with probe:
            out = run()
            probe.backward = True
            torch.autograd.backward(out, torch.ones_like(out))
        for (operator, backward), nbytes in probe.largest.items():
            if nbytes:
                self.scratch.append(
                    Scratch(
                        operator=operator,
                        part_of=name,
                        backward=backward,
                        sizes=sizes,
                        nbytes=nbytes,
                    )
                )

    def _time(self, name: str, sizes: dict[str, int], run: Callable[[], Tensor]) -> None:
        forward, whole = [], []
        for _ in range(RUNS + 1):
            begin = self._now()
            out = run()
            middle = self._now()
            torch.autograd.backward(out, torch.ones_like(out))
            forward.append(middle - begin)
            whole.append(self._now() - middle)
            del out
        for part, seconds in (("forward", forward), ("backward", whole)):
            median = statistics.median(seconds[1:])
            self.timings.append(Timing(name=f"{name}, {part}", sizes=sizes, seconds=median))

    def _now(self) -> float:
        self.meter.synchronize()
        return time.perf_counter()


def attentions(bench: Bench) -> None:
    """Every attention at every length and number of heads."""
    s = bench.shapes
    for heads, kv_heads in s.heads:
        for tokens in s.tokens:
            sizes = {
                "tokens": tokens,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": s.head_dim,
            }
            query, key, value = (
                bench.random(1, n, tokens, s.head_dim) for n in (heads, kv_heads, kv_heads)
            )
            for name in get_args(Attention):

                def run(
                    name: str = name, q: Tensor = query, k: Tensor = key, v: Tensor = value
                ) -> Tensor:
                    return attend(q, k, v, scale=s.head_dim**-0.5, backend=name)

                bench.try_out(name, sizes, run)


def token_wise(bench: Bench) -> None:
    """A tile of MLP, norm and loss, and the embedding."""
    s = bench.shapes
    hidden = bench.random(1, s.rows, s.hidden)
    gate, up = bench.random(s.intermediate, s.hidden), bench.random(s.intermediate, s.hidden)
    down, scale = bench.random(s.hidden, s.intermediate), bench.random(s.hidden)
    head = bench.random(s.vocab, s.hidden)
    labels = torch.randint(s.vocab, (s.rows,), device=bench.device)
    parts: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: F.linear(hidden, gate),
        "mlp": lambda: F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down),
        "rms_norm": lambda: F.rms_norm(hidden, (s.hidden,), scale, 1e-5),
        "loss": lambda: F.cross_entropy(
            F.linear(hidden, head).float().flatten(0, 1), labels, reduction="sum"
        ),
        "embedding": lambda: F.embedding(labels, head),
    }
    for name, run in parts.items():
        bench.try_out(name, {"rows": s.rows}, run)


def offloads(bench: Bench) -> None:
    """A checkpointed layer input to pinned host memory and back, beside the same kept on the device."""
    s = bench.shapes
    weight = bench.random(s.hidden, s.hidden)
    kinds = {
        "kept on the device": None,
        "offloaded, pinned and prefetched": HostOffload(Placement(bench.device)),
        "offloaded, blocking": HostOffload(Placement(bench.device), overlap=False),
    }
    for tokens in s.layer_tokens:
        x = bench.random(1, tokens, s.hidden)
        for name, offload in kinds.items():

            def run(x: Tensor = x, offload: HostOffload | None = offload) -> Tensor:
                for _ in range(4):
                    x = checkpoint(lambda y: F.linear(y, weight), x, offload)
                return x

            bench.try_out(f"4 layers, {name}", {"tokens": tokens}, run)


def stages(meter: Meter) -> Iterator[Stage]:
    """What the device holds as a process comes to use it."""

    def stage(name: str) -> Stage:
        meter.synchronize()
        return Stage(
            name=name,
            allocated_bytes=meter.allocated(),
            reserved_bytes=meter.peak_reserved(),
            device_bytes=meter.in_use(),
        )

    yield stage("context")
    x = torch.ones(1024, 1024, dtype=torch.bfloat16, device=meter.device)
    x = x @ x
    yield stage("matrix product")
    q = torch.ones(1, 4, 1024, 128, dtype=torch.bfloat16, device=meter.device)
    attend(q, q, q, scale=1.0)
    yield stage("attention")
    dist.all_reduce(x)
    yield stage("all_reduce")
    dist.all_to_all_single(torch.empty_like(x), x)
    yield stage("all_to_all")


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Everything, on the one device of this rank; JSON data of a `Calibration`."""
    with alone(rank) as meter:
        rank.progress("stages")
        seen = list(stages(meter))
        bench = Bench(meter, Shapes(**payload.get("shapes", {})))
        for part in (token_wise, offloads, attentions):
            rank.progress(part.__name__)
            part(bench)
    return {
        "stages": [each.model_dump() for each in seen],
        "scratch": [each.model_dump() for each in bench.scratch],
        "timings": [each.model_dump() for each in bench.timings],
        "refused": bench.refused,
    }
