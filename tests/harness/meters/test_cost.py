"""Counted work of a step on a phantom device, exact to the last product."""

from __future__ import annotations

from typing import Any

import pytest
from phantoms import NEEDED, cell, predicted

from alst_impl.models import published
from harness.cells.cell import Cell
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Cost
from harness.formulas.flops import attention_forward, linear_forward, shape_of
from harness.formulas.roofline import least_seconds
from harness.predict.depth import structure

pytestmark = NEEDED


def of(method: dict[str, Any], seqlen: int = 1_536, **overrides: Any) -> Cell:
    """A cell with a narrow Llama, on as many GPUs as share a sample."""
    return cell(
        method=method,
        seqlen=seqlen,
        world_size=method.get("sp", 1) * method.get("cp", 1),
        overrides=overrides,
    )


def cost(asked: Cell) -> Cost:
    """The counted work of a step."""
    found = predicted(asked).cost
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"name": "baseline"}, 4.5),
        ({"name": "alst", "sp": 2, "tiles": 5}, 4.5),
        ({"name": "ring", "cp": 8, "placement": "contiguous", "tiles": 5}, 4.5),
        ({"name": "layerwise", "groups": 2}, 4.5),
        ({"name": "layerwise", "keep_attention": True}, 3.5),
        ({"name": "layerwise", "every": 2, "rows": 800}, 5.0),
    ],
    ids=["baseline", "alst", "ring", "layerwise", "attention kept", "inputs made again"],
)
def test_attention_runs_forward_again_unless_it_is_kept(
    method: dict[str, Any], passes: float
) -> None:
    """In units of one causal forward pass: 1 forward, 1 recomputed, 2.5 backward. Work of eight
    layers is extrapolated from two and four.

    With one kept input per two layers, the first layer runs once more. The last rank of a
    contiguous ring of 8 sees all keys before its own: 15 of 64 parts of the pairs.
    """
    asked = of(method, num_hidden_layers=8)
    train = asked.train
    shape = shape_of(published(train.model, train.overrides), structure(train).num_parameters)
    found = cost(asked)
    part = 15 / 64 if method["name"] == "ring" else 1 / train.world_size
    expected = part * passes * attention_forward(shape, train.seqlen)
    assert found.attention_flops == pytest.approx(expected, rel=1e-2)
    # Every layer has forward, recomputation and backward; head and embedding have no recomputation.
    assert found.matmul_flops > 3.4 * linear_forward(shape, train.seqlen) / train.world_size


def test_layer_inputs_go_to_the_host_and_come_back_once() -> None:
    """Two inputs of [tokens, 128] in bf16 are copied each way. With streaming, they also come back
    once per head group.
    """
    inputs = 2 * 1_536 * 128 * 2
    found = cost(of({"name": "layerwise"}))
    assert found.host_out_bytes == inputs
    # Token ids, labels and positions are copied, too.
    assert inputs <= found.host_in_bytes <= inputs + 4 * 8 * 1_536
    streamed = cost(of({"name": "layerwise", "stream": True}))
    assert streamed.host_in_bytes > 2 * 8 * inputs  # per head group, twice in attention


def test_the_busiest_resource_bounds_a_step() -> None:
    """The peaks are those of an H100: 989.4 TFLOP/s, 3.35 TB/s, 64 GB/s to the host, 450 GB/s to neighbours."""
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
