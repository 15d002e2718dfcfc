"""Results of a forecast: bytes, limits, the longest sequence. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from alst_impl.config import Frozen, TrainConfig

Limit = Literal["gpu_memory", "host_memory", "heads", "none"]
LIMITS: Mapping[Limit, str] = {
    "gpu_memory": "more than the GPU's memory",
    "host_memory": "more than the node's host memory",
    "heads": "more than the GPU's memory, and the heads do not split over more of the GPUs",
    "none": "nothing is exceeded",
}
"""What each limit means."""


class Flops(Frozen):
    """FLOPs of one step, over all ranks."""

    paper_formula: float
    model_causal: float


class Cost(Frozen):
    """Counted FLOPs and traffic of one rank's forward and backward; see `harness.meters.cost`."""

    matmul_flops: float
    """FLOPs of matrix products, including recomputation."""
    attention_flops: float
    """FLOPs of attention over visible query-key pairs."""
    device_bytes: float
    """Bytes of operands and results of matrix products and attention, each counted once. Fusing
    other operators does not avoid this traffic."""
    pointwise_bytes: float = 0.0
    """Bytes that all other operators of the accelerator read and write, as they ran, unfused. 0 in old records."""
    launches: float = 0.0
    """Number of operators that ran on the accelerator. 0 in old records."""
    host_in_bytes: float
    """Bytes copied from host memory."""
    host_out_bytes: float
    """Bytes copied to host memory."""
    link_bytes: float
    """Bytes sent to other ranks."""
    network_bytes: float = 0.0
    """Those of `link_bytes` that are sent in groups with ranks on several nodes. 0 in old records."""

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.matmul_flops + self.attention_flops


class StepTime(Frozen):
    """Modelled time of a step; see `harness.formulas.steptime`."""

    seconds: float
    low: float
    """Least seconds that published steps leave possible."""
    high: float
    """Most seconds that published steps leave possible."""
    parts: Mapping[str, float]
    """Seconds by what they are spent on; they add up to `seconds`."""
    basis: str
    """Where the speeds are from."""

    @property
    def binds(self) -> str:
        """What takes the most time."""
        return max(self.parts, key=lambda part: self.parts[part])


class Prediction(Frozen):
    """Memory and time of a step, per GPU unless stated, and whether it fits."""

    allocated_bytes: int
    """Value of `max_memory_allocated`."""
    reserved_bytes: int | None = None
    """Value of `max_memory_reserved`; None if no allocator ran."""
    overhead_bytes: int
    """Memory that is reserved but not allocated, plus memory outside the allocator."""
    total_bytes: int
    """Device memory as NVML reads it. Modelled."""
    host_bytes: int
    """Host memory of one node."""
    bytes_per_local_token: float | None
    """Increase of `allocated_bytes` per token of one rank; None if it was not requested."""
    by_category: Mapping[str, int]
    """`allocated_bytes` by category."""
    fits: bool
    limit: Limit
    """The limit that the step exceeds, or `none`."""
    flops: Flops
    step_seconds_modelled: float | None
    """None if the speed of the hardware or of the attention kernel on it is not known, or no work was counted."""
    time: StepTime | None = None
    """None in old records, and where `step_seconds_modelled` is or a schedule was played."""
    time_unknown: str | None = None
    """Why `step_seconds_modelled` is None."""
    cost: Cost | None = None
    """None if no work was counted."""
    least_seconds_modelled: float | None = None
    """Lower bound on the time of `cost`: all resources at their datasheet peak, fully overlapped."""


class Planned(Frozen):
    """One setting that fits, and its prediction."""

    train: TrainConfig
    sp: int
    """Sequence-parallel degree."""
    cp: int
    """Context-parallel degree."""
    dp: int
    """Samples of a step: groups of ranks that share none of their tokens."""
    best: list[str]
    """What no other setting of the plan does better: some of `fastest`, `fewest GPUs`, `longest`."""
    tokens_per_second_per_gpu: float | None
    """None if the time is unknown."""
    mfu: float | None
    """Causal model FLOPs over the peak FLOPs of the step's time."""
    longest_tokens: int
    """About the longest sequence that fits with these settings: extrapolated."""
    advice: str
    """What to change next."""
    prediction: Prediction

    @property
    def gpus(self) -> int:
        """Accelerators, over all nodes."""
        return self.train.world_size


class Plan(Frozen):
    """Settings that fit, or the reason why none does."""

    rows: list[Planned]
    """Most tokens per second per GPU first; empty if nothing fits."""
    tried: int
    """Number of settings that were tried."""
    limit: Limit
    """The limit that the closest setting exceeds; `none` if something fits."""
    reason: str | None
    """Why nothing fits, in one sentence; None if something fits."""


class SearchResult(Frozen):
    """The longest sequence that fits."""

    longest_tokens: int
    """0 if no length fits."""
    shortest_failing_tokens: int
    limit: Limit
    """The limit that the shortest failing length exceeds."""
    evaluations: int
    """Number of steps that ran."""


class Holding(Frozen):
    """Memory that one operator at one source line holds at the peak."""

    category: str
    operator: str
    location: str | None
    """`file:line`."""
    nbytes: int
    count: int
    """Number of allocations."""


class Timeline(Frozen):
    """Allocated bytes over the events of a step, downsampled to the maximum of each stretch of events."""

    phases: list[str]
    """Phase of each stretch."""
    device_bytes: list[int]
    """Maximum of each stretch on the accelerator."""


class Simulated(Frozen):
    """Results of one rank of a cell, run without the other ranks."""

    code: str
    """Fingerprint of all code that decides the numbers. A record with another fingerprint is stale."""
    prediction: Prediction | None
    """Prediction at the cell's length; None for a part of a step."""
    peak_bytes: int
    """Peak of allocated bytes."""
    phase_peak_bytes: Mapping[str, int] = {}
    """`peak_bytes` of each phase."""
    reserved_bytes: int | None = None
    """Peak of reserved bytes; None if no allocator ran."""
    checkpoint_bytes: int
    """Host memory that the activation checkpoints of one rank take."""
    holdings: list[Holding]
    """Allocations that were alive at the peak, largest first."""
    search: SearchResult | None
    """Result of the search; None if the cell does not request one."""
    timeline: Timeline | None
    """None if the cell does not request it."""

    @property
    def fits(self) -> bool:
        """Whether the step fits. A part of a step has no limits to exceed."""
        return self.prediction is None or self.prediction.fits
