"""What a forecast leaves behind: bytes, limits, the longest sequence. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from alst_impl.config import Frozen

Limit = Literal["gpu_memory", "host_memory", "heads", "none"]
LIMITS: Mapping[Limit, str] = {
    "gpu_memory": "more than the GPU's memory",
    "host_memory": "more than the node's host memory",
    "heads": "more than the GPU's memory, and the heads do not split over more of the GPUs",
    "none": "nothing is exceeded",
}
"""What each limit means."""


class Flops(Frozen):
    """Of one step, over all ranks."""

    paper_formula: float
    model_causal: float


class Cost(Frozen):
    """What one rank's forward and backward compute and move, counted: see `harness.meters.cost`."""

    matmul_flops: float
    """Of matrix products, whatever is computed again included."""
    attention_flops: float
    """Of attention, over visible pairs of a query and a key."""
    device_bytes: float
    """Operands and results of both, each once: what no fusion of the operators between them avoids."""
    host_in_bytes: float
    """From host memory."""
    host_out_bytes: float
    """To host memory."""
    link_bytes: float
    """Sent to other ranks."""

    @property
    def flops(self) -> float:
        """All of them."""
        return self.matmul_flops + self.attention_flops


class Prediction(Frozen):
    """What a step holds, per GPU unless said, and whether it fits."""

    allocated_bytes: int
    """What `max_memory_allocated` reads."""
    reserved_bytes: int | None = None
    """What `max_memory_reserved` reads; None where no allocator ran."""
    overhead_bytes: int
    """Reserved but free, and outside the allocator."""
    total_bytes: int
    """What NVML reads: modelled."""
    host_bytes: int
    """Host memory of one node."""
    bytes_per_local_token: float | None
    """Slope of `allocated_bytes` over the tokens of one rank; None where it was not asked for."""
    by_category: Mapping[str, int]
    """`allocated_bytes`, taken apart."""
    fits: bool
    limit: Limit
    """What it exceeds, or `none`."""
    flops: Flops
    step_seconds_modelled: float
    cost: Cost | None = None
    """None of a method that computes nothing."""
    least_seconds_modelled: float | None = None
    """What `cost` takes at least, if everything runs at the peak of the datasheet and side by side."""


class Rung(Frozen):
    """What one rung of the ladder turns on."""

    tiling: bool
    """MLP, norms, and logits and loss in tiles: next to no time."""
    offload: bool
    """Checkpoints in host memory: copies that hide behind long sequences."""
    offload_states: bool
    """Parameters, gradients and optimizer states in host memory: layers are copied in, and the host updates."""


class Option(Frozen):
    """One way to train, and what it holds."""

    gpus: int
    sp: int
    dp: int
    rung: Rung
    prediction: Prediction

    def as_json(self) -> dict[str, Any]:
        """The keys of `alst predict --json`, with `settings`."""
        settings = {"gpus": self.gpus, "sp": self.sp, "dp": self.dp, **self.rung.model_dump()}
        return {"settings": settings, **self.prediction.model_dump(mode="json")}


class Plan(Frozen):
    """What fits, or why nothing does."""

    options: list[Option]
    """Cheapest first; empty if nothing fits."""
    limit: Limit
    """What the closest setting exceeds; `none` where something fits."""
    reason: str | None
    """In one sentence, where nothing fits."""


class SearchResult(Frozen):
    """The longest sequence that fits."""

    longest_tokens: int
    """0 if nothing does."""
    shortest_failing_tokens: int
    limit: Limit
    """What the shortest failing length exceeds."""
    evaluations: int
    """Steps that ran."""


class Holding(Frozen):
    """What one operator at one source line holds at the instant of the peak."""

    category: str
    operator: str
    location: str | None
    """`file:line`."""
    nbytes: int
    count: int
    """Allocations."""


class Timeline(Frozen):
    """Allocated bytes over the events of a step, thinned to the largest of each stretch."""

    phases: list[str]
    """Of each stretch."""
    device_bytes: list[int]
    """On the accelerator."""


class Simulated(Frozen):
    """What one rank of a cell showed, played without the others."""

    code: str
    """Fingerprint of all code that decides the numbers: a record of other code is stale."""
    prediction: Prediction | None
    """At the cell's length; None for a part of a step."""
    peak_bytes: int
    """The most that is allocated."""
    phase_peak_bytes: Mapping[str, int] = {}
    """`peak_bytes` of each phase."""
    reserved_bytes: int | None = None
    """The most that the allocator holds; None where none ran."""
    checkpoint_bytes: int
    """Host memory of one rank that checkpoints fill."""
    holdings: list[Holding]
    """What was alive at the peak, largest first."""
    search: SearchResult | None
    """Where the cell asks for it."""
    timeline: Timeline | None
    """Where the cell asks for it."""

    @property
    def fits(self) -> bool:
        """Whether the step fits; a part of one has no limits to exceed."""
        return self.prediction is None or self.prediction.fits
