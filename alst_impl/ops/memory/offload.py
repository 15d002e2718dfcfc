"""Activation checkpointing with layer inputs offloaded to the host.

Source: ALST (arXiv:2506.13996, section 3.3). On a device with streams, copies overlap with compute, and a
small input is prefetched one layer before backward needs it. On other devices they are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alst_impl.ops.autograd import apply, as_it_stands
from alst_impl.ops.memory.recompute import FirstRun
from alst_impl.placement import Placement

PIECE_BYTES = 2**27
"""Size of the pieces that a layer input is stored in on the host.
PyTorch rounds each pinned allocation up to a power of two (ATen/core/CachingHostAllocator.h), which for one
large piece could double the memory."""
FILLED = 0.95
"""A piece that fills this share of a power of two is good enough."""
PREFETCH_BYTES = 2**29
"""Larger inputs are not prefetched: a second one needs much memory, and the copy is short beside attention."""


class OnHost:
    """One offloaded tensor: its host copy, and its copy on the device while it is fetched."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype = x.shape, x.dtype
        self.nbytes = x.numel() * x.element_size()
        self.before: OnHost | None = None
        self.host: list[Tensor] | None = None
        self.fetched: Tensor | None = None
        self.event: Any = None


class Kept:
    """A tensor on the host, in pieces, that may be fetched and overwritten any number of times."""

    def __init__(self, x: Tensor, pieces: list[Tensor]) -> None:
        self.shape, self.dtype, self.pieces = x.shape, x.dtype, pieces


class Coming:
    """A tensor on its way to the device."""

    def __init__(self, x: Tensor, event: Any) -> None:
        self._x, self._event = x, event

    def wait(self) -> Tensor:
        """The tensor, once later work on the current stream may use it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return self._x


class HostOffload:
    """Copies layer inputs between `placement.device` and `placement.host`.

    torch.compile leaves its methods alone: what it generates for side streams does not run.
    """

    def __init__(self, placement: Placement, *, overlap: bool = True) -> None:
        """With `overlap`, copies run beside compute, through pinned memory, and prefetch; otherwise they block."""
        self._placement = placement
        self._apart = overlap and placement.device.type != placement.host.type
        self._streams = overlap and placement.device.type == "cuda"
        self._side = torch.cuda.Stream(placement.device) if self._streams else None
        self._last: OnHost | None = None

    @as_it_stands
    def store(self, x: Tensor) -> OnHost:
        """Start copying `x` to the host; the caller may drop `x` at once. Backward loads in reverse order."""
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

    @as_it_stands
    def settle(self) -> None:
        """Later work on the current stream waits for all started copies, so it may overwrite what they copy."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    @as_it_stands
    def put(self, x: Tensor, into: Tensor) -> None:
        """Start copying `x` to `into`, which `room` returned; the caller may drop `x` at once."""
        x = x.contiguous()
        if self._side is None:
            self._copy([into], [x])
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._copy([into], [x])
            x.record_stream(self._side)

    @as_it_stands
    def get(self, host: Tensor) -> Tensor:
        """Copy to the device what `put` stored in `host`."""
        self.settle()
        x = torch.empty(host.shape, dtype=host.dtype, device=self._placement.device)
        self._copy([x], [host])
        return x

    @as_it_stands
    def keep(self, x: Tensor, into: Kept | None = None) -> Kept:
        """Start copying `x` to the host, over what `into` holds if it is given; the caller may drop `x` at once."""
        kept = into or Kept(x, [self.room(piece.shape, piece.dtype) for piece in _pieces(x)])
        for piece, host in zip(_pieces(x), kept.pieces, strict=True):
            self.put(piece, host)
        return kept

    @as_it_stands
    def fetch(self, kept: Kept) -> Coming:
        """Start copying `kept` to the device, after all copies that were started before."""
        x = torch.empty(kept.shape, dtype=kept.dtype, device=self._placement.device)
        return self._coming(x, _pieces(x), kept.pieces)

    @as_it_stands
    def start(self, host: Tensor) -> Coming:
        """Start copying to the device what `put` stored in `host`, after all copies that were started before."""
        x = torch.empty(host.shape, dtype=host.dtype, device=self._placement.device)
        return self._coming(x, [x], [host])

    def _coming(self, x: Tensor, into: Sequence[Tensor], pieces: Sequence[Tensor]) -> Coming:
        if self._side is None:
            self._copy(into, pieces)
            return Coming(x, None)
        self._side.wait_stream(torch.cuda.current_stream())  # which may still read what was here
        with torch.cuda.stream(self._side):
            self._copy(into, pieces)
            return Coming(x, self._side.record_event())

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate host memory for `put`."""
        placement = self._placement
        host = torch.empty(shape, dtype=dtype, device=placement.host, pin_memory=self._streams)
        placement.on_host(host)
        placement.evidence["offloaded_bytes"] += host.numel() * host.element_size()
        return host

    def _copy(self, into: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        for target, piece in zip(into, pieces, strict=True):
            target.copy_(piece, non_blocking=self._streams)

    @as_it_stands
    def load(self, parked: OnHost) -> Tensor:
        """Return the input on the device, and prefetch the input that backward needs next if that is small."""
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
    """`x`, flattened, as views of `PIECE_BYTES` and a remainder; a small `x` whole, in its shape."""
    size = PIECE_BYTES // x.element_size()
    return (x,) if x.numel() <= size else x.contiguous().view(-1).split(size)


class HostTiles:
    """Rows of `width` elements on the host, in tiles of `size` rows, allocated in pieces as in `HostOffload`."""

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
        """Start copying `x`, whole rows from `start` on, within a tile; the caller may drop `x` at once."""
        self._offload.put(x, self.view(start, x.shape))

    def get(self, start: int, shape: Sequence[int]) -> Tensor:
        """Copy the rows from `start` on to the device, as `shape`."""
        return self._offload.get(self.view(start, shape))

    def fetch(self, start: int, shape: Sequence[int]) -> Coming:
        """Start copying the rows from `start` on to the device, as `shape`."""
        return self._offload.start(self.view(start, shape))

    def view(self, start: int, shape: Sequence[int]) -> Tensor:
        """The rows from `start` on, as a view of host memory."""
        piece, first = divmod(start, self._rows_of_piece)
        begin = first * self._width
        return self._pieces[piece][begin : begin + torch.Size(shape).numel()].view(shape)


def _tiles_of_piece(nbytes: int) -> int:
    """Number of tiles of `nbytes` in a piece: about `PIECE_BYTES`, or more to fill a power of two better."""
    least = max(PIECE_BYTES // nbytes, 1)
    counts = range(least, 8 * least + 1)

    def filled(count: int) -> float:
        return count * nbytes / (1 << (count * nbytes - 1).bit_length())

    # All counts are compared only if none fills well: for small tiles there are millions of counts.
    well = next((n for n in counts if filled(n) >= FILLED), None)
    return max(counts, key=filled) if well is None else well


class _Incoming:
    """Keeps a layer's incoming gradient outside autograd, so that it is freed right after its use.

    The caller of a backward keeps the arguments alive until it returns. A checkpoint's backward returns only
    after the backward of the whole layer. This object holds the only reference, and drops it at the first
    use.
    """

    def __init__(self) -> None:
        self._grad: Tensor | None = None

    def catch(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Pre-hook of the checkpoint's backward: keep the gradient, pass on a placeholder of its shape."""
        (grad,) = grads
        if grad is None:  # autograd makes zeros of it, for the checkpoint to see
            return grads
        self._grad = grad
        return (grad.new_zeros(()).expand_as(grad),)

    def give(self, seen: Tensor) -> Tensor:
        """Return the gradient and drop it here; `seen` is what the checkpoint's backward was called with."""
        grad, self._grad = self._grad, None
        return seen if grad is None else grad


