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
from harness import flops, pipelines, roofline
from harness.calibration import committed_path, outside_bytes, read
from harness.depth import structure
from harness.hardware import Hardware
from harness.prediction import Cost, Flops, Limit, Prediction, SearchResult
from harness.worlds.sim import Offload, Trace, stretched

GIB = 2**30
OPTIMIZER_BYTES = 16
"""Host bytes per parameter under optimizer offload: fp32 master weight, two Adam moments and fp32
gradient (arXiv:2506.13996, section 2.1; DeepSpeed's ZeRO-Offload)."""
STATES = {"adamw": 2, "sgd": 0}
"""Copies of the parameters that PyTorch's optimizers keep."""
BF16 = 2
"""Bytes of one element."""
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
OUTSIDE_TERMS = {
    "DeepSpeed's gradient bucket (reduce_bucket_size 5e8, bf16; runtime/zero/stage3.py)": 10**9,
    "DeepSpeed's prefetched parameters (stage3_prefetch_bucket_size 5e7, bf16)": 10**8,
    "CUDA context (arXiv:2506.13996, section 2.1: about 1 GiB)": GIB,
}
"""Parts of `OUTSIDE_BYTES` that have a name: what ZeRO-3 holds beside what engine fsdp2 does, and the
context. The rest (communicators, libraries, what the readings were off by) is not taken apart."""
OUTSIDE = {
    "deepspeed": OUTSIDE_BYTES,
    "pytorch": GIB,
}
"""Outside the allocator, by what runs: the published ALST stack, or one process of PyTorch alone, which has
a CUDA context (about 1 GiB: arXiv:2506.13996, section 2.1), no bucket and no communicator."""
INDEX_RANGE = 2**31
"""Elements that a kernel with 32-bit indices can address."""
STEP = 256
"""Lengths are searched in multiples of this many tokens per rank (the recipes' own advice)."""
PRECISION = 0.015
"""Relative width of the bracket at which a search ends."""


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
    optimizer_on_device: int | None = None
    """Bytes per parameter of optimizer states in device memory, updated during backward; None keeps
    `OPTIMIZER_BYTES` on the host. Temporaries of one parameter's update are not counted."""
    stack: str = "deepspeed"
    """A key of `OUTSIDE`."""
    resident: bool = False
    """Gradients and optimizer states on the accelerator, as in a run of ours on one."""


def predict(setting: Setting, *, slope: bool = True) -> Prediction:
    """The step of `setting`; with its slope, and the work counted, it takes twice as long."""
    prediction, _ = explained(setting, explain=False, counted=slope)
    return (
        with_slope(setting, prediction, predict(longer(setting), slope=False))
        if slope
        else prediction
    )


