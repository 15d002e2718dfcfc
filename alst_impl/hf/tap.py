"""Runs an unmodified decoder layer up to its attention, and from there on, for `alst_impl.ops.layerwise`.

A *tap* takes the place of the layer's attention behind transformers' interface. Before attention, it takes query,
key and value and ends the layer's forward. After attention, the forward runs again, and the tap returns rows of
attention's output that are given. So the layer may have any norms, residuals, gates, experts and multipliers: all
that works token by token. What else would make tiles wrong is refused: at once by the kind of a part, or at the first
call by a run on a few rows.
Legend as in `alst_impl.ops.layerwise.layer`; r rows of a tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from alst_impl.layout import Layout
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.layerwise.arguments import unsliceable
from alst_impl.ops.layerwise.parts import Call, Projection, by_token
from alst_impl.ops.memory.parked import Rows, Slots
from alst_impl.ops.memory.recompute import FirstRun

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.RNNBase)
"""Modules that let tokens depend on others."""
NO_ATTENTION = "does not mix tokens in one call of transformers' attention interface alone"
PROBE = 8
"""Rows on each side of the border of tiles that the first call checks."""
BORDERS = 4
"""Number of borders that the first call checks. One without a difference is enough, because rounding may
send a token to other experts."""


@dataclass(frozen=True)
class Captured:
    """What a layer passes to attention: query [B, H, r, D], key [B, K, r, D], value [B, K, r, V]."""

    query: Tensor
    key: Tensor
    value: Tensor
    variant: Variant


class _ReachedError(Exception):
    """Ends a layer's forward at its attention."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.captured = captured


