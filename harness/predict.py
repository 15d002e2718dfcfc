"""Will it fit, and by which limit: one simulated step, the limits of a machine, and the search for
the longest sequence.

The numbers stay apart: live tensors and kernel scratch are counted, at the instant where their sum is
largest; what the allocator reserves is a model of the allocator replayed on the counted events; what
the device holds outside the allocator is fitted on readings named in `OUTSIDE_READINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alst_impl.config import Frozen, TrainConfig
from alst_impl.methods.base import load_method
from alst_impl.models import field, published
from harness import flops, roofline
from harness.hardware import Hardware
from harness.prediction import Flops, Limit, Prediction, SearchResult
from harness.worlds.sim import Offload, Trace, stretched, structure

GIB = 2**30
OPTIMIZER_BYTES = 16
"""Host bytes per parameter under optimizer offload: fp32 master weight, two Adam moments and fp32
gradient (arXiv:2506.13996, section 2.1; DeepSpeed's ZeRO-Offload)."""
OUTSIDE_READINGS = {
    "ArcticTraining run-h100-sp1-llama-8b-baseline.yml, 32,000 tokens": (71.91, 64.03),
    "ArcticTraining run-h200-sp1-llama-8b-liger.yml, 300,000 tokens": (134.96, 126.72),
}
"""(GiB that NVML read, GiB that our allocator model reserves for the same run)."""
OUTSIDE_BYTES = int(
    sum(nvml - reserved for nvml, reserved in OUTSIDE_READINGS.values())
    / len(OUTSIDE_READINGS)
    * GIB
)
"""On the device but not in PyTorch's allocator: context, communication buffers, other libraries."""
INDEX_RANGE = 2**31
"""Elements that a kernel with 32-bit indices can address."""
STEP = 256
"""Lengths are searched in multiples of this many tokens per rank (the recipes' own advice)."""
PRECISION = 0.004
"""Relative width of the bracket at which a search ends."""
PATIENCE = 4
"""Simulated steps after which a search bisects every other time: bytes are no straight line there."""


class Setting(Frozen):
    """A training run on a machine."""

    train: TrainConfig
    hardware: Hardware
    host_memory_bytes: int | None = None
    """Of one node; None takes the hardware's."""
    offload_parameters: bool = False
    """Parameter shards in host memory."""
    kernel: str = "flash_attention_2"
    """Core attention whose scratch counts: a key of `harness.scratch.ATTENTION_BACKWARD`."""


def predict(setting: Setting, *, slope: bool = True) -> Prediction:
    """The step of `setting`."""
    return explained(setting, slope=slope, explain=False)[0]


def explained(
    setting: Setting, *, slope: bool = True, explain: bool = True
) -> tuple[Prediction, Trace]:
    """The step of `setting`, and the trace with what was alive at its peak."""
    config, hardware = setting.train, setting.hardware
    trace = _trace(setting, config, explain)
    instant = trace.phases[trace.peak]
    total = trace.reserved_bytes + OUTSIDE_BYTES
    host = _host_bytes(setting, trace)
    limit: Limit = "none"
    if _exceeds_index_range(config):
        limit = "index_range"
    elif total > hardware.memory_bytes:
        limit = "heads" if _heads_are_spent(config) else "gpu_memory"
    elif host > (setting.host_memory_bytes or hardware.host_memory_bytes or math.inf):
        limit = "host_memory"
    sequences = config.batch_size * config.accumulation * _data_parallel(config)
    shape = flops.shape_of(
        published(config.model, config.overrides), structure(config).num_parameters
    )
    prediction = Prediction(
        live_bytes=instant.allocated_bytes - instant.scratch_bytes,
        scratch_bytes=instant.scratch_bytes,
        allocated_bytes=instant.allocated_bytes,
        overhead_bytes=total - instant.allocated_bytes,
        total_bytes=total,
        host_bytes=host,
        bytes_per_local_token=_slope(setting, instant.allocated_bytes) if slope else None,
        by_category=dict(instant.by_category),
        fits=limit == "none",
        limit=limit,
        flops=Flops(
            paper_formula=sequences * flops.paper_formula(shape, config.seqlen),
            model_causal=sequences * flops.model_causal(shape, config.seqlen),
        ),
        step_seconds_modelled=sequences
        * roofline.seconds(shape, config.seqlen, hardware)
        / config.world_size,
    )
    return prediction, trace


def search(setting: Setting) -> SearchResult:
    """The longest sequence of `setting` (its own length is the first guess), by bracket and bisection."""
    ranks = setting.train.world_size // _data_parallel(setting.train)
    step = STEP * ranks
    seen: dict[int, Prediction] = {}

    def at(units: int) -> Prediction:
        if units not in seen:
            train = setting.train.model_copy(update={"seqlen": units * step})
            seen[units] = predict(setting.model_copy(update={"train": train}), slope=False)
        return seen[units]

    low, guess = 0, max(setting.train.seqlen // step, 1)
    high: int | None = None
    while high is None or high - low > max(1, int(PRECISION * high)):
        if at(guess).fits:
            low = guess
        else:
            high = guess
        guess = _next_guess(low, high, seen, setting)
    return SearchResult(
        longest_tokens=low * step,
        shortest_failing_tokens=high * step,
        limit=at(high).limit,
        evaluations=len(seen),
    )


def _next_guess(
    low: int, high: int | None, seen: Mapping[int, Prediction], setting: Setting
) -> int:
    """Just beyond, or just below, where a line through two known points meets the limit."""
    if high is not None and (
        seen[high].limit == "index_range" or (len(seen) > PATIENCE and len(seen) % 2)
    ):
        return (low + high) // 2
    ends = [n for n in (low, high) if n is not None and n in seen]
    points = [(n, _use(seen[n], setting)) for n in ends]
    if len(points) < 2:  # the largest, or the smallest, two there are
        points = sorted(((n, _use(p, setting)) for n, p in seen.items()), reverse=not low)[-2:]
    (x, y), (far, above) = points[-1], points[0]
    slope = (above - y) / (far - x) if far != x else y / x
    crossing = x + (1 - y) / slope if slope > 0 else 2 * x
    half = max(1, int(PRECISION * crossing * 0.45))
    if high is None:
        return min(max(int(crossing) + half, low + 1), 4 * low)
    upper = high - crossing > crossing - low
    return min(max(int(crossing) + (half if upper else -half), low + 1), high - 1)


def _use(prediction: Prediction, setting: Setting) -> float:
    """The larger share of what there is, of device memory and of the node's host memory."""
    host = setting.host_memory_bytes or setting.hardware.host_memory_bytes or math.inf
    return max(prediction.total_bytes / setting.hardware.memory_bytes, prediction.host_bytes / host)


def _trace(setting: Setting, config: TrainConfig, explain: bool) -> Trace:
    offload = Offload(
        gradients=True,
        parameters=setting.offload_parameters,
        pinned=load_method(config.method).pins_checkpoints,
    )
    return stretched(config, offload=offload, kernel=setting.kernel, explain=explain)


def _slope(setting: Setting, allocated: int) -> float:
    """Bytes that one more token on every rank costs, over the next two per cent of the length."""
    config = setting.train
    ranks = config.world_size // _data_parallel(config)
    more = max(config.seqlen // ranks // 50, 1)
    longer = config.model_copy(update={"seqlen": config.seqlen + more * ranks})
    trace = _trace(setting, longer, explain=False)
    return (trace.phases[trace.peak].allocated_bytes - allocated) / more


def _data_parallel(config: TrainConfig) -> int:
    return load_method(config.method).axes(config.world_size)["dp"]


def _heads_are_spent(config: TrainConfig) -> bool:
    """Whether ranks are left that cannot share a sample because the heads do not split over more."""
    method = load_method(config.method)
    if "sp" not in type(method).model_fields:
        return False
    heads = field(published(config.model, config.overrides), "num_attention_heads")
    largest = math.gcd(config.world_size, heads)
    return method.axes(config.world_size)["sp"] == largest < config.world_size


def _host_bytes(setting: Setting, trace: Trace) -> int:
    """Checkpoints and offloaded shards of a node's ranks, and their part of the optimizer states."""
    ranks = min(setting.train.world_size, setting.hardware.devices_per_node)
    held = max(instant.host_bytes for instant in trace.phases.values())
    states = OPTIMIZER_BYTES * structure(setting.train).num_parameters // setting.train.world_size
    return ranks * (held + states)


def _exceeds_index_range(config: TrainConfig) -> bool:
    """Whether a kernel of the stack would index past 2^31: Liger before 0.6.1 did with [tokens, E].

    Source: ArcticTraining asks for Liger >= 0.6.1 for its 64-bit indices; the 1-GPU recipe remarks that
    555,000 tokens end in an illegal access of a Triton kernel.
    """
    if config.method.name != "alst_recipe" or config.method.options.get("liger") is False:
        return False
    local = config.seqlen * _data_parallel(config) // config.world_size
    hidden = field(published(config.model, config.overrides), "hidden_size")
    return local * hidden >= INDEX_RANGE


def as_json(prediction: Prediction) -> dict[str, Any]:
    """The keys of `alst predict --json`."""
    return prediction.model_dump(mode="json")
