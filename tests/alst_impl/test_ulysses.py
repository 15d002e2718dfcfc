"""The exchange between sequence and head shards, and attention through it, on real ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from cores import attend
from torch import Tensor

from alst_impl.layout import Layout, make_mesh
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.ulysses import (
    UlyssesAttention,
    heads_to_sequence,
    replicate_kv_heads,
    sequence_to_heads,
)
from alst_impl.ops.attention.variant import Variant
from alst_impl.placement import no_evidence

if TYPE_CHECKING:
    from conftest import Ranks

BATCH, HEADS, SEQLEN, DIM = 2, 8, 12, 4


def whole(heads: int, seed: int) -> Tensor:
    """A tensor [B, heads, S, D], equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, heads, SEQLEN, DIM, generator=generator, dtype=torch.float64)


def of_sequence(x: Tensor, rank: int, degree: int) -> Tensor:
    """This rank's slice of the sequence, with gradients enabled."""
    return x.chunk(degree, dim=2)[rank].detach().clone().requires_grad_()


def exchange_there_and_back(rank: int, degree: int) -> None:
    """Body of a rank."""
    group = dist.group.WORLD
    assert group is not None
    x, upstream = whole(HEADS, 1), whole(HEADS, 2)
    local = of_sequence(x, rank, degree)
    by_heads = sequence_to_heads(local, group)
    assert torch.equal(by_heads, x.chunk(degree, dim=1)[rank])
    back = heads_to_sequence(by_heads, group)
    assert torch.equal(back, local)
    # The gradient of (x sharded by heads) * upstream is upstream, sharded by sequence.
    (by_heads * upstream.chunk(degree, dim=1)[rank]).sum().backward()
    assert local.grad is not None
    assert torch.equal(local.grad, upstream.chunk(degree, dim=2)[rank])
    # The same in the other direction.
    mine = x.chunk(degree, dim=1)[rank].detach().clone().requires_grad_()
    (heads_to_sequence(mine, group) * upstream.chunk(degree, dim=2)[rank]).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, upstream.chunk(degree, dim=1)[rank])


@pytest.mark.parametrize("degree", [2, 4])
def test_the_exchange_and_its_gradient_move_every_element_to_its_place(
    ranks: Ranks, degree: int
) -> None:
    """Forward and backward are exact to the bit in both directions."""
    ranks(degree)(exchange_there_and_back)


def attention_over_ranks(
    rank: int, degree: int, settings: list[tuple[int, int | None, bool]]
) -> None:
    """Body of a rank: output and gradients of each setting equal those of attention over the full sequence."""
    mesh = make_mesh([Layout(SEQLEN, sp=degree)], "cpu")
    for num_kv_heads, window, packed in settings:
        documents = ((5, 7), (12,)) if packed else None
        tensors = [whole(HEADS, 1), whole(num_kv_heads, 2), whole(num_kv_heads, 3)]
        upstream = whole(HEADS, 4)
        full = [x.clone().requires_grad_() for x in tensors]
        expected = attend(*full, documents=documents, scale=0.3, window=window)
        (expected * upstream).sum().backward()

        evidence = no_evidence()
        attention = UlyssesAttention(load_core("sdpa"), evidence, degree)
        layout = Layout(SEQLEN, sp=degree, documents=documents, mesh=mesh)
        local = [of_sequence(x, rank, degree) for x in tensors]
        out = attention(*local, layout=layout, variant=Variant(0.3, window))
        (out * upstream.chunk(degree, dim=2)[rank]).sum().backward()
        torch.testing.assert_close(out, expected.chunk(degree, dim=2)[rank], rtol=1e-12, atol=1e-12)
        for ours, truth in zip(local, full, strict=True):
            assert ours.grad is not None
            assert truth.grad is not None
            torch.testing.assert_close(
                ours.grad, truth.grad.chunk(degree, dim=2)[rank], rtol=1e-12, atol=1e-12
            )
        assert evidence["exchanges"] == 4


@pytest.mark.parametrize("degree", [2, 4])
def test_attention_over_ranks_equals_attention_over_the_whole_sequence(
    ranks: Ranks, degree: int
) -> None:
    """For 8, 4, 2 and 1 kv heads, with a window and with packed documents across ranks."""
    kinds = [(kv, None, False) for kv in (8, 4, 2, 1)] + [
        (2, 4, False),
        (4, None, True),
        (1, 3, True),
    ]
    ranks(degree)(attention_over_ranks, kinds)


def test_without_a_group_attention_is_plain() -> None:
    """At sp 1 there is no exchange."""
    evidence = no_evidence()
    q, k, v = whole(HEADS, 1), whole(2, 2), whole(2, 3)
    out = UlyssesAttention(load_core("sdpa"), evidence)(q, k, v, layout=None, variant=Variant(0.5))
    assert torch.equal(out, attend(q, k, v, scale=0.5))
    assert evidence["exchanges"] == 0


def test_a_call_without_its_layout_is_refused_if_ranks_share_samples() -> None:
    """Each rank would attend to its own tokens only."""
    attention = UlyssesAttention(load_core("sdpa"), no_evidence(), shards=2)
    q, k, v = whole(HEADS, 1), whole(2, 2), whole(2, 3)
    for layout in (None, Layout(SEQLEN, documents=((5, 7), (12,))), Layout(SEQLEN, sp=4)):
        with pytest.raises(ValueError, match=r"2 ranks share each sample.*: shard it"):
            attention(q, k, v, layout=layout, variant=Variant(0.5))


@pytest.mark.parametrize(
    ("num_kv_heads", "degree", "expected"),
    [
        (8, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [0, 0, 1, 1]),
        (1, 4, [0, 0, 0, 0]),
        (2, 1, [0, 1]),
        (6, 4, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ],
)
def test_copies_of_a_kv_head_follow_it(num_kv_heads: int, degree: int, expected: list[int]) -> None:
    """Each rank's query heads get the kv head that they belong to."""
    x = torch.arange(num_kv_heads, dtype=torch.float64).view(1, -1, 1, 1).expand(2, -1, 3, 4)
    copies = replicate_kv_heads(x, degree)
    assert copies[0, :, 0, 0].tolist() == expected
    assert copies.shape == (2, len(expected), 3, 4)


def test_the_gradient_of_a_replicated_head_is_the_sum_over_its_copies() -> None:
    """Each copy serves different query heads."""
    x = torch.ones(1, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)
    (replicate_kv_heads(x, 4) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0, 0].tolist() == [11, 1100]
