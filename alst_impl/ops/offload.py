"""Activation checkpointing whose saved layer inputs wait on the host.

Source: ALST (arXiv:2506.13996, section 3.3). On a device with streams, copies run beside compute and
an input is fetched one layer before backward needs it; elsewhere they are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alst_impl.placement import Placement


class _Parked:
    """One layer input on its way to the host and back."""

    def __init__(self, x: Tensor, before: _Parked | None) -> None:
        self.like = x.new_empty(0)
        self.shape, self.strides = x.shape, x.stride()
        self.before = before
        self.host: Tensor | None = None
        self.fetched: Tensor | None = None
        self.event: Any = None


class HostOffload:
    """Moves layer inputs between `placement.device` and `placement.host`."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._streams = placement.device.type == "cuda"
        self._side = torch.cuda.Stream(placement.device) if self._streams else None
        self._last: _Parked | None = None

    def store(self, x: Tensor) -> _Parked:
        """Begin copying `x` to the host; the caller may drop `x` at once."""
        placement = self._placement
        parked = _Parked(x, self._last)
        host = torch.empty(x.shape, dtype=x.dtype, device=placement.host, pin_memory=self._streams)
        placement.on_host(host)
        placement.evidence.offloaded_bytes += host.numel() * host.element_size()
        if self._side is None:
            host.copy_(x)
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                host.copy_(x, non_blocking=True)
                x.record_stream(self._side)
        parked.host = host
        self._last = parked
        return parked

    def load(self, parked: _Parked) -> Tensor:
        """The input back on the device. Starts fetching the one that backward needs next."""
        self._fetch(parked)
        x, parked.fetched = parked.fetched, None
        assert x is not None
        if self._side is not None:
            torch.cuda.current_stream().wait_event(parked.event)
            x.record_stream(torch.cuda.current_stream())
            if parked.before is not None:
                self._fetch(parked.before)
        self._last = parked.before  # backward walks the chain: the next forward starts a new one
        parked.before = None
        return x

    def _fetch(self, parked: _Parked) -> None:
        if parked.fetched is not None:
            return
        host, parked.host = parked.host, None
        assert host is not None, "a layer input is fetched once"
        if self._side is None:
            parked.fetched = torch.empty(
                parked.shape, dtype=host.dtype, device=self._placement.device
            )
            parked.fetched.copy_(host)
            return
        with torch.cuda.stream(self._side):
            parked.fetched = torch.empty(
                parked.shape, dtype=host.dtype, device=self._placement.device
            )
            parked.fetched.copy_(host, non_blocking=True)
            parked.event = self._side.record_event()


class _Checkpoint(torch.autograd.Function):
    """Runs a layer without a graph, keeps only its input, and runs it again in backward."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], offload: HostOffload | None, x: Tensor
    ) -> Tensor:
        ctx.run, ctx.offload = run, offload
        if offload is None:
            ctx.save_for_backward(x)
        else:
            ctx.parked = offload.store(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        if ctx.offload is None:
            (x,) = ctx.saved_tensors
        else:
            x = ctx.offload.load(ctx.parked)
            ctx.parked = None
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        # Backward needs the edge of the graph, not the value: the layer's output is freed here.
        edge = torch.autograd.graph.get_gradient_edge(out)
        del out
        torch.autograd.backward(edge, grads[0])
        return None, None, x.grad


def checkpoint(
    run: Callable[[Tensor], Tensor], x: Tensor, offload: HostOffload | None = None
) -> Tensor:
    """`run(x)`, recomputed in backward; `x` waits on the host if `offload` is given.

    `run` maps a tensor to a tensor and may use parameters: their gradients accumulate as in an ordinary
    backward. `run` must be deterministic (no dropout). Local.
    """
    if torch.is_grad_enabled() and not x.requires_grad:
        # Frozen embeddings: the layer's own parameters still need this node in the graph.
        x = x.detach().requires_grad_()
    return _Checkpoint.apply(run, offload, x)  # type: ignore[no-any-return, no-untyped-call]