class Tap:
    """The attention of one decoder layer, as `alst_impl.hf.Attention`, which takes its inputs or gives its output."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._stock = layer.forward
        self._names = list(inspect.signature(type(layer).forward).parameters)[1:]  # without self
        self._given: Tensor | None = None
        self._calls = 0
        self._rest: tuple[Any, ...] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, variant: Variant, **_: Any
    ) -> Tensor:
        """Take query, key and value and leave the layer's forward, or return the given output [B, H, r, V]."""
        self._calls += 1
        if self._calls > 1:
            self.refuse("calls attention more than once")
        if self._given is None:
            raise _ReachedError(Captured(query, key, value, variant))
        by_head: Tensor = self._given.unflatten(-1, (query.shape[1], -1))
        return by_head[..., : value.shape[-1]].transpose(1, 2).to(query.dtype)

    def before(self, tile: Tensor, call: Call) -> Captured:
        """Run the layer on tile [B, r, E] up to attention. `call` is the tile's."""
        self._calls = 0
        captured: Captured | None = None
        try:
            self._stock(tile, *call.args, **call.kwargs)
        except _ReachedError as reached:
            captured = reached.captured
        if captured is None:
            self.refuse(NO_ATTENTION)
        return captured

    def after(self, tile: Tensor, attended: Tensor, call: Call) -> Tensor:
        """The layer's output [B, r, E] for `tile`, if attention's output is `attended` [B, r, H D]."""
        self._calls, self._given = 0, attended
        try:
            output = self._stock(tile, *call.args, **call.kwargs)
        finally:
            self._given = None
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor) or any(each is not None for each in rest):
            self.refuse("returns more than hidden states")
        self._rest = tuple(rest) if isinstance(output, tuple) else None
        return hidden

    def returned(self, hidden: Tensor) -> Any:
        """`hidden` in what the layer's own forward returns."""
        return hidden if self._rest is None else (hidden, *self._rest)

    def without_hidden(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """(hidden states, other positional arguments, other named ones) of a call of the layer."""
        if args:
            return args[0], args[1:], kwargs
        hidden, *_ = self._names
        return kwargs[hidden], (), {k: v for k, v in kwargs.items() if k != hidden}

    def noted_layout(self) -> Layout | None:
        """The layout that was noted for the layer's attention, to which layers may not pass it."""
        noted = (vars(module).get("noted_layout") for module in self.layer.modules())
        return next((layout for layout in noted if layout is not None), None)

    def length(self, hidden: Tensor) -> int:
        """Tokens of each sample in `hidden`. Raises `ValueError` for hidden states of another shape than a layer's."""
        if hidden.dim() != 3:
            self.refuse(f"has hidden states of {hidden.dim()} axes, not [batch, sequence, hidden]")
        return hidden.shape[1]

    def refuse_arguments(self, call: Call) -> None:
        """Raise `ValueError` for arguments that tiles cannot have."""
        named = dict(zip(self._names[1:], call.args, strict=False)) | call.kwargs
        refuse_cache(named)
        for name, value in named.items():
            reason = unsliceable(name, value, call.layout.local)
            if reason is not None:
                self.refuse(f"has an argument that tiles cannot have: {reason}")

    def refuse(self, does: str) -> NoReturn:
        """Raise `ValueError` for the layer, which `does` what tiles do not allow."""
        raise ValueError(refusal(self.layer, does))


def refusal(layer: nn.Module, does: str) -> str:
    """The message that refuses `layer`."""
    return (
        f"method 'layerwise' cannot run {type(layer).__name__} in tiles, because it {does}; "
        "use method 'alst'"
    )


def refuse_cache(arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for a key/value cache among a layer's `arguments`."""
    if any(isinstance(value, Cache) for value in arguments.values()):
        raise ValueError(
            "method 'layerwise' does not support a key/value cache; set use_cache=False"
        )


def refuse_parts(layer: nn.Module) -> None:
    """Raise `ValueError` for a part of `layer` that tiles do not allow, by its kind."""
    for name, part in layer.named_modules():
        if getattr(part, "p", 0):
            raise ValueError(refusal(layer, f"has dropout ({name}, p={part.p})"))
        if isinstance(part, CONVOLUTIONS):
            kind = type(part).__name__
            raise ValueError(refusal(layer, f"mixes tokens outside attention ({name}, {kind})"))


@dataclass(frozen=True)
class Tapped:
    """A layer of unknown parts, as a `Decoder`: to project some heads, it projects all and drops the others."""

    tap: Tap
    num_heads: int
    num_kv_heads: int
    dim: int
    """The larger one of the head dims of key and value, as a multiple of 8, which kernels ask for."""
    seen: list[Variant]
    """The variant that the layer passed last."""
    prepare: ClassVar[None] = None
    output_weight: ClassVar[None] = None

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.tap.layer

    @property
    def variant(self) -> Variant:
        """As `Decoder.variant`."""
        return self.seen[0]

    def qkv(self, tile: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `Decoder.qkv`. Missing features are zeros, which change neither scores nor outputs."""
        captured = self.tap.before(tile.contiguous(), call)
        self.seen[0] = captured.variant
        query, key, value = (
            F.pad(x, (0, self.dim - x.shape[-1])).to(tile.dtype)
            for x in (captured.query, captured.key, captured.value)
        )
        return query, key, value

    def projection(self, heads: Sequence[int], kv_heads: Sequence[int] | None) -> Projection:
        """As `Decoder.projection`."""

        def project(tile: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
            query, key, value = self.qkv(tile, call)
            if kv_heads is None:
                return query[:, heads], None, None
            return query[:, heads], key[:, kv_heads], value[:, kv_heads]

        return project

    def finish(self, x: Rows, rows: slice, out: Slots, call: Call) -> Tensor:
        """As `Decoder.finish`."""
        return self.tap.after(x.tile(rows).contiguous(), by_token(out.tile(rows)), call)

    def finish_with_graph(
        self, x: Rows, rows: slice, attended: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.finish_with_graph`."""
        tile = x.tile(rows).contiguous().detach().requires_grad_()
        return tile, self.tap.after(tile, attended, call)


def measure(tap: Tap, x: Tensor, call: Call) -> Tapped:
    """The layer as a `Decoder`, from its call on x [B, s, E]. Local.

    Runs the layer on a few rows. Raises `ValueError` for a layer that tiles would make wrong.
    """
    with FirstRun(x.device) as first:
        captured = _check_graph(tap, x, call)
    if first.random:
        tap.refuse("draws random numbers, as dropout does")
    _check_borders(tap, x, call)
    widest = max(captured.query.shape[-1], captured.value.shape[-1])
    num_heads, num_kv_heads = captured.query.shape[1], captured.key.shape[1]
    return Tapped(tap, num_heads, num_kv_heads, -(-widest // 8) * 8, [captured.variant])


def _check_graph(tap: Tap, x: Tensor, call: Call) -> Captured:
    """Refuse a layer whose query, key, value or output does not depend on its input; returns what it captured."""
    rows = slice(0, min(x.shape[1], 2 * PROBE))
    tile = x[:, rows].detach().contiguous().requires_grad_()
    with torch.enable_grad():
        captured = tap.before(tile, call.tile(rows))
        output = tap.after(tile, _like_output(captured), call.tile(rows))
        parts = {"query": captured.query, "key": captured.key, "value": captured.value}
        for name, part in {**parts, "output": output}.items():
            if not _depends(part, tile):
                tap.refuse(f"has a {name} that does not depend on its own hidden states")
    if output.shape != tile.shape or output.dtype != tile.dtype:
        tap.refuse(f"maps {list(tile.shape)} to {list(output.shape)} in {output.dtype}")
    return captured


def _depends(part: Tensor, tile: Tensor) -> bool:
    if not part.requires_grad:
        return False
    (found,) = torch.autograd.grad(part.sum(), tile, retain_graph=True, allow_unused=True)
    return found is not None


def _like_output(captured: Captured) -> Tensor:
    """Some tensor in place of attention's output: [B, r, H V], without a graph."""
    query, width = captured.query.detach(), captured.value.shape[-1]
    return F.pad(query, (0, width - query.shape[-1])).transpose(1, 2).flatten(2)


@torch.no_grad()
def _check_borders(tap: Tap, x: Tensor, call: Call) -> None:
    """Refuse a layer that computes other rows at the border of two tiles than without a border."""
    size = min(PROBE, x.shape[1] // 2)
    if size == 0:
        return
    tolerance = torch.finfo(x.dtype).eps ** 0.5 / 4
    starts = range(0, x.shape[1] - 2 * size + 1, size)[:BORDERS]
    errors = [_error_at_border(tap, x, call, start, size) for start in starts]
    if min(errors) > tolerance:
        tap.refuse(
            "mixes tokens outside attention, or counts positions from the start of what it gets (rows at the border "
            f"of tiles differ by {min(errors):.1e})"
        )


def _error_at_border(tap: Tap, x: Tensor, call: Call, start: int, size: int) -> float:
    """Largest relative difference of rows at a border, between two tiles of `size` rows and one of both."""
    middle, stop = start + size, start + 2 * size
    whole = _outputs(tap, x, call, slice(start, stop))
    first = _outputs(tap, x, call, slice(start, middle))
    second = _outputs(tap, x, call, slice(middle, stop))
    pairs = [
        (one[:, size - 1 : size + 1], torch.cat([a[:, -1:], b[:, :1]], dim=1))
        for one, a, b in zip(whole, first, second, strict=True)
    ]
    errors = [(a - b).double().norm() / a.double().norm().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(errors).max())


def _outputs(tap: Tap, x: Tensor, call: Call, rows: slice) -> list[Tensor]:
    """Query, key, value and the layer's output of some rows, each [B, r, ...]."""
    tile, of_rows = x[:, rows].detach().contiguous(), call.tile(rows)
    captured = tap.before(tile, of_rows)
    output = tap.after(tile, _like_output(captured), of_rows)
    return [x.transpose(1, 2) for x in (captured.query, captured.key, captured.value)] + [output]
