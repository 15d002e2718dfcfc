"""Counted work of a step on a phantom device, exact to the last product."""

from __future__ import annotations

from typing import Any

import pytest
from phantoms import NEEDED, cell, estimated

from alst_impl.models import published
from harness.cells.cell import Cell
from harness.cells.prediction import Cost
from harness.formulas.flops import attention_forward, linear_forward, shape_of
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


def costs(*asked: Cell) -> list[Cost]:
    """The counted work of a step of each."""
    found = [prediction.cost for prediction in estimated(*asked) if prediction.cost]
    assert len(found) == len(asked)
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
    (found,) = costs(asked)
    part = 15 / 64 if method["name"] == "ring" else 1 / train.world_size
    expected = part * passes * attention_forward(shape, [train.seqlen])
    assert found.attention_flops == pytest.approx(expected, rel=1e-2)
    # Every layer has forward, recomputation and backward; head and embedding have no recomputation.
    assert found.matmul_flops > 3.4 * linear_forward(shape, train.seqlen) / train.world_size


def test_layer_inputs_go_to_the_host_once_and_come_back_by_tile() -> None:
    """Two inputs of [tokens, 128] in bf16. They come back for their norm, for what follows attention, and for what
    precedes it; with streaming once per head group.
    """
    inputs = 2 * 1_536 * 128 * 2
    found, streamed = costs(of({"name": "layerwise"}), of({"name": "layerwise", "stream": True}))
    assert found.host_out_bytes == inputs
    # Token ids, labels and positions are copied, too.
    assert 3 * inputs <= found.host_in_bytes <= 3 * inputs + 4 * 8 * 1_536
    assert streamed.host_in_bytes > 2 * 8 * inputs  # per head group, twice in attention


def test_products_with_experts_are_those_of_the_routed_tokens() -> None:
    """Per token, a layer meets 2 of 4 experts, each with three matrices [32, 128]; forward, again, backward twice.

    The rest of the model is the same with one expert per token, so that the difference is that of one expert.
    """
    tokens, layers = 1_536, 2
    cells = [
        cell(
            model="tiny-qwen3-moe",
            method="baseline",
            seqlen=tokens,
            overrides={"num_experts_per_tok": routed, "num_hidden_layers": layers},
        )
        for routed in (1, 2)
    ]
    one, two = (cost.matmul_flops for cost in costs(*cells))
    fields = published("tiny-qwen3-moe", {})
    expert = 3 * fields["hidden_size"] * fields["moe_intermediate_size"]
    assert two - one == 4 * layers * tokens * 2 * expert


def test_all_other_operators_are_counted_by_their_bytes_and_collectives_by_their_nodes() -> None:
    """Every token moves the same bytes, beside those of the parameters, in the same operators. Eight ranks are one
    node; sixteen are two.
    """
    longer = [of({"name": "baseline"}, n) for n in (1_024, 2_048, 4_096)]
    wider = [of({"name": "ring", "cp": ranks}) for ranks in (8, 16)]
    near, middle, far, within, across = costs(*longer, *wider)
    more = middle.pointwise_bytes - near.pointwise_bytes
    assert far.pointwise_bytes - middle.pointwise_bytes == 2 * more > 0
    assert near.launches == middle.launches == far.launches > 100
    assert within.network_bytes == 0
    assert within.link_bytes > 0
    assert across.network_bytes == across.link_bytes > 0
