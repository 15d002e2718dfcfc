"""One sequence in chunks trains as the stock model does, and takes the memory of one chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import (
    assert_same_gradients,
    assert_trains_as,
    config_of,
    corpus_of,
    run_steps,
    truth_of,
)

from alst_impl import step
from alst_impl.config import TrainConfig
from alst_impl.data import Batch
from alst_impl.layout import IGNORE_INDEX, Layout, Part, make_mesh
from alst_impl.methods.base import check_method, layouts, load_method
from alst_impl.methods.chunked import Chunked, chunks
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.pages import PagedAttention, Pages
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.memory.offload import HostOffload
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from conftest import Ranks


def test_chunks_hold_every_token_once() -> None:
    """They are as long as each other, no longer than asked for, and the last one is not padding alone."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        check_chunks(
            int(draw.integers(1, 300)), int(draw.integers(1, 6)), int(draw.choice([5, 16, 300]))
        )


def check_chunks(length: int, sp: int, chunk: int) -> None:
    layout = Chunked(sp=sp, chunk=chunk).layout(length)
    size = layout.chunk if layout.passes > 1 else layout.padded
    places = torch.cat([layout.positions(shard) for shard in range(sp)])
    assert sorted(places.tolist()) == list(range(layout.padded))
    assert layout.padded - size < length <= layout.padded
    assert layout.passes == 1 or size <= chunk * sp
    ids = torch.arange(length)[None]
    batch = Batch(ids, ids, ids, Layout(length))
    shards = [layout.cut(batch, shard) for shard in range(sp)]
    assert torch.equal(layout.whole([shard.input_ids for shard in shards]), ids)
    # The first chunks of all ranks are the first tokens of the sample.
    first = torch.cat([chunks(shard)[0].position_ids for shard in shards], dim=1)
    assert torch.equal(first[0], torch.arange(size))


def test_padding_has_no_label() -> None:
    """A loss never counts a token that is not there."""
    layout = Chunked(chunk=4).layout(10)
    ids = torch.ones(1, 10, dtype=torch.int64)
    cut = layout.cut(Batch(ids, ids, ids, Layout(10)))
    assert cut.shift_labels[0].tolist() == [1] * 10 + [IGNORE_INDEX] * 2


def dense(query: Tensor, key: Tensor, value: Tensor, variant: Variant, documents: Any) -> Tensor:
    """Attention by its definition."""
    seqlen, heads = query.shape[2], query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    place = torch.arange(seqlen)
    distance = place[:, None] - place[None, :]
    visible = (distance >= 0) & (distance < (variant.window or seqlen))
    if documents:
        of = torch.repeat_interleave(torch.arange(len(documents[0])), torch.tensor(documents[0]))
        visible &= of[:, None] == of[None, :]
    scores = (query @ key.mT * variant.scale).masked_fill(~visible, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


def in_chunks(
    query: Tensor, key: Tensor, value: Tensor, variant: Variant, layout: Layout, offload: bool
) -> list[Tensor]:
    """Gradients of query, key and value under the gradient 1, 2, 3 ... of the output, chunk by chunk."""
    placement = Placement(torch.device("cpu"))
    attention = PagedAttention(
        load_core("sdpa"), Pages(HostOffload(placement) if offload else None)
    )

    def attend(index: int) -> Tensor:
        at = slice(index * layout.chunk, (index + 1) * layout.chunk)
        part = replace(layout, part=Part(0, index, layout.passes))
        q, k, v = (x[:, :, at] for x in (query, key, value))
        return attention(q, k, v, layout=part, variant=variant)

    attention.pages.leaving = True
    with torch.no_grad():
        for index in range(layout.passes - 1):
            attend(index)
    attention.pages.leaving = False
    found = []
    for index in reversed(range(layout.passes)):
        out = attend(index)
        start = index * layout.chunk
        weights = torch.arange(start, start + out.shape[2], dtype=out.dtype)[:, None]
        (out * weights).sum().backward()
        found.append(out.detach())
    assert not attention.pages.pairs
    assert not attention.pages.totals
    return found[::-1]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 20])
