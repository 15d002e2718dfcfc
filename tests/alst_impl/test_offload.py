"""Checkpointed layers with inputs offloaded to the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alst_impl.ops.memory import offload as offload_module
from alst_impl.ops.memory.offload import HostOffload, HostTiles, checkpoint
from alst_impl.ops.memory.parked import Parked
from alst_impl.placement import Placement, no_evidence


def placed() -> tuple[Placement, list[Tensor]]:
    """A placement, and the list of tensors that it is told to count as host memory."""
    on_host: list[Tensor] = []
    return Placement(torch.device("cpu"), on_host=on_host.append, evidence=no_evidence()), on_host


def layers() -> nn.ModuleList:
    """Three layers, in fp64."""
    torch.manual_seed(1)
    return nn.ModuleList(nn.Linear(5, 5, dtype=torch.float64) for _ in range(3))


def gradients(
    stack: nn.ModuleList, x: Tensor, offload: HostOffload | None, plain: bool
) -> list[Tensor]:
    """Output, input gradient (if any) and parameter gradients. Layers are checkpointed unless `plain`."""
    stack.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    value = x
    for layer in stack:
        run = nn.Sequential(layer, nn.Tanh())
        value = run(value) if plain else checkpoint(run, value, offload)
    value.square().sum().backward()
    found = [value.detach(), *([] if x.grad is None else [x.grad])]
    return found + [p.grad.clone() for p in stack.parameters() if p.grad is not None]


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("offloaded", [False, True])
def test_checkpointed_layers_have_the_gradients_of_plain_ones(
    offloaded: bool, frozen_input: bool
) -> None:
    """Equal to the bit, also behind frozen embeddings and in the second step."""
    stack = layers()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=not frozen_input)
    offload = HostOffload(placed()[0]) if offloaded else None
    expected = gradients(stack, x, None, plain=True)
    for _ in range(2):
        found = gradients(stack, x, offload, plain=False)
        assert len(found) == len(expected) == 8 - frozen_input
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_layer_input_goes_to_the_host_and_is_counted() -> None:
    """Three inputs of 2 x 3 x 5 doubles are reported one by one and counted in bytes."""
    placement, on_host = placed()
    gradients(
        layers(), torch.ones(2, 3, 5, dtype=torch.float64), HostOffload(placement), plain=False
    )
    assert [tuple(x.shape) for x in on_host] == [(2, 3, 5)] * 3
    assert placement.evidence["offloaded_bytes"] == 3 * 2 * 3 * 5 * 8


def test_the_device_copy_of_a_layer_input_is_free_until_backward() -> None:
    """Only the host copy exists after forward."""
    layer, offload = layers()[0], HostOffload(placed()[0])
    x = torch.ones(1, 3, 5, dtype=torch.float64).requires_grad_()
    inner = x * 2
    alive = weakref.ref(inner.untyped_storage())
    out = checkpoint(layer, inner, offload)
    del inner
    assert alive() is None
    out.sum().backward()
    assert x.grad is not None


class Spy(torch.autograd.Function):
    """An identity whose backward checks whether the recomputed output of its layer is still alive."""

    alive: list[bool]

    @staticmethod
    def forward(
        ctx: object, x: Tensor, outputs: list[weakref.ref[object]], seen: list[bool]
    ) -> Tensor:
        ctx.outputs, ctx.seen = outputs, seen
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(ctx.outputs[-1]() is not None)
        return grads[0], None, None


def spied(run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> list[bool]:
    """Whether the recomputed output is alive while backward runs through its layer."""
    outputs: list[weakref.ref[object]] = []
    seen: list[bool] = []

    def layer(x: Tensor) -> Tensor:
        out = Spy.apply(x, outputs, seen) + 1  # an addition saves nothing
        outputs.append(weakref.ref(out.untyped_storage()))
        return out

    x = torch.ones(2, 3, requires_grad=True)
    run(layer, x).sum().backward()
    assert len(outputs) == 2  # forward and recomputation
    return seen


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_recomputed_output_is_freed_before_the_layers_backward(offloaded: bool) -> None:
    """Backward needs only the graph, not the output."""
    offload = HostOffload(placed()[0]) if offloaded else None
    assert spied(lambda layer, x: checkpoint(layer, x, offload)) == [False]


def test_the_spy_sees_that_pytorchs_own_checkpoint_holds_the_output() -> None:
    """Otherwise the test above could not fail."""
    stock = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    assert spied(stock) == [True]


def test_evaluation_offloads_nothing() -> None:
    """Without gradients nothing is offloaded, because no backward follows."""
    layer, (placement, on_host) = layers()[0], placed()
    x = torch.ones(1, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(checkpoint(layer, x, HostOffload(placement)), layer(x))
    assert on_host == []


@pytest.mark.parametrize("eight_bits", [False, True])
def test_rows_on_the_host_are_read_in_any_order(eight_bits: bool) -> None:
    """Also those that were on their way to the device when others were asked for."""
    placement, _ = placed()
    x = torch.randn(2, 23, 5, dtype=torch.float64)
    parked = Parked(x, 6, HostOffload(placement), eight_bits=eight_bits)
    tiles = [slice(start, min(start + 6, 23)) for start in range(0, 23, 6)]
    for rows in [*tiles, tiles[0], tiles[2], tiles[1], *tiles]:
        found = parked.tile(rows)
        torch.testing.assert_close(found, x[:, rows], rtol=0.07 if eight_bits else 0, atol=1e-2)
    assert torch.equal(parked.whole()[:, tiles[1]], parked.tile(tiles[1]))


@pytest.mark.parametrize("tile_mib", [7, 32, 50, 80, 100, 300])
def test_tiles_fill_their_pinned_buffers(tile_mib: int) -> None:
    """Pinned buffers are rounded up to powers of two. With many tiles at most 15 % is lost."""
    placement, on_host = placed()
    with FakeTensorMode():
        HostTiles(HostOffload(placement), 1_000, 1, tile_mib * 2**20, torch.int8)
    taken = sum(1 << (x.numel() - 1).bit_length() for x in on_host)
    assert taken <= 1.15 * 1_000 * tile_mib * 2**20


@pytest.mark.parametrize("offloaded", [False, True])
def test_layers_may_take_and_return_several_tensors(offloaded: bool) -> None:
    """Gradients reach the input and a further argument, from every value that is used; others may be None or ids."""

    def run(x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return x * extra.sum(), x.square() + extra, torch.arange(3), None

    results = []
    for plain in (True, False):
        x, extra = torch.linspace(1, 2, 6).view(2, 3), torch.linspace(3, 4, 3)
        for tensor in (x, extra):
            tensor.requires_grad_()
        offload = HostOffload(placed()[0]) if offloaded else None
        first, second, *rest = run(x, extra) if plain else checkpoint(run, x, offload, more=[extra])
        (first.sum() + 2 * second.square().sum()).backward()
        assert rest[1] is None
        results.append([first.detach(), second.detach(), rest[0], x.grad, extra.grad])
    for ours, stock in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, stock)


def test_a_value_that_nobody_uses_gets_no_gradient() -> None:
    """Backward goes through the used value alone."""
    x, extra = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    used, _ = checkpoint(lambda x, e: (x * 2, e * 3), x, None, more=[extra])
    used.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
    assert extra.grad is None or not extra.grad.any()


def test_a_large_tensor_is_kept_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back as it was; the last piece is the remainder."""
    monkeypatch.setattr(offload_module, "PIECE_BYTES", 256)
    placement, on_host = placed()
    x, host = torch.randn(10, 15), HostOffload(placement)
    assert torch.equal(host.fetch(host.keep(x)).wait(), x)
    assert [piece.numel() for piece in on_host] == [64, 64, 22]


def test_a_piece_of_tiles_is_at_most_eight_times_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of these tiles would fill a power of two better than one does, but then a piece would be too large."""
    monkeypatch.setattr(offload_module, "PIECE_BYTES", 1024)
    placement, on_host = placed()
    HostTiles(HostOffload(placement), rows=18, size=1, width=448, dtype=torch.float32)
    assert [piece.numel() for piece in on_host] == [448] * 18
