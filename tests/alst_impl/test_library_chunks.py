"""A user's loop over the chunks of its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from small import LENGTH, batches, sgd, stock_gradients, stock_model, whole
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_same_gradients
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import alst_impl

if TYPE_CHECKING:
    from conftest import Ranks

CHUNKED: dict[str, Any] = {"method": "chunked", "sp": 2, "chunk": 4}
"""Three chunks of the 21 tokens, of which the last one is padded."""


def shards(model: Any) -> Any:
    """The model under fully_shard."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


ENGINES: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "fully_shard": shards,
}


def mine(alst: Any, data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """One sample of each batch for each group of ranks, or all if there is one group."""
    if alst.mesh["dp"].size() == 1:
        return data
    group = alst.mesh.get_local_rank("dp")
    return [{k: v[group : group + 1] for k, v in batch.items()} for batch in data]


def loop(rank: int, world_size: int, engine: str, options: dict[str, Any]) -> None:
    """Body of a rank: accumulated batches, whose losses add up, twice; then their loss without gradients."""
    data = batches()
    truth, stock = stock_gradients(stock_model(), data), stock_model()
    alst = alst_impl.enable(stock_model(), **options)
    model = ENGINES[engine](alst.model)
    inputs = mine(alst, data)
    count = alst.count(inputs)
    labels = int(count)
    loss = float(sum(stock(**batch, num_items_in_batch=labels).loss for batch in data))
    for _ in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for batch in inputs:
            for chunk in alst.chunks(model, batch, num_items=count):
                part = model(**chunk).loss
                part.backward()
                total += part.detach()
        if engine == "none":
            alst.reduce_gradients()
        found = {n: whole(p.grad) for n, p in alst.model.named_parameters() if p.grad is not None}
        assert_same_gradients(found, truth)
        assert alst.reduce_loss(total) == pytest.approx(loss)
        model.zero_grad()
        alst.forget()
    with torch.no_grad():
        parts = [
            model(**chunk).loss
            for batch in inputs
            for chunk in alst.chunks(model, batch, num_items=count)
        ]
    assert alst.reduce_loss(sum(parts)) == pytest.approx(loss)
    if options.get("method") == "chunked":
        assert not any(pages.pairs for pages in alst.model.chunked.pages), (
            "host memory is free again"
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_over_chunks_trains_as_the_stock_model(ranks: Ranks, engine: str) -> None:
    """Two groups of two ranks, three chunks a sample."""
    ranks(4)(loop, engine, CHUNKED)


@pytest.mark.parametrize("options", [{"sp": 2}, {**CHUNKED, "chunk": LENGTH}], ids=["alst", "one"])
def test_the_loop_is_that_of_samples_without_chunks(ranks: Ranks, options: dict[str, Any]) -> None:
    """For another method, and for samples that are shorter than a chunk."""
    ranks(2)(loop, "none", options)


def one_rank(rank: int, world_size: int) -> None:
    """Body of a rank: packed documents, dropout, and pages that stay on the device."""
    ids = batches()[0]["input_ids"][:1]
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    labels = ids.clone()
    labels[0, 9] = -100
    alst = alst_impl.enable(stock_model(), method="chunked", chunk=5, offload=False)
    for inputs in alst.chunks(
        alst.model, {"input_ids": ids, "labels": labels, "position_ids": positions}
    ):
        alst.model(**inputs).loss.backward()
    alst.reduce_gradients()
    stock = stock_model()
    stock.config._attn_implementation = "sdpa"
    count = int((labels[:, 1:] != -100).sum())
    for part in (slice(0, 9), slice(9, None)):
        batch = {"input_ids": ids[:, part], "labels": labels[:, part]}
        stock(**batch, num_items_in_batch=count).loss.backward()
    assert_same_gradients(
        {n: p.grad for n, p in alst.model.named_parameters()},
        {n: p.grad for n, p in stock.named_parameters()},
    )


def test_packed_documents_are_kept_apart(ranks: Ranks) -> None:
    """A document begins in the second chunk."""
    ranks(1)(one_rank)


def step_inside(rank: int, world_size: int) -> None:
    """Body of a rank: the optimizer steps in the loop, after the only chunk."""
    alst = alst_impl.enable(stock_model(), sp=2)
    optimizer = sgd(alst.model)
    for inputs in alst.chunks(alst.model, batches()[0]):
        alst.model(**inputs).loss.backward()
        alst.reduce_gradients()
        optimizer.step()


def test_the_optimizer_may_step_after_the_last_chunk(ranks: Ranks) -> None:
    """A loop of one chunk looks like one over samples."""
    ranks(2)(step_inside)


def unequal(rank: int, world_size: int) -> None:
    """Body of a rank: the sample of one group is shorter than a chunk, and that of the other has three."""
    batch = {name: x[:1] for name, x in batches()[0].items()}
    data = [batch, {name: x[:, :7] for name, x in batch.items()}]
    alst = alst_impl.enable(stock_model(), **CHUNKED)
    model = shards(alst.model)
    mine = data[alst.mesh.get_local_rank("dp")]
    for inputs in alst.chunks(model, mine):
        model(**inputs).loss.backward()
    found = {n: whole(p.grad) for n, p in alst.model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, stock_gradients(stock_model(), data))


def test_groups_with_samples_of_different_lengths_have_as_many_chunks(ranks: Ranks) -> None:
    """Otherwise ranks would wait for each other in an engine's collectives."""
    ranks(4)(unequal)


# -- mistakes -------------------------------------------------------------------------------------


def no_backward(alst: Any) -> None:
    """Losses are added up for one backward, which would run the first chunk first."""
    total = sum(alst.model(**inputs).loss for inputs in alst.chunks(alst.model, batches()[0]))
    total.backward()


def one_chunk(alst: Any) -> None:
    """The loop ends after the first chunk."""
    optimizer = sgd(alst.model)
    for inputs in alst.chunks(alst.model, batches()[0]):
        alst.model(**inputs).loss.backward()
        break
    optimizer.step()


def shard(alst: Any) -> None:
    """All chunks at once."""
    alst.shard(batches()[0])


def deepspeed(alst: Any) -> None:
    """Its engine would update after the first chunk."""
    weight = alst.model.lm_head.weight
    weight.ds_id = 0  # as ZeRO marks parameters
    try:
        next(alst.chunks(alst.model, batches()[0]))
    finally:
        del weight.ds_id


MISTAKES = {
    "no-backward": (no_backward, "0 backward passes ran for chunks up to 1"),
    "one-chunk": (one_chunk, "hold 0 labels"),
    "shard": (shard, r"cuts samples of 21 tokens into 3 chunks.*alst\.chunks\(model, batch\)"),
    "deepspeed": (deepspeed, "DeepSpeed counts backward passes"),
}


def refused(rank: int, world_size: int) -> None:
    """Body of a rank: all ranks refuse each mistake."""
    for mistake, says in MISTAKES.values():
        alst = alst_impl.enable(stock_model(), **CHUNKED)
        with pytest.raises(ValueError, match=says):
            mistake(alst)
        dist.barrier()


def test_mistakes_of_a_loop_are_refused(ranks: Ranks) -> None:
    """Each of them would train on other gradients, or leave ranks waiting."""
    ranks(4)(refused)


def router_loss(rank: int, world_size: int) -> None:
    """Body of a rank."""
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        output_router_logits=True,
    )
    with pytest.raises(ValueError, match="router loss"):
        alst_impl.enable(Qwen3MoeForCausalLM(config), method="chunked", chunk=4)


def test_a_router_loss_is_refused(ranks: Ranks) -> None:
    """It is not a sum over chunks."""
    ranks(1)(router_loss)
