"""What a step computes and moves is counted to the last product, whatever stands for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alst_impl.config import TrainConfig
from alst_impl.models import published
from harness.cost import Meter, Weighted
from harness.depth import structure
from harness.flops import attention_forward, linear_forward, shape_of
from harness.hardware import load_hardware
from harness.prediction import Cost
from harness.roofline import least_seconds
from harness.worlds.sim import simulate, stretched


def config(method: dict[str, Any], seqlen: int = 1_536, **overrides: Any) -> TrainConfig:
    """A narrow Llama in bf16, on as many GPUs as share a sample."""
    return TrainConfig(
        model="tiny-llama",
        overrides=overrides,
        method=method,
        engine="fsdp2",
        seqlen=seqlen,
        world_size=method.get("sp", 1) * method.get("cp", 1),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("method", "num_layers"),
    [
        ({"name": "alst", "sp": 2, "tiles": 5}, 7),
        ({"name": "layerwise", "rows": 200, "groups": 4, "stream": True}, 7),
        ({"name": "layerwise", "rows": 800, "groups": 2, "every": 2}, 12),
        ({"name": "ring", "cp": 8, "tiles": 5}, 7),
    ],
    ids=["alst", "layerwise streaming", "layerwise in segments", "ring"],
)
def test_five_layers_and_two_tiles_cost_what_all_do(
    method: dict[str, Any], num_layers: int
) -> None:
    """No product and no copied byte is lost; weights that a shorter last tile reads, too, count by its rows."""
    of = config(method, num_hidden_layers=num_layers)
    short, whole = stretched(of).cost, simulate(of, cap_tiles=False).cost
    for field, value in whole.model_dump().items():
        off = 0.01 if field == "device_bytes" else 1e-9
        assert getattr(short, field) == pytest.approx(value, rel=off), field


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"name": "baseline"}, 4.5),
        ({"name": "alst"}, 4.5),
        ({"name": "layerwise"}, 4.5),
        ({"name": "layerwise", "keep_attention": True}, 3.5),
        ({"name": "layerwise", "every": 2}, 5.0),
    ],
    ids=["baseline", "alst", "layerwise", "attention kept", "inputs made again"],
)
def test_attention_runs_forward_again_unless_it_is_kept(
    method: dict[str, Any], passes: float
) -> None:
    """In units of one causal forward pass: 1, 1 again, and 2.5 backward.

    Where one input is kept of two layers, the first layer runs once more.
    """
    of = config(method)
    shape = shape_of(published(of.model), structure(of).num_parameters)
    cost = simulate(of).cost
    assert cost.attention_flops == passes * attention_forward(shape, of.seqlen)
    # Every layer forward, again, and backward; head and embedding not again.
    assert cost.matmul_flops > 3.4 * linear_forward(shape, of.seqlen)


def test_layer_inputs_go_to_the_host_and_come_back_once() -> None:
    """Two layers of [tokens, 128] in bf16, each way; in tiles they come once for each head group, too."""
    inputs = 2 * 1_536 * 128 * 2
    cost = simulate(config({"name": "layerwise"})).cost
    assert (cost.host_out_bytes, cost.host_in_bytes) == (inputs, inputs)
    streamed = simulate(config({"name": "layerwise", "stream": True})).cost
    assert streamed.host_in_bytes > 2 * 8 * inputs  # head groups, in attention twice


def test_what_stands_for_others_counts_as_often() -> None:
    """Of tiles of 4, 4, 4 and 2 rows the second stands for two and a half of itself."""
    meter = Meter("lazy")
    x, product = torch.ones(4, 3), torch.ops.aten.mm.default
    for _ in Weighted([(0, 4), (4, 8)], [1, 2.5], meter):
        meter.observe(product, (x, x.T), {}, x @ x.T)
    assert meter.cost().matmul_flops == (1 + 2.5) * 2 * 4 * 4 * 3


def test_the_busiest_resource_bounds_a_step() -> None:
    """At the peaks of an H100: 989.4 TFLOP/s, 3.35 TB/s, 64 GB/s to the host, 450 GB/s to neighbours."""
    idle = dict.fromkeys(Cost.model_fields, 0.0)
    h100 = load_hardware("h100-80gb")
    for field, load, seconds in [
        ("matmul_flops", 989.4e12, 1.0),
        ("device_bytes", 6_700e9, 2.0),
        ("host_out_bytes", 32e9, 0.5),
        ("link_bytes", 450e9, 1.0),
    ]:
        assert least_seconds(Cost(**{**idle, field: load}), h100, 8) == seconds
    assert least_seconds(Cost(**{**idle, "link_bytes": 450e9}), h100, 16) == 9.0
