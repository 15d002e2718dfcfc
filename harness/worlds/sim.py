"""World `sim`: the training step on fake tensors and a fake process group of any size.

Fake `cpu` tensors stand for the accelerator and fake `lazy` ones for host memory: nothing has to be
compiled, fused operators stay fused, and it is the path the CPU world takes with real tensors. Core
attention of GPU hardware is called by operator name, so that nothing S x S is made.

Two shortcuts keep one point within seconds at any length and size; tests hold both against the
whole run. Layers: bytes are affine in the number of equal layers, so two small depths give all.
Tiles: the first two run at true size, the others leave their slice of the output as it is.
Steps of a ring are cut short likewise.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from alst_impl import hf
from alst_impl.config import TrainConfig
from alst_impl.data import Batch
from alst_impl.methods.base import load_method
from alst_impl.models import Initializer, field, published
from alst_impl.ops import flash, loss, ring, tiling
from alst_impl.placement import Placement
from alst_impl.step import accumulate_gradients, start
from harness.allocator import reserved_bytes
from harness.cost import Meter, Weighted
from harness.depth import at_depth, structure
from harness.prediction import Cost
from harness.repeat import DEPTH, MIDDLE, Recording, passes, repeated
from harness.scratch import cuda_scratch
from harness.tracker import Allocation, Tracker

DEVICE, HOST = torch.device("cpu"), torch.device("lazy")
"""What stands for the accelerator and for host memory."""
CUDA_ROUNDING = 512
"""Bytes; the caching allocator's smallest unit (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""
PHASES = ("forward", "backward")
"""Those that run on the accelerator when the optimizer is offloaded."""


@dataclass(frozen=True)
class Instant:
    """Bytes by category at the peak of one phase."""

    by_category: Mapping[str, int]
    """On the accelerator; `scratch` is what a kernel held inside."""
    host_bytes: int
    """Largest sum in host memory during the phase."""

    @property
    def allocated_bytes(self) -> int:
        """Live tensors and kernel scratch."""
        return sum(self.by_category.values())

    @property
    def scratch_bytes(self) -> int:
        """Inside the kernel that runs."""
        return self.by_category.get("scratch", 0)


class Moment(NamedTuple):
    """Bytes held after one event."""

    phase: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Trace:
    """What one simulated step did."""

    phases: Mapping[str, Instant]
    """By phase."""
    live: Mapping[str, list[Allocation]]
    """What was alive at each phase's peak, largest first."""
    operators: frozenset[str]
    """Every operator that ran in forward and backward."""
    reserved_bytes: int
    """What a model of the caching allocator holds after two such steps."""
    moments: list[Moment]
    """Every event of the step."""
    cost: Cost
    """What this rank computed and moved."""

    @property
    def peak(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].allocated_bytes)


@dataclass(frozen=True)
class Offload:
    """What the engine keeps in host memory; replayed onto the traced events."""

    gradients: bool = True
    """Sharded gradients leave for the host as they are made (optimizer offload)."""
    parameters: bool = False
    """Parameter shards live in host memory."""
    pinned: bool = False
    """Checkpoints lie in pinned memory: each allocation takes a power of two."""
    states: int = 0
    """Optimizer states on the accelerator, as copies of the parameters: two for Adam, in their dtype;
    0 where they lie in host memory."""

    def host_bytes(self, nbytes: int) -> int:
        """Host memory that an allocation of a checkpoint takes.

        Source: torch 2.13, ATen/core/CachingHostAllocator.h, `allocate`: `PowerOf2Ceil(size)` unless
        `pinned_max_round_threshold` or `pinned_max_cached_size` is set.
        """
        return 1 << (nbytes - 1).bit_length() if self.pinned and nbytes else nbytes

    def takes(self, allocation: Allocation) -> bool:
        """Whether `allocation` lies in host memory."""
        return (self.gradients and allocation.category == "gradients") or (
            self.parameters and allocation.category == "parameters"
        )


class Unfilled(Initializer):
    """Weights of the right shape and dtype with no values."""

    def values(self, model: PreTrainedModel, path: str, module: nn.Module) -> dict[str, Tensor]:
        """Tensors for all parameters and buffers that `module` itself holds, by name."""
        held = {**module._parameters, **module._buffers}
        return {k: torch.empty(t.shape, dtype=t.dtype) for k, t in held.items() if t is not None}