class _Outgoing(torch.autograd.Function):
    """A scalar computed from a layer's output, whose backward passes on the gradient from `give`."""

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
        run: Callable[..., Any],
        offload: HostOffload | None,
        incoming: _Incoming,
        x: Tensor,
        *more: Tensor,
    ) -> Any:
        ctx.run, ctx.offload, ctx.incoming = run, offload, incoming
        ctx.parked = None if offload is None else offload.store(x)
        ctx.save_for_backward(*([x] if offload is None else []), *more)
        with FirstRun(x.device) as ctx.first:
            return run(x, *more)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.offload is None else ctx.offload.load(ctx.parked)
        ctx.parked = None
        given = [tensor.detach().requires_grad_() for tensor in (x, *saved)]
        with torch.enable_grad():
            with ctx.first.again().part():
                out = ctx.run(*given)
            if isinstance(out, Tensor):
                ends = [apply(_Outgoing, partial(ctx.incoming.give, grads[0]), out)]
                of_ends: list[Tensor | None] = [None]
            else:
                pairs = zip(out, grads, strict=True)
                found = [(end, grad) for end, grad in pairs if grad is not None]
                found = [(end, grad) for end, grad in found if end.requires_grad]
                ends, of_ends = [end for end, _ in found], [grad for _, grad in found]
        # Backward needs the graph, not the value: the layer's output is freed here.
        del out
        torch.autograd.backward(ends, of_ends)
        return None, None, None, *(tensor.grad for tensor in given)


def checkpoint(
    run: Callable[..., Any],
    x: Tensor,
    offload: HostOffload | None = None,
    more: Sequence[Tensor] = (),
) -> Any:
    """`run(x, *more)`, recomputed in backward; `x` is kept on the host if `offload` is given.

    `run` returns a tensor or a tuple and may use parameters: their gradients accumulate as in an ordinary
    backward. Gradients reach x and `more`. It runs again with the same random numbers and autocast. Local.
    """
    if not torch.is_grad_enabled():
        return run(x, *more)
    if not x.requires_grad:
        # Frozen embeddings: the layer's own parameters still need this node in the graph.
        x = x.detach().requires_grad_()
    incoming = _Incoming()
    out: Any = apply(_Checkpoint, run, offload, incoming, x, *more)
    if not isinstance(out, tuple) and out.grad_fn is not None:
        out.grad_fn.register_prehook(incoming.catch)
    return out