@pytest.mark.parametrize("documents", [None, ((9, 30, 1, 8),)])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_chunks_is_attention(
    offload: bool, window: int | None, documents: Any, sinks: bool
) -> None:
    """Outputs and all gradients equal those of the definition, and no page is left."""
    torch.manual_seed(0)
    layout = Layout(48, passes=6, documents=documents)
    given_ = [torch.randn(1, heads, 48, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    score = torch.randn(4, dtype=torch.float64)
    results = []
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in (*given_, score)]
        variant = Variant(0.4, window=window, sinks=leaves[3] if sinks else None)
        if chunked:
            out = torch.cat(in_chunks(*leaves[:3], variant, layout, offload), dim=2)
        else:
            out = dense(*leaves[:3], variant, documents)
            (out * torch.arange(48, dtype=out.dtype)[:, None]).sum().backward()
        gradients = [x.grad for x in (leaves if sinks else leaves[:3])]
        results.append([out.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_chunks_of_the_model_end_in_every_sample() -> None:
    """Also where there are more samples than dims of a head."""
    torch.manual_seed(0)
    shapes = [(3, heads, 48, 2) for heads in (4, 2, 2)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = in_chunks(*leaves, Variant(0.4, chunk=10), Layout(48, passes=6), offload=False)
    expected = dense(*leaves, Variant(0.4), ((10, 10, 10, 10, 8),))
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "settings",
    [
        # Two samples one after another: pages of the first must not reach the second.
        {"method": {"name": "chunked", "chunk": 16}, "data": {"documents": 3}, "batch_size": 1},
        {"method": {"name": "chunked", "sp": 2, "chunk": 8, "tiles": 3}, "data": {"mask": "rank"}},
        {"method": {"name": "chunked", "chunk": 23, "offload": False}, "checkpoint": False},
    ],
)
@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-12)])
def test_every_gradient_is_that_of_the_stock_model(
    ranks: Ranks, settings: dict[str, Any], engine: str, dtype: str, exact: float
) -> None:
    """In fp64, with accumulation over micro-batches of unequal numbers of labels."""
    config = config_of(**settings, engine=engine, dtype=dtype, world_size=2, accumulation=2)
    run, truth = ranks(2)(run_steps, config, 2)[0], truth_of(config, 2)
    assert_same_gradients(run.gradients, truth.gradients, exact, exact)
    assert_trains_as(run, truth)
    assert run.evidence["slices"] == 2 * 2 * load_method(config.method).layout(67).passes


def trained_after_others(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    """Gradients of the first step after an evaluation of the second step's samples."""
    mesh, placement = make_mesh(layouts(config), "cpu"), Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)

    def batches(number: int) -> list[Batch]:
        corpus = corpus_of(config)
        return step.micro_batches(config, corpus, method, mesh, number, placement.device)

    step.evaluate(method, runtime, batches(1))
    step.accumulate_gradients(method, runtime, batches(0))
    return {name: gradient.clone() for name, gradient in runtime.gradients().items()}


def test_a_step_sees_no_page_of_an_evaluation(ranks: Ranks) -> None:
    """An evaluation runs no backward, in which a chunk's page is dropped."""
    config = config_of(method={"name": "chunked", "chunk": 16})
    gradients = ranks(1)(trained_after_others, config)[0]
    assert_same_gradients(gradients, truth_of(config).gradients)


@pytest.mark.parametrize("family", ["diffllama", "hrm_text"])
def test_attention_that_runs_several_times_in_a_pass_is_refused(ranks: Ranks, family: str) -> None:
    """Its keys would be taken for those of the chunk's first call."""
    model = str(Path(__file__).parents[1] / "families" / f"{family}.json")
    config = config_of(model=model, method={"name": "chunked", "chunk": 16}, overrides={})
    with pytest.raises(AssertionError, match=r"several times in a pass.*; use method 'alst'"):
        ranks(1)(run_steps, config)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            {"chunk": 68},
            {},
            r"chunk \(68\) is more than the 67 of 67 tokens .*; use a chunk up to 67",
        ),
        ({"chunk": 40, "sp": 2}, {"world_size": 2}, r"chunk \(40\) .*; use a chunk up to 33"),
        ({"chunk": 9}, {"attention": "flex"}, "'chunked' calls PyTorch's flash operators"),
        (
            {"chunk": 9},
            {"engine": {"name": "plain", "update_in_backward": True}},
            "8 chunks accumulate .*; use update_in_backward: false",
        ),
        (
            {"chunk": 9},
            {"model": "tiny-gemma3", "overrides": {"attn_logit_softcapping": 30.0}},
            "soft-capped attention logits .*; use method 'alst'",
        ),
        ({"chunk": 67}, {"checkpoint": False}, "set offload: false"),
    ],
)
def test_what_chunks_cannot_do_is_refused(
    method: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    """In one line with a way out, before anything runs."""
    with pytest.raises(ValueError, match=message):
        check_method(config_of(method={"name": "chunked", **method}, **settings))
