"""Sequence tiling: a token-wise function computed tile by tile, exactly.

Source: ALST (arXiv:2506.13996, section 3.1.1). Each tile is recomputed in backward, so only the input of the
whole function is saved. Weight gradients are summed over tiles in fp32 (or wider). They are returned as one
gradient per parameter, so the hooks of any engine fire once.
Legend: B batch, S sequence, E features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alst_impl.ops.autograd import apply
from alst_impl.ops.memory.recompute import FirstRun

TokenWise = Callable[[Tensor], Tensor]


def parameters_of(fn: Any) -> list[nn.Parameter]:
    """Trainable parameters that `fn` can reach: a module, a bound method, a partial or a closure."""
    seen: dict[nn.Parameter, None] = {}
    for module in _modules_of(fn):
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen[parameter] = None
    return list(seen)


def _modules_of(fn: Any) -> Iterator[nn.Module]:
    if isinstance(fn, nn.Module):
        yield fn
    elif isinstance(fn, functools.partial):
        for part in (fn.func, *fn.args, *fn.keywords.values()):
            yield from _modules_of(part)
    elif hasattr(fn, "__self__"):
        yield from _modules_of(fn.__self__)
    else:
        for cell in getattr(fn, "__closure__", None) or ():
            yield from _modules_of(cell.cell_contents)


def tile_bounds(rows: int, num_tiles: int) -> list[tuple[int, int]]:
    """At most `num_tiles` half-open ranges that cover `rows`; none is empty, and the last may be shorter."""
    if num_tiles < 1:
        raise ValueError(f"num_tiles must be at least 1, not {num_tiles}")
    size = -(-rows // num_tiles)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def accumulation_dtype(parameter: Tensor) -> torch.dtype:
    """fp32, or the parameter's own dtype if that is wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


class GradientSum:
    """Sums of the gradients of `parameters`, in `accumulation_dtype`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Add one tile's gradients; None adds nothing."""
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[i]
            if total is None:
                self._sums[i] = gradient.to(accumulation_dtype(self._parameters[i]))
            else:
                total.add_(gradient)

    def take(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The sums times `factor`, each rounded to its parameter's dtype; each sum is freed once it is rounded."""
        result: list[Tensor | None] = []
        for i, parameter in enumerate(self._parameters):
            total, self._sums[i] = self._sums[i], None
            if total is not None and factor is not None:
                total.mul_(factor)
            result.append(None if total is None else total.to(parameter.dtype))
        return result


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: TokenWise, num_tiles: int, x: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.fn, ctx.num_tiles = fn, num_tiles
        # Parameters are not saved: an engine may free and gather them again before backward, which would
        # leave stale references. Backward looks them up again.
        ctx.save_for_backward(x)
        out: Tensor | None = None
        with FirstRun(x.device) as ctx.first:
            for start, stop in tile_bounds(x.shape[1], num_tiles):
                tile = fn(x[:, start:stop].contiguous())
                if out is None:
                    out = tile.new_empty(x.shape[0], x.shape[1], *tile.shape[2:])
                out[:, start:stop] = tile
                del tile
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        parameters = parameters_of(ctx.fn)
        sums = GradientSum(parameters)
        needs_x = ctx.needs_input_grad[2]
        grad_x = torch.empty_like(x) if needs_x else None
        again = ctx.first.again()
        for start, stop in tile_bounds(x.shape[1], ctx.num_tiles):
            tile = x[:, start:stop].contiguous().detach().requires_grad_(needs_x)
            inputs = [tile, *parameters] if needs_x else parameters
            with torch.enable_grad(), again.part():
                out = ctx.fn(tile)
            edge = torch.autograd.graph.get_gradient_edge(out)
            del out
            gradients = torch.autograd.grad(
                edge, inputs, grad_out[:, start:stop], allow_unused=True
            )
            if grad_x is not None:
                grad_x[:, start:stop] = gradients[0]
                gradients = gradients[1:]
            sums.add(gradients)
            del gradients, edge, tile
        return None, None, grad_x, *sums.take()


def tiled(fn: TokenWise, x: Tensor, num_tiles: int) -> Tensor:
    """`fn(x)` computed in `num_tiles` tiles of the sequence, forward and backward.

    `fn` maps [B, s, E] to [B, s, ...] token by token for any s; `x` is [B, S, E]. Equal to `fn(x)` for every
    tile count, also for more tiles than rows. Gradients reach `x` and every parameter that `fn` can reach
    (module, bound method, partial or closure over modules). Saves only `x`. Local.
    """
    return apply(_Tiled, fn, num_tiles, x, *parameters_of(fn))


def run_as(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module` run `forward`, which calls its children many times per pass. Changes the instance only.

    ZeRO-3 then gathers all parameters once around the whole module. `_z3_leaf` is DeepSpeed's mark for such
    modules (deepspeed/utils/z3_leaf_module.py). Only DeepSpeed's engine reads it, when it starts.
    """
    vars(module).update(forward=forward, _z3_leaf=True)