def longer(setting: Setting) -> Setting:
    """The same run with sequences two per cent longer, by at least a token on every rank."""
    ranks = sequence_parallel(setting.train)
    return _at(setting, setting.train.seqlen + max(setting.train.seqlen // ranks // 50, 1) * ranks)


def with_slope(setting: Setting, prediction: Prediction, at_longer: Prediction) -> Prediction:
    """`prediction` of `setting` with what one more token on every rank costs, up to `longer(setting)`."""
    more = longer(setting).train.seqlen - setting.train.seqlen
    grown = at_longer.allocated_bytes - prediction.allocated_bytes
    slope = grown * sequence_parallel(setting.train) / more
    return prediction.model_copy(update={"bytes_per_local_token": slope})


def explained(
    setting: Setting, *, explain: bool = True, counted: bool = True
) -> tuple[Prediction, Trace]:
    """The step of `setting` without its slope, and the trace with what was alive at its peak."""
    config, hardware = setting.train, setting.hardware
    counted = counted and not load_method(config.method).simulation_only
    trace = _trace(setting, explain, counted)
    instant = trace.phases[trace.peak]
    states = _device_states(setting)
    allocated = instant.allocated_bytes + states
    total = trace.reserved_bytes + states + _outside_bytes(setting)
    host = _host_bytes(setting, trace)
    limit: Limit = "none"
    if config.seqlen >= _index_range_tokens(config):
        limit = "index_range"
    elif total > hardware.memory_bytes:
        limit = "heads" if heads_are_spent(config) else "gpu_memory"
    elif host > (setting.host_memory_bytes or hardware.host_memory_bytes or math.inf):
        limit = "host_memory"
    sequences = config.batch_size * config.accumulation * _data_parallel(config)
    shape = flops.shape_of(
        published(config.model, config.overrides), structure(config).num_parameters
    )
    method = load_method(config.method)
    cost = _cost(setting, trace.cost) if counted else None
    if cost is None or (method.recomputes_layers and config.checkpoint):
        seconds = sequences * roofline.seconds(shape, config.seqlen, hardware) / config.world_size
    else:
        seconds = roofline.seconds_of(cost, hardware)
    prediction = Prediction(
        live_bytes=allocated - instant.scratch_bytes,
        scratch_bytes=instant.scratch_bytes,
        allocated_bytes=allocated,
        overhead_bytes=total - allocated,
        total_bytes=total,
        host_bytes=host,
        bytes_per_local_token=None,
        by_category={**instant.by_category, **({"optimizer": states} if states else {})},
        fits=limit == "none",
        limit=limit,
        flops=Flops(
            paper_formula=sequences * flops.paper_formula(shape, config.seqlen),
            model_causal=sequences * flops.model_causal(shape, config.seqlen),
        ),
        step_seconds_modelled=seconds / (1 - pipelines.waiting(config)),
        cost=cost,
        least_seconds_modelled=cost and roofline.least_seconds(cost, hardware, config.world_size),
    )
    return prediction, trace


def search(setting: Setting, known: Mapping[int, Prediction] | None = None) -> SearchResult:
    """The longest sequence of `setting`, in multiples of `STEP` tokens per rank.

    `known` are two predictions of it, by length; they say where to look first.
    """
    if known is None:
        beyond = longer(setting)
        known = {s.train.seqlen: predict(s, slope=False) for s in (setting, beyond)}
    step = STEP * sequence_parallel(setting.train)
    # What fits does so at the next shorter multiple, what does not fails at the next longer one.
    seen = {tokens // step if p.fits else -(-tokens // step): p for tokens, p in known.items()}
    low = max((n for n, p in seen.items() if p.fits), default=0)
    high = min((n for n, p in seen.items() if not p.fits), default=None)
    meets = max(int(_crossing(setting, known) / step), 2)
    half = stride = max(1, int(PRECISION * meets * 0.45))
    guess = max(meets - half, low + 1)  # if the line is right, this fits, and two halves on fails
    if high is not None:
        guess = min(guess, high - 1)
    while high is None or high - low > max(1, int(PRECISION * high)):
        seen[guess] = predict(_at(setting, guess * step), slope=False)
        if seen[guess].fits:
            low = guess
        else:
            high = guess
        stride *= 2
        if high is None or low == 0:
            nearest = sorted(seen)[-2:] if high is None else sorted(seen)[:2]
            meets = int(_crossing(setting, {n * step: seen[n] for n in nearest}) / step)
            up = max(meets + half, low + stride)
            guess = up if high is None else max(min(meets - half, high - stride), 1)
        elif seen[high].limit == "index_range" or len(seen) % 2:
            guess = (low + high) // 2
        else:
            under, over = _use(seen[low], setting), _use(seen[high], setting)
            meets = low + int((1 - under) / (over - under) * (high - low))
            upper = high - meets > meets - low  # of the two gaps the longer one is to be cut
            guess = min(max(meets + (half if upper else -half), low + 1), high - 1)
    return SearchResult(
        longest_tokens=low * step,
        shortest_failing_tokens=high * step,
        limit=seen[high].limit,
        evaluations=len(seen),
    )


def _crossing(setting: Setting, known: Mapping[int, Prediction]) -> float:
    """Tokens at which straight lines through two predictions meet the first limit."""
    (x, near), (far, there) = sorted(known.items())
    host = setting.host_memory_bytes or setting.hardware.host_memory_bytes or math.inf
    # Allocated bytes are a straight line; what the allocator reserves on top jumps, so it is scaled.
    reserved = near.total_bytes - _outside_bytes(setting)
    slope = (there.allocated_bytes - near.allocated_bytes) * reserved / near.allocated_bytes
    meets = x + (setting.hardware.memory_bytes - near.total_bytes) * (far - x) / max(slope, 1)
    if there.host_bytes > near.host_bytes:
        growth = there.host_bytes - near.host_bytes
        meets = min(meets, x + (host - near.host_bytes) * (far - x) / growth)
    return min(meets, _index_range_tokens(setting.train))


def _outside_bytes(setting: Setting) -> int:
    """Outside the allocator: fitted on DeepSpeed's stack, and for a run as on our own GPU what that held."""
    path = committed_path(setting.hardware.name)
    if setting.resident and path.is_file():
        return outside_bytes(read(path))
    return OUTSIDE[setting.stack]


def _use(prediction: Prediction, setting: Setting) -> float:
    """The larger share of what there is, of device memory and of the node's host memory."""
    host = setting.host_memory_bytes or setting.hardware.host_memory_bytes or math.inf
    return max(prediction.total_bytes / setting.hardware.memory_bytes, prediction.host_bytes / host)


def _trace(setting: Setting, explain: bool, counted: bool) -> Trace:
    config = setting.train
    offload = Offload(
        gradients=not setting.resident,
        states=STATES[config.optimizer.name] if setting.resident else 0,
        parameters=setting.offload_parameters,
        pinned=load_method(config.method).pins_checkpoints,
    )
    return stretched(
        config,
        offload=offload,
        kernel=setting.kernel,
        hardware=setting.hardware.name,
        explain=explain,
        counted=counted,
    )


def _cost(setting: Setting, counted: Cost) -> Cost:
    """`counted`, and what the optimizer in host memory moves: gradients there, parameters here.

    Both in bf16 and sharded; parameters that live on the host come for forward and for backward.
    """
    if setting.optimizer_on_device or setting.resident:
        return counted
    train = setting.train
    shard = BF16 * structure(train).num_parameters / train.world_size
    fetched = shard * (2 if setting.offload_parameters else 1)
    more = {
        "host_in_bytes": counted.host_in_bytes + fetched,
        "host_out_bytes": counted.host_out_bytes + shard,
    }
    return counted.model_copy(update=more)


def _at(setting: Setting, seqlen: int) -> Setting:
    return setting.model_copy(update={"train": setting.train.model_copy(update={"seqlen": seqlen})})


def sequence_parallel(config: TrainConfig) -> int:
    """Ranks that share the tokens of one sample."""
    degrees = load_method(config.method).degrees(config.world_size)
    return degrees["cp"] * degrees["sp"]


def _data_parallel(config: TrainConfig) -> int:
    return load_method(config.method).axes(config.world_size)["dp"]


def heads_are_spent(config: TrainConfig) -> bool:
    """Whether ranks are left that cannot share a sample because the heads do not split over more."""
    method = load_method(config.method)
    fields = type(method).model_fields
    if "sp" not in fields or "cp" in fields:  # a ring takes any number of ranks
        return False
    heads = field(published(config.model, config.overrides), "num_attention_heads")
    largest = math.gcd(config.world_size, heads)
    return method.axes(config.world_size)["sp"] == largest < config.world_size


def _states(config: TrainConfig, bytes_per_parameter: int) -> int:
    """Bytes of one rank's optimizer states: engine `plain` has all of them on every rank."""
    shards = 1 if config.engine.name == "plain" else config.world_size
    return bytes_per_parameter * structure(config).num_parameters // shards


def _device_states(setting: Setting) -> int:
    """Optimizer states in the memory of one device."""
    return _states(setting.train, setting.optimizer_on_device or 0)


def _host_bytes(setting: Setting, trace: Trace) -> int:
    """Checkpoints and offloaded shards of a node's ranks, and their part of the optimizer states."""
    ranks = min(setting.train.world_size, setting.hardware.devices_per_node)
    held = max(instant.host_bytes for instant in trace.phases.values())
    on_host = 0 if setting.optimizer_on_device or setting.resident else OPTIMIZER_BYTES
    return ranks * (held + _states(setting.train, on_host))


def _index_range_tokens(config: TrainConfig) -> float:
    """The length from which on a kernel of the stack indexes past 2^31: Liger before 0.6.1 did with [tokens, E].

    Source: ArcticTraining asks for Liger >= 0.6.1 for its 64-bit indices; the 1-GPU recipe remarks that
    555,000 tokens end in an illegal access of a Triton kernel.
    """
    if config.method.name != "alst_recipe" or config.method.options.get("liger") is False:
        return math.inf
    hidden: int = field(published(config.model, config.overrides), "hidden_size")
    return INDEX_RANGE * sequence_parallel(config) / hidden


def as_json(prediction: Prediction) -> dict[str, Any]:
    """The keys of `alst predict --json`."""
    return prediction.model_dump(mode="json")