def flash_by_name(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as CUDA's flash kernel does it, on any device.

    query [B, H, S, D], key and value [B, K, S, D] with K dividing H; the kernel takes them as they are.
    """
    if attn_mask is not None:
        raise ValueError(
            "attention with a mask (a sliding window shorter than the sequence) is not one flash "
            "kernel on CUDA, so its memory is not known; use a length within the window"
        )
    width, padding = value.shape[-1], query.shape[-1] - value.shape[-1]
    if padding < 0:
        raise ValueError(
            f"heads of values ({width}) are wider than those of queries ({query.shape[-1]}): "
            "CUDA's flash kernel does not take them, and no other kernel's memory is known"
        )
    # Narrower ones (multi-head latent attention) are padded, as transformers does for this kernel.
    value = F.pad(value, (0, padding)) if padding else value
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :width] if padding else out


TileBounds = Callable[[int, int], list[tuple[int, int]]]


def _capped(bounds: TileBounds, meter: Meter) -> TileBounds:
    """`bounds` with the first two tiles alone: later ones find what the second found, and are no larger."""

    def capped(rows: int, num_tiles: int) -> list[tuple[int, int]]:
        found = bounds(rows, num_tiles)
        sizes = [stop - start for start, stop in found]
        weights = [1.0, sum(sizes[1:]) / sizes[1]] if len(found) > 1 else [1.0]
        return Weighted(found[:2], weights, meter)

    return capped


def _few_steps(meter: Meter) -> Callable[[int], Sequence[int]]:
    """The first of a ring, one with its own keys gone, one with gradients arriving, which then repeats, the last."""

    def few(size: int) -> Sequence[int]:
        return range(size) if size <= 4 else Weighted(range(4), [1.0, 1.0, size - 3.0, 1.0], meter)

    return few


def _mesh_outside_modes(*args: Any, **kwargs: Any) -> Any:
    """`init_device_mesh`, which reads values of the tensor of its ranks."""
    with _disable_current_modes():
        return init_device_mesh(*args, **kwargs)


@contextlib.contextmanager
def _replaced(*seams: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes replaced while the block runs."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in seams]
    try:
        for owner, name, value in seams:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


@contextlib.contextmanager
def fake_world(
    config: TrainConfig,
    *,
    gpu: bool,
    cap_tiles: bool,
    meter: Meter | None = None,
    rank: int | None = None,
) -> Iterator[Any]:
    """Fake tensors, a fake process group with this process as `rank`, and the mesh of the method.

    By default it is the rank that holds the most. `meter` is told what the tiles that run stand for.
    """
    seams: list[tuple[Any, str, Any]] = [
        (torch.distributed.device_mesh, "init_device_mesh", _mesh_outside_modes),
        # Positions have no values to find documents in, and the documents of a sample are explicit.
        (transformers.masking_utils, "find_packed_sequence_indices", lambda _: None),
    ]
    if gpu:
        seams.append((F, "scaled_dot_product_attention", flash_by_name))
        seams.append((flash, "operators", lambda _: flash.CUDA))
    if cap_tiles:
        meter = meter or Meter(HOST.type)
        capped = _capped(tiling.tile_bounds, meter)
        seams += [(module, "tile_bounds", capped) for module in (tiling, loss)]
        seams.append((ring, "steps", _few_steps(meter)))
    method, size = load_method(config.method), config.world_size
    rank = method.heaviest_rank(size) if rank is None else rank
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        axes = method.axes(size)
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        with _replaced(*seams), FakeTensorMode(allow_non_fake_inputs=True):
            yield mesh
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage: it takes a third of the time, and what a cycle holds is held for certain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def simulate(
    config: TrainConfig,
    *,
    gpu: bool = True,
    kernel: str = "flash_attention_2",
    hardware: str = "",
    offload: Offload | None = None,
    cap_tiles: bool = True,
    explain: bool = False,
    num_layers: int | None = None,
    rank: int | None = None,
    counted: bool = True,
) -> Trace:
    """Forward and backward of one step of `config` on `rank`, by default the one that holds the most.

    With `num_layers` the step of `config`, which has 5 layers (times the method's period), is stretched to
    that many. `gpu` calls CUDA's attention by name and rounds as its allocator does; otherwise the CPU world is
    simulated, which has one kind of memory for both. `kernel` names the attention whose scratch counts, on
    `hardware` where it was measured there. Without `counted` the trace's cost means nothing, and it is
    quicker.
    """
    meter = Meter(HOST.type)
    tracker = Tracker(
        rounding=CUDA_ROUNDING if gpu else 1,
        host=HOST.type,
        scratch=cuda_scratch(kernel, hardware) if gpu else None,
        observer=meter.observe if counted else None,
        events=True,
        explain=explain,
    )
    calls: list[int] = []
    """Number of events before each pass through a decoder layer."""

    def on_layer() -> None:
        calls.append(len(tracker.events))
        meter.mark()

    if gpu:
        placement = Placement(DEVICE, HOST, on_phase=tracker.phase, on_layer=on_layer)
    else:
        placement = Placement(
            DEVICE,
            DEVICE,
            on_host=tracker.mark_host,
            on_phase=tracker.phase,
            on_layer=on_layer,
        )
    world = fake_world(config, gpu=gpu, cap_tiles=cap_tiles, meter=meter, rank=rank)
    with world as mesh:
        method = load_method(config.method)
        batches = [method.shard(_blank_batch(config), mesh) for _ in range(config.accumulation)]
        with tracker:
            tracker.phase("setup")
            method, runtime = start(config, mesh, placement, Unfilled(0))
            model = cast("PreTrainedModel", runtime.module)
            # What sets up a mesh or a model runs once; operators of the step are what matters.
            tracker.operators.clear()
            _watch_layers(model, on_layer)
            period = method.period()
            residents = _residents(model, tracker, period) if num_layers else set()
            tracker.adopt(runtime.module.parameters(), "parameters")
            tracker.adopt(
                (t for b in batches for t in vars(b).values() if isinstance(t, Tensor)), "batch"
            )
            accumulate_gradients(method, runtime, batches)
            tracker.adopt((p.grad for p in runtime.module.parameters()), "gradients")
    recording = Recording(tracker.allocations, tracker.events)
    cost = meter.cost()
    if num_layers is not None:
        starts, segments = passes(len(calls), period), num_layers // period
        of_middle = [starts[at : at + 2] for at in (MIDDLE, 2 * DEPTH - 1 - MIDDLE)]
        recording = repeated(recording, [calls[n] for n in starts], residents, segments)
        cost = meter.cost(of_middle, segments - DEPTH)
    operators = frozenset(tracker.operators)
    return replay(recording, operators, offload or Offload(gradients=False), cost)


def _watch_layers(model: PreTrainedModel, on_layer: Callable[[], None]) -> None:
    """Have `on_layer` called before each pass through a decoder layer's attention module.

    Attention, because hooks of the layer itself do not see its recomputation. A method that never calls
    the module calls `on_layer` itself.
    """
    for attention in hf.attention_modules(model):
        attention.register_forward_pre_hook(lambda *_: on_layer())


def _residents(model: PreTrainedModel, tracker: Tracker, period: int) -> set[int]:
    """Numbers of the allocations that hold the parameters of the middle layer, or of the middle segment's."""
    mark = "parameters of the middle layer"
    for layer in hf.decoder_layers(model)[MIDDLE * period : (MIDDLE + 1) * period]:
        tracker.adopt(layer.parameters(), mark)
    return {n for n, a in enumerate(tracker.allocations) if a.category == mark}


def _blank_batch(config: TrainConfig) -> Batch:
    """One micro-batch of unpacked samples without values."""
    ids = torch.zeros(config.batch_size, config.seqlen, dtype=torch.int64)
    return Batch(ids, ids.clone(), torch.arange(config.seqlen).expand_as(ids))


def replay(recording: Recording, operators: frozenset[str], offload: Offload, cost: Cost) -> Trace:
    """Peaks of each phase from the recorded events, with `offload` applied."""
    peaks: dict[str, tuple[int, int, int]] = {}  # phase -> (device bytes, event, host bytes)
    sizes: dict[int, int] = {}
    moments: list[Moment] = []
    # Made in the first update, they stay.
    states = offload.states * sum(_parameters(recording).values())
    device, host = states, 0
    taken = [offload.takes(allocation) for allocation in recording.allocations]
    for index, (number, raw, on_host, phase) in enumerate(recording.events):
        nbytes = offload.host_bytes(raw) if on_host else raw
        change = nbytes - sizes.get(number, 0)
        sizes[number] = nbytes
        if not on_host and not taken[number]:
            device += change
        elif recording.allocations[number].category != "gradients":
            host += change  # offloaded gradients are part of the optimizer states' bytes
        best, at, best_host = peaks.get(phase, (-1, 0, 0))
        if device > best or host > best_host:
            at = index + 1 if device > best else at
            peaks[phase] = max(device, best), at, max(best_host, host)
        if phase in PHASES:
            moments.append(Moment(phase, device, host))
    live = {phase: _live_at(recording, at, offload) for phase, (_, at, _) in peaks.items()}
    phases = {}
    for phase in PHASES:
        by_category: dict[str, int] = {}
        for allocation, nbytes in live[phase]:
            by_category[allocation.category] = by_category.get(allocation.category, 0) + nbytes
        if states:
            by_category["optimizer"] = by_category.get("optimizer", 0) + states
        phases[phase] = Instant(by_category=by_category, host_bytes=peaks[phase][2])
    return Trace(
        phases=phases,
        live={phase: [a for a, _ in live[phase]] for phase in PHASES},
        operators=operators,
        reserved_bytes=reserved_bytes(_two_steps(recording, offload)),
        moments=moments,
        cost=cost,
    )


def _parameters(recording: Recording) -> dict[int, int]:
    """Allocation -> bytes, of what holds parameters at rest."""
    sizes = {number: nbytes for number, nbytes, _, phase in recording.events if phase not in PHASES}
    categories = [allocation.category for allocation in recording.allocations]
    return {n: nbytes for n, nbytes in sizes.items() if nbytes and categories[n] == "parameters"}


def _two_steps(recording: Recording, offload: Offload) -> Iterator[tuple[int, int]]:
    """(allocation, new size) on the accelerator over two steps; the second starts where the first ended."""
    sizes: dict[int, int] = {}
    step: list[tuple[int, int]] = []
    for number, nbytes, host, phase in recording.events:
        if host or offload.takes(recording.allocations[number]):
            continue
        yield number, nbytes
        sizes[number] = nbytes
        if phase in PHASES:
            step.append((number, nbytes))
    count = len(recording.allocations)
    made = {number for number, _ in step}
    # What the first step left behind (gradients) is gone before the second makes it again.
    # The update between them makes the optimizer's states while gradients are still there.
    for copy in range(offload.states):
        for number, nbytes in _parameters(recording).items():
            yield number + (2 + copy) * count, nbytes
    yield from ((number, 0) for number in made if sizes[number])
    yield from ((number + count, nbytes) for number, nbytes in step)


def _live_at(recording: Recording, event: int, offload: Offload) -> list[tuple[Allocation, int]]:
    """(allocation, bytes) on the accelerator after the first `event` events, largest first."""
    sizes: dict[int, int] = {}
    for number, nbytes, host, _ in recording.events[:event]:
        sizes[number] = 0 if host else nbytes
    allocations = recording.allocations
    found = [
        (allocations[n], b) for n, b in sizes.items() if b and not offload.takes(allocations[n])
    ]
    return sorted(found, key=lambda pair: -pair[1])


def stretched(config: TrainConfig, **options: Any) -> Trace:
    """`simulate` at the full depth of the model, from 5 layers where all layers are alike.

    Of a pipeline all layers of the first and of the last stage are run: one holds most slices, the
    other the loss. The trace is that of the one that holds more.
    """
    pp = load_method(config.method).degrees(config.world_size)["pp"]
    if pp > 1:
        last = config.world_size - config.world_size // pp
        traces = [simulate(config, rank=rank, **options) for rank in (0, last)]
        return max(traces, key=lambda trace: trace.phases[trace.peak].allocated_bytes)
    num_layers = field(published(config.model, config.overrides), "num_hidden_layers")
    period = load_method(config.method).period()
    alike = structure(config).layers_alike and num_layers % period == 0
    shallow = num_layers <= DEPTH * period
    if not alike or shallow or not config.checkpoint or config.accumulation > 1:
        return simulate(config, **options)
    return simulate(at_depth(config, DEPTH * period), num_layers=num_layers, **options)
