"""Attention over slices equals attention over the full sequence, including gradients."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from cores import attend
from torch import Tensor
from torch.utils.checkpoint import checkpoint as stock_checkpoint

from alst_impl.layout import Layout, Part
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.memory.offload import checkpoint
from alst_impl.ops.pipeline.schedule import seq1f1b
from alst_impl.ops.pipeline.sliced import SliceAttention, sliced_attention

BORDERS = [0, 9, 10, 23]
SCALE = 0.3
Documents = tuple[tuple[int, ...], ...] | None


def tensors(num_kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of 23 tokens of two samples, four query heads."""
    torch.manual_seed(0)
    heads = (4, num_kv_heads, num_kv_heads)
    return [torch.randn(2, h, BORDERS[-1], 8, dtype=dtype, requires_grad=True) for h in heads]


def upstream() -> Tensor:
    """A gradient of the output."""
    return torch.linspace(-1, 2, 2 * 4 * 23 * 8, dtype=torch.float64).view(2, 4, 23, 8)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [None, ((9, 14), (23,)), ((4, 6, 13), (1, 8, 14))])
def test_slices_give_the_output_and_the_gradients_of_the_whole(
    num_kv_heads: int, documents: Documents
) -> None:
    """Also with documents that begin and end inside slices."""
    whole = tensors(num_kv_heads)
    expected = attend(*whole, scale=SCALE, documents=documents)
    truth = torch.autograd.grad(expected, whole, upstream())
    slices = [[x[:, :, a:b] for x in whole] for a, b in pairwise(BORDERS)]
    out = torch.cat(
        [
            sliced_attention(
                q, k, v, [(k, v) for _, k, v in slices[:i]], scale=SCALE, documents=documents
            )
            for i, (q, k, v) in enumerate(slices)
        ],
        dim=2,
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, grad in zip(torch.autograd.grad(out, whole, upstream()), truth, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-12, atol=1e-12)


def test_parts_merge_in_fp32() -> None:
    """The bf16 error with slices is that of bf16 itself."""
    exact = tensors(2)
    rounded = [x.detach().bfloat16() for x in exact]
    truth = attend(*(x.double() for x in rounded), scale=SCALE)
    q, k, v = rounded
    last = sliced_attention(
        q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], [(k[:, :, :10], v[:, :, :10])], scale=SCALE
    )
    whole = attend(q, k, v, scale=SCALE)[:, :, 10:]
    error = (last.double() - truth[:, :, 10:]).norm()
    assert error <= 2 * (whole.double() - truth[:, :, 10:]).norm()


class Layer(torch.nn.Module):
    """Projections and attention over slices."""

    def __init__(self, attention: SliceAttention) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv = torch.nn.Linear(32, 64, dtype=torch.float64)
        self.attention = attention
        self.calls = 0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Four query heads, two kv heads."""
        q, k, v = self.qkv(x).unflatten(-1, (8, 8)).transpose(1, 2).split([4, 2, 2], dim=1)
        return q, k, v

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        self.calls += 1
        out = self.attention(*self.project(x), layout=layout, variant=Variant(SCALE))
        return out.transpose(1, 2).flatten(2)


def run_plain(layer: Layer, x: Tensor, layout: Layout) -> Tensor:
    """Without recomputation."""
    out: Tensor = layer(x, layout)
    return out


def run_stock(layer: Layer, x: Tensor, layout: Layout) -> Tensor:
    """Recomputed by PyTorch's checkpointing, which keeps the graph of the first forward."""
    out: Tensor = stock_checkpoint(layer, x, layout, use_reentrant=False)
    return out


def run_ours(layer: Layer, x: Tensor, layout: Layout) -> Tensor:
    """Recomputed by our checkpointing, which runs the first forward without a graph."""
    return checkpoint(partial(layer, layout=layout), x)


@pytest.mark.parametrize("run", [run_plain, run_stock, run_ours])
def test_gradients_of_keys_come_back_from_later_slices(run: Any) -> None:
    """In pipeline order over two micro-batches, with and without recomputation."""
    parts = len(BORDERS) - 1
    layer = Layer(SliceAttention(load_core("sdpa")))
    inputs = [torch.randn(2, 23, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grad = torch.randn(2, 23, 32, dtype=torch.float64)
    expected = [attend(*layer.project(x), scale=SCALE).transpose(1, 2).flatten(2) for x in inputs]
    parameters = list(layer.parameters())
    truth = torch.autograd.grad(expected, [*inputs, *parameters], [grad, grad])

    slices = [
        [x.detach()[:, a:b].clone().requires_grad_() for a, b in pairwise(BORDERS)] for x in inputs
    ]
    live: dict[tuple[int, int], Tensor] = {}
    for backward, micro_batch, part in seq1f1b(2, 2, parts, 0):
        layout = Layout(23, part=Part(micro_batch, part, parts))
        if backward:
            own = grad[:, BORDERS[part] : BORDERS[part + 1]]
            torch.autograd.backward(live.pop((micro_batch, part)), own)
            layer.attention.forget(Part(micro_batch, part, parts))
        else:
            live[micro_batch, part] = run(layer, slices[micro_batch][part], layout)
    ours = [torch.cat([_grad(s) for s in sample], dim=1) for sample in slices]
    ours += [_grad(p) for p in parameters]
    for mine, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    assert layer.calls == 2 * parts * (1 if run is run_plain else 2)
    assert not layer.attention._kept


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def test_a_short_window_is_refused() -> None:
    """The error gives a fix."""
    attention = SliceAttention(load_core("sdpa"))
    q, k, v = tensors(2)
    with pytest.raises(ValueError, match=r"a sliding window \(8\) .*use slices: 1"):
        attention(q, k, v, layout=Layout(46, part=Part(0, 0, 2)), variant=Variant(SCALE, 8))
