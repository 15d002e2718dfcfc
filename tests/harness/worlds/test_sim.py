"""The simulated step is the real one, and its shortcuts cost nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from alst_impl.config import TrainConfig
from alst_impl.data import Corpus
from alst_impl.methods.base import load_method
from alst_impl.placement import Placement
from alst_impl.step import accumulate_gradients, micro_batches, start
from harness.depth import at_depth
from harness.tracker import Tracker
from harness.worlds.sim import Offload, Trace, simulate, stretched

LAYERS = 9


def config(method: dict[str, Any], seqlen: int = 24_000, gpus: int = 4) -> TrainConfig:
    """A narrow Llama of `LAYERS` layers in bf16."""
    return TrainConfig(
        model="tiny-llama",
        overrides={"num_hidden_layers": LAYERS},
        method=method,
        engine="fsdp2",
        seqlen=seqlen,
        world_size=gpus,
        dtype="bfloat16",
    )


METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"name": "baseline"},
    "alst": {"name": "alst", "sp": 4},
    "alst without offload": {"name": "alst", "sp": 4, "offload": False},
    "usp": {"name": "usp", "cp": 2, "sp": 2},
    "alst_recipe": {"name": "alst_recipe", "sp": 4},
    "alst_recipe without tiles": {
        "name": "alst_recipe",
        "sp": 4,
        "tile_mlp": False,
        "offload": False,
    },
}


def summary(trace: Trace) -> dict[str, Any]:
    """All numbers of a trace that do not depend on how it was made."""
    return {
        phase: (dict(instant.by_category), instant.host_bytes)
        for phase, instant in trace.phases.items()
    }


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("offload", [Offload(gradients=False), Offload(parameters=True)])
def test_stretched_layers_equal_the_full_depth(method: dict[str, Any], offload: Offload) -> None:
    """Five layers, stretched, give every byte of the whole model, by phase and category."""
    full = simulate(config(method), offload=offload)
    assert summary(stretched(config(method), offload=offload)) == summary(full)


def test_capped_tiles_equal_all_tiles() -> None:
    """Three tiles at true size have the peak of all of them."""
    alst = config({"name": "alst", "sp": 4})
    capped, whole = simulate(alst), simulate(alst, cap_tiles=False)
    assert summary(capped) == summary(whole)


@pytest.mark.parametrize("gpus", [1, 8, 16])
def test_any_number_of_ranks(gpus: int) -> None:
    """A process group of any size is played by this process, and shards shrink with it."""
    trace = simulate(at_depth(config({"name": "baseline"}, seqlen=512, gpus=gpus), 2))
    one = simulate(at_depth(config({"name": "baseline"}, seqlen=512, gpus=1), 2))
    parameters = trace.phases["forward"].by_category["parameters"]
    assert parameters == pytest.approx(
        one.phases["forward"].by_category["parameters"] / gpus, rel=0.05
    )


def test_attention_is_called_by_name_and_makes_nothing_quadratic() -> None:
    """GPU hardware is simulated with CUDA's flash operator; no tensor has S x S elements."""
    seqlen = 100_000
    trace = simulate(config({"name": "baseline"}, seqlen=seqlen, gpus=1))
    assert "aten::_scaled_dot_product_flash_attention_backward" in trace.operators
    assert not any("flash_attention_for_cpu" in operator for operator in trace.operators)
    assert trace.phases["backward"].allocated_bytes < seqlen**2


def test_offload_moves_checkpoints_to_the_host() -> None:
    """One layer input per layer lies on the host, and no longer on the device."""
    on, off = (
        simulate(config({"name": "alst", "sp": 4, "offload": offload})) for offload in (True, False)
    )
    checkpoints = LAYERS * 6_000 * 128 * 2
    assert on.phases["backward"].host_bytes == pytest.approx(checkpoints, rel=0.01)
    assert off.phases["backward"].host_bytes == 0
    saved = off.phases["backward"].allocated_bytes - on.phases["backward"].allocated_bytes
    # Two inputs are back at the peak: the one in use, and a small one is fetched ahead.
    assert saved > 0.7 * checkpoints


