"""The attention seam against attention with an explicit mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alst_impl.ops.attention import attend

Documents = tuple[tuple[int, ...], ...] | None


def qkv(seqlen: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """Query, key and value, in fp64."""
    torch.manual_seed(1)
    shapes = [(batch, n, seqlen, 4) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masked(tensors: list[Tensor], window: int | None, documents: Documents) -> Tensor:
    """Textbook attention: scores, an S x S mask, softmax."""
    query, key, value = tensors
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    seqlen = query.shape[2]
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None]
    allowed = (j <= i).expand(query.shape[0], seqlen, seqlen)
    if window is not None:
        allowed = allowed & (i - j < window)
    if documents is not None:
        owner = [torch.arange(len(d)).repeat_interleave(torch.tensor(d)) for d in documents]
        allowed = allowed & torch.stack([o[:, None] == o[None] for o in owner])
    scores = (query @ key.transpose(2, 3) * 0.7).masked_fill(~allowed[:, None], -torch.inf)
    return scores.softmax(-1) @ value


DOCUMENTS = ((5, 1, 11), (17,))


@pytest.mark.parametrize("documents", [None, DOCUMENTS, ((1,) * 17, (8, 9))])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 16, 17, 18])
def test_attention_equals_the_explicit_mask(window: int | None, documents: Documents) -> None:
    """Output and gradients, with windows that divide the length, do not, or exceed it."""
    results = []
    for fn in (
        lambda x: attend(*x, scale=0.7, window=window, documents=documents),
        lambda x: masked(x, window, documents),
    ):
        tensors = qkv(17)
        out = fn(tensors)
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in tensors)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("position", [7, 8, 9, 15, 16])
def test_a_window_ends_where_it_says_at_the_edges_of_blocks(position: int) -> None:
    """With a window of 8, a token is seen by itself and the seven after it, and by no other."""
    query, key, value = (x.detach() for x in qkv(32))
    before = attend(query, key, value, scale=1, window=8)
    changed = value.clone()
    changed[:, :, position] += 1
    moved = (attend(query, key, changed, scale=1, window=8) != before).any(-1).any(1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(position, position + 8))


def test_nothing_leaks_between_packed_documents() -> None:
    """A changed token of document 1 moves nothing in document 2."""
    query, key, value = (x.detach() for x in qkv(17))
    documents = ((6, 11), (6, 11))
    before = attend(query, key, value, scale=1, documents=documents)
    for x in (query, key, value):
        x[:, :, 2] += 1
    after = attend(query, key, value, scale=1, documents=documents)
    assert torch.equal(after[:, :, 6:], before[:, :, 6:])
    assert not torch.equal(after[:, :, 2:6], before[:, :, 2:6])


@pytest.mark.parametrize("window", [None, 4])
def test_nothing_looks_ahead(window: int | None) -> None:
    """A changed token moves nothing before it."""
    query, key, value = (x.detach() for x in qkv(17))
    before = attend(query, key, value, scale=1, window=window)
    for x in (query, key, value):
        x[:, :, 9] += 1
    after = attend(query, key, value, scale=1, window=window)
    assert torch.equal(after[:, :, :9], before[:, :, :9])
    assert not torch.equal(after[:, :, 9:], before[:, :, 9:])
