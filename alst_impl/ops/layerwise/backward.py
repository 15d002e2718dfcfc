"""Hand-written backward of a decoder layer, in the three passes that `layer` describes. Legend as there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alst_impl.ops.layerwise.groups import GroupedAttention
from alst_impl.ops.layerwise.parts import Attended, Call, Inputs, by_token, pieces
from alst_impl.ops.memory.parked import ByGroup, Rows, Slots
from alst_impl.ops.memory.tiling import GradientSum, parameters_of


def backward(
    layer: GroupedAttention,
    x: Rows,
    inputs: Inputs,
    call: Call,
    grad: Tensor,
    attended: Attended,
) -> list[Tensor | None]:
    """Overwrite `grad`, of the output [B, s, E], with the gradient of x. Returns the parameters' gradients.

    `inputs` are what is projected of x.
    """
    parameters = parameters_of(layer.decoder.module)
    sums = GradientSum(parameters)
    grad_out = attended.out.another() if layer.decoder.output_weight is None else None
    _after_attention(layer, x, call, grad, attended.out, grad_out, parameters, sums)
    through = _through_attention(layer, inputs, call, grad, attended, grad_out)
    del inputs
    _before_attention(layer, x, call, grad, through, parameters, sums)
    return sums.take()


def _after_attention(
    layer: GroupedAttention,
    x: Rows,
    call: Call,
    grad: Tensor,
    out: Slots,
    grad_out: Slots | None,
    parameters: list[nn.Parameter],
    sums: GradientSum,
) -> None:
    """First pass: overwrite `grad` with the gradient of x beside attention, and `grad_out`, if given, with that of `out`."""
    for rows in layer.tiles(x.shape[1]):
        attended = by_token(out.tile(rows)).requires_grad_(grad_out is not None)
        with torch.enable_grad():
            source, y = layer.decoder.finish_with_graph(x, rows, attended, call.tile(rows))
        edge = torch.autograd.graph.get_gradient_edge(y)
        del y
        inputs = [source, *parameters] if grad_out is None else [attended, source, *parameters]
        found = list(torch.autograd.grad(edge, inputs, grad[:, rows], allow_unused=True))
        if grad_out is not None:
            grad_out.put_tile(rows, layer.in_slots(found.pop(0)))
        grad[:, rows] = found.pop(0)
        sums.add(tuple(found))
        del found, inputs, source, attended, edge


@dataclass(frozen=True)
class _Projected:
    """The gradient of attention's output, which each group projects from that of the residual when it is asked for."""

    layer: GroupedAttention
    residual: Tensor
    """Gradient of the residual, [B, s, E]."""

    def group(self, group: int) -> Tensor:
        """[P, s, B, h, D]."""
        layer, groups, weight = self.layer, self.layer.groups, self.layer.decoder.output_weight
        assert weight is not None, "asked before"
        dim = layer.decoder.dim
        columns = pieces(weight.t(), [head * dim for head in groups.query_heads(group)], dim)
        batch, local, width = self.residual.shape
        found = self.residual.new_empty(groups.degree, local, batch, groups.heads, dim)
        for rows in layer.tiles(local, times=width // len(columns)):
            by_head: Tensor = F.linear(self.residual[:, rows], columns).unflatten(-1, (-1, dim))
            found[:, rows] = layer.in_send_order(by_head.transpose(1, 2))
            del by_head
        return found


@dataclass(frozen=True)
class _Through:
    """Gradients of attention's inputs."""

    query: Slots
    key_value: Slots
    """dK and dV, concatenated: [G', P, s, B, 2 k, D]."""
    sinks: Tensor | None
    """[H], zero but for this rank's heads; None if the layer has none."""


def _through_attention(
    layer: GroupedAttention,
    inputs: Inputs,
    call: Call,
    grad: Tensor,
    attended: Attended,
    grad_out: Slots | None,
) -> _Through:
    """Second pass: overwrite `attended.out` with dQ, and `grad_out`, which is computed from `grad` if it is None."""
    out = attended.out
    incoming: ByGroup = _Projected(layer, grad) if grad_out is None else grad_out
    slots: Slots | None = None
    pair: Tensor | None = None
    of_sinks: Tensor | None = None
    done = 0
    for each in layer.by_group(inputs, call, out, incoming):
        if pair is not None and each.kv_group != done:
            slots = _give_back(layer, inputs.rows, pair, done, grad_out, slots)
            pair = None
        whole_out, whole_grad = each.slots
        (of_query, *of_pair), of_group = layer.attention(each.group, call, grad.shape[0]).backward(
            whole_grad,
            each.query,
            each.key,
            each.value,
            whole_out,
            attended.logsumexp[each.group],
            attended.rests,
        )
        of_sinks = _with_sinks(layer, each.group, of_sinks, of_group)
        group, done = each.group, each.kv_group
        del each, whole_out, whole_grad
        layer.to_slot(of_query, out, group)
        del of_query
        pair = _summed(pair, *of_pair)
        del of_pair
    assert pair is not None, "there is at least one group"
    slots = _give_back(layer, inputs.rows, pair, done, grad_out, slots)
    return _Through(out, slots, of_sinks)


def _with_sinks(
    layer: GroupedAttention, group: int, total: Tensor | None, of_group: Tensor | None
) -> Tensor | None:
    """`total` [H] (None for zeros) plus the gradient of the sinks of `group`, [h]; None if there are none."""
    sinks = layer.decoder.variant.sinks
    if sinks is None or of_group is None:
        return None
    total = torch.zeros_like(sinks) if total is None else total
    total[layer.heads(group)] = of_group
    return total


def _summed(total: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """`total` (None for zeros) [S, B, 2 k, D] plus dK and dV [B, k, S, D] of one more group with the same kv heads."""
    batch, heads, seqlen, dim = key.shape
    pair = key.new_empty(seqlen, batch, 2 * heads, dim) if total is None else total
    for part, one in zip(pair.chunk(2, dim=2), (key, value), strict=True):
        token_first = one.permute(2, 0, 1, 3)
        if total is None:
            part.copy_(token_first)
        else:
            part.add_(token_first)
    return pair


def _give_back(
    layer: GroupedAttention,
    x: Rows,
    pair: Tensor,
    kv_group: int,
    grad_out: Slots | None,
    slots: Slots | None,
) -> Slots:
    """Send dK and dV of `kv_group` to the ranks of their tokens. Returns the slots of all kv groups. Collective."""
    if slots is None:
        num_groups, heads = layer.groups.num_kv_groups, 2 * layer.groups.kv_heads
        # The output gradients' slots are free once all groups with these kv heads are done.
        slots = (
            layer.room(x, num_groups, heads)
            if grad_out is None
            else grad_out.pairs(num_groups, heads)
        )
    layer.to_slot(pair.permute(1, 2, 0, 3), slots, kv_group)
    return slots


def _before_attention(
    layer: GroupedAttention,
    x: Rows,
    call: Call,
    grad: Tensor,
    through: _Through,
    parameters: list[nn.Parameter],
    sums: GradientSum,
) -> None:
    """Third pass: add to `grad` the gradient through what precedes attention."""
    for rows in layer.tiles(x.shape[1]):
        tile = x.tile(rows).detach().requires_grad_()
        with torch.enable_grad():
            outputs: tuple[Tensor, ...] = layer.decoder.qkv(tile, call.tile(rows))
        of_outputs: tuple[Tensor | None, ...] = layer.of_qkv(
            through.query.tile(rows), through.key_value.tile(rows)
        )
        sinks = layer.decoder.variant.sinks
        if rows.start == 0 and sinks is not None and sinks.requires_grad:
            outputs, of_outputs = (*outputs, sinks), (*of_outputs, through.sinks)
        of_tile, *gradients = torch.autograd.grad(
            outputs, [tile, *parameters], of_outputs, allow_unused=True
        )
        grad[:, rows] += of_tile
        sums.add(tuple(gradients))
        del of_tile, gradients, outputs, of_outputs, tile