def test_the_world_leaves_no_trace() -> None:
    """Attention, meshes and the process group are PyTorch's own again afterwards."""
    before = torch.nn.functional.scaled_dot_product_attention
    simulate(at_depth(config({"name": "alst", "sp": 4}), 2))
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert not torch.distributed.is_initialized()


def real_peaks(rank: int, world_size: int, train: TrainConfig) -> tuple[dict[str, int], int]:
    """Tracked phase peaks and host peak of a real forward and backward; runs on every rank."""
    axes = load_method(train.method).axes(world_size)
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    tracker = Tracker()
    cpu = torch.device("cpu")
    placement = Placement(cpu, cpu, on_host=tracker.mark_host, on_phase=tracker.phase)
    method, runtime = start(train, mesh, placement)
    corpus = Corpus(train.data, train.seqlen, train.seed, vocab_size=2048)
    batches = micro_batches(train, corpus, method, mesh, 0, cpu)
    with tracker:
        tracker.adopt(runtime.module.parameters(), "parameters")
        tracker.adopt(runtime.module.buffers(), "buffers")
        for batch in batches:
            tracker.adopt([batch.input_ids, batch.shift_labels, batch.position_ids], "batch")
        accumulate_gradients(method, runtime, batches)
    return tracker.phase_peaks, tracker.host_peak_bytes


@pytest.mark.parametrize("method", ["alst", "alst without offload", "baseline"])
def test_simulated_cpu_step_equals_the_real_one(method: str, ranks: Any) -> None:
    """Real tensors, real processes and CPU kernels against fake ones: 0.2 % at most, per phase."""
    options = METHODS[method] | ({"sp": 2} if method != "baseline" else {})
    train = at_depth(config(options, seqlen=2_048, gpus=2), 3).model_copy(
        update={"dtype": "float32"}
    )
    (real, real_host), _ = ranks(2)(real_peaks, train)
    fake = simulate(train, gpu=False, cap_tiles=False)
    for phase in ("forward", "backward"):
        assert fake.phases[phase].allocated_bytes == pytest.approx(real[phase], rel=0.002), phase
    assert max(instant.host_bytes for instant in fake.phases.values()) == real_host


@pytest.mark.parametrize("checkpoint", [True, False])
def test_simulated_stages_equal_the_real_ones(ranks: Any, checkpoint: bool) -> None:
    """First and last stage of a pipeline, each played alone, against two that talk: 0.2 % at most."""
    options = {"name": "seq1f1b", "pp": 2, "slices": 2}
    train = at_depth(config(options, seqlen=1_024, gpus=2), 2).model_copy(
        update={"dtype": "float32", "accumulation": 3, "checkpoint": checkpoint}
    )
    for rank, (real, _) in enumerate(ranks(2)(real_peaks, train)):
        fake = simulate(train, gpu=False, cap_tiles=False, rank=rank)
        for phase in ("forward", "backward"):
            assert fake.phases[phase].allocated_bytes == pytest.approx(real[phase], rel=0.002)


def test_a_first_stage_holds_the_slices_that_the_schedule_says() -> None:
    """(P + k - 1) / (k P) of what it holds with whole sequences; the trace is that of the fuller stage."""
    runs = [
        config({"name": "seq1f1b", "pp": 3, "slices": k, "split": "length"}, 8_192, gpus=3)
        for k in (1, 4)
    ]
    runs = [run.model_copy(update={"accumulation": 3, "checkpoint": False}) for run in runs]
    whole, sliced = (simulate(run).phases["forward"].by_category["activations"] for run in runs)
    assert sliced / whole == pytest.approx((3 + 4 - 1) / (4 * 3), rel=0.05)
    fuller = stretched(runs[1])
    assert summary(fuller) == summary(simulate(runs[1], rank=2))
