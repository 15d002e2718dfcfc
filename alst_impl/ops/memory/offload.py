"""Activation checkpointing whose saved layer inputs wait on the host.

Source: ALST (arXiv:2506.13996, section 3.3). On a device with streams, copies run beside compute and
a small input is fetched one layer before backward needs it; elsewhere they are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alst_impl.ops.memory.recompute import FirstRun
from alst_impl.placement import Placement

PIECE_BYTES = 2**27
"""A layer input lies on the host in pieces: PyTorch rounds each pinned allocation up to a power of
two (ATen/core/CachingHostAllocator.h), which in one piece could cost as much again."""
FILLED = 0.95
"""Share of a power of two that is filled well enough."""
PREFETCH_BYTES = 2**29
"""Larger inputs are not fetched ahead: room for a second one is dear, and the copy a small part of
what attention takes at such lengths."""


class OnHost:
    """One tensor on its way to the host and back."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        self.nbytes = x.numel() * x.element_size()
        self.before: OnHost | None = None
        self.host: list[Tensor] | None = None
        self.fetched: Tensor | None = None
        self.event: Any = None


class HostOffload:
    """Moves layer inputs between `placement.device` and `placement.host`."""

    def __init__(self, placement: Placement, *, overlap: bool = True) -> None:
        """`overlap` copies beside compute, through pinned memory, and fetches ahead; else copies block."""
        self._placement = placement
        self._apart = overlap and placement.device.type != placement.host.type
        self._streams = overlap and placement.device.type == "cuda"
        self._side = torch.cuda.Stream(placement.device) if self._streams else None
        self._last: OnHost | None = None

    def store(self, x: Tensor) -> OnHost:
        """Begin copying `x` to the host; the caller may drop `x` at once. Backward loads in reverse."""
        parked = OnHost(x)
        parked.before, self._last = self._last, parked
        parked.host = [self.room(piece.shape, piece.dtype) for piece in _pieces(x)]
        if self._side is None:
            self._copy(parked.host, _pieces(x))
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._copy(parked.host, _pieces(x))
                x.record_stream(self._side)
        return parked

    def settle(self) -> None:
        """What was to be copied may be overwritten from here on."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def put(self, x: Tensor, into: Tensor) -> None:
        """Begin copying `x` to `into`, which `room` gave; the caller may drop `x` at once."""
        x = x.contiguous()
        if self._side is None:
            self._copy([into], [x])
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._copy([into], [x])
            x.record_stream(self._side)

    def get(self, host: Tensor) -> Tensor:
        """A copy on the device of what `put` left."""
        self.settle()
        x = torch.empty(host.shape, dtype=host.dtype, device=self._placement.device)
        self._copy([x], [host])
        return x

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory to `put` something into."""
        placement = self._placement
        host = torch.empty(shape, dtype=dtype, device=placement.host, pin_memory=self._streams)
        placement.on_host(host)
        placement.evidence.offloaded_bytes += host.numel() * host.element_size()
        return host

    def _copy(self, into: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        for target, piece in zip(into, pieces, strict=True):
            target.copy_(piece, non_blocking=self._streams)

    def load(self, parked: OnHost) -> Tensor:
        """The input back on the device. A small one starts fetching what backward needs next."""
        self._fetch(parked)
        x, parked.fetched = parked.fetched, None
        assert x is not None
        if self._side is not None:
            torch.cuda.current_stream().wait_event(parked.event)
            x.record_stream(torch.cuda.current_stream())
        before = parked.before
        if before is not None and self._apart and before.nbytes <= PREFETCH_BYTES:
            self._fetch(before)
        self._last = before  # backward walks the chain: the next forward starts a new one
        parked.before = None
        return x

    def _fetch(self, parked: OnHost) -> None:
        if parked.fetched is not None:
            return
        host, parked.host = parked.host, None
        assert host is not None, "a layer input is fetched once"
        if self._side is None:
            parked.fetched = self._fetched(parked, host)
            return
        with torch.cuda.stream(self._side):
            parked.fetched = self._fetched(parked, host)
            parked.event = self._side.record_event()

    def _fetched(self, parked: OnHost, host: list[Tensor]) -> Tensor:
        x = torch.empty(parked.shape, dtype=parked.dtype, device=self._placement.device)
        self._copy(_pieces(x), host)
        return x


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """`x` flat, in order, in views of `PIECE_BYTES` and a rest; small ones whole, in their shape."""
    size = PIECE_BYTES // x.element_size()
    return (x,) if x.numel() <= size else x.contiguous().view(-1).split(size)


class HostTiles:
    """Rows of `width` elements on the host, `size` of them at a time, in pieces as of `HostOffload`."""

    def __init__(
        self, offload: HostOffload, rows: int, size: int, width: int, dtype: torch.dtype
    ) -> None:
        self._offload, self._width = offload, width
        self._rows_of_piece = _tiles_of_piece(size * width * dtype.itemsize) * size
        starts = range(0, rows, self._rows_of_piece)
        self._pieces = [
            offload.room((min(self._rows_of_piece, rows - start) * width,), dtype)
            for start in starts
        ]

    def put(self, start: int, x: Tensor) -> None:
        """Begin copying `x`, which is whole rows from `start` on, within a tile; it may be dropped."""
        self._offload.put(x, self.view(start, x.shape))

    def get(self, start: int, shape: Sequence[int]) -> Tensor:
        """A copy on the device of what lies from row `start` on, as `shape`."""
        return self._offload.get(self.view(start, shape))

    def view(self, start: int, shape: Sequence[int]) -> Tensor:
        """The same, on the host itself."""
        piece, first = divmod(start, self._rows_of_piece)
        begin = first * self._width
        return self._pieces[piece][begin : begin + torch.Size(shape).numel()].view(shape)


def _tiles_of_piece(nbytes: int) -> int:
    """Tiles of `nbytes` to a piece of about `PIECE_BYTES`, or of more where that is far from a power of two."""
    least = max(PIECE_BYTES // nbytes, 1)
    counts = range(least, 8 * least + 1)

    def filled(count: int) -> float:
        return count * nbytes / (1 << (count * nbytes - 1).bit_length())

    # All counts are compared only where none fills well: of small tiles there are millions.
    well = next((n for n in counts if filled(n) >= FILLED), None)
    return max(counts, key=filled) if well is None else well


class _Incoming:
    """Takes a layer's incoming gradient out of autograd's hands.

    Whoever calls a backward holds its arguments until it returns, and a checkpoint's backward returns
    when the whole layer has been through. Here the gradient waits alone, and is gone after its use.
    """

    def __init__(self) -> None:
        self._grad: Tensor | None = None

    def catch(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Hook before the checkpoint's backward: keep the gradient, pass on a stand-in of its shape."""
        (grad,) = grads
        if grad is None:  # autograd makes zeros of it, for the checkpoint to see
            return grads
        self._grad = grad
        return (grad.new_zeros(()).expand_as(grad),)

    def give(self, seen: Tensor) -> Tensor:
        """The gradient; `seen` is what the checkpoint's backward was called with."""
        grad, self._grad = self._grad, None
        return seen if grad is None else grad


class _Outgoing(torch.autograd.Function):
    """A scalar on top of a layer's output, from which backward starts with the gradient that waits."""

    @staticmethod
    def forward(ctx: Any, give: Callable[[], Tensor], out: Tensor) -> Tensor:
        ctx.give = give
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor]:
        return None, ctx.give()


class _Checkpoint(torch.autograd.Function):
    """Runs a layer without a graph, keeps only its input, and runs it again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor], Tensor],
        offload: HostOffload | None,
        incoming: _Incoming,
        x: Tensor,
    ) -> Tensor:
        ctx.run, ctx.offload, ctx.incoming = run, offload, incoming
        if offload is None:
            ctx.save_for_backward(x)
        else:
            ctx.parked = offload.store(x)
        with FirstRun(x.device) as ctx.first:
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.offload is None:
            (x,) = ctx.saved_tensors
        else:
            x = ctx.offload.load(ctx.parked)
            ctx.parked = None
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            with ctx.first.again().part():
                out = ctx.run(x)
            start = _Outgoing.apply(partial(ctx.incoming.give, grads[0]), out)  # type: ignore[no-untyped-call]
        # Backward needs the graph, not the value: the layer's output is freed here.
        del out
        torch.autograd.backward(start)
        return None, None, None, x.grad


def checkpoint(
    run: Callable[[Tensor], Tensor], x: Tensor, offload: HostOffload | None = None
) -> Tensor:
    """`run(x)`, recomputed in backward; `x` waits on the host if `offload` is given.

    `run` maps a tensor to a tensor and may use parameters: their gradients accumulate as in an ordinary
    backward. It runs again with the same random numbers and autocast. Local.
    """
    if not torch.is_grad_enabled():
        return run(x)
    if not x.requires_grad:
        # Frozen embeddings: the layer's own parameters still need this node in the graph.
        x = x.detach().requires_grad_()
    incoming = _Incoming()
    out: Tensor = _Checkpoint.apply(run, offload, incoming, x)  # type: ignore[no-untyped-call]
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(incoming.catch)
    return out
