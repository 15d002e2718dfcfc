"""Hand-written backward of a decoder layer, in the three passes that `layer` describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alst_impl.ops.layerwise.groups import GroupedAttention
from alst_impl.ops.layerwise.parts import Attended, Call, by_token
from alst_impl.ops.memory.parked import Rows, Slots
from alst_impl.ops.memory.tiling import GradientSum, parameters_of


def backward(
    layer: GroupedAttention, x: Rows, call: Call, grad: Tensor, attended: Attended
) -> list[Tensor | None]:
    """Overwrite `grad`, of the output [B, s, E], with the gradient of x. Returns the parameters' gradients."""
    parameters = parameters_of(layer.decoder.module)
    sums = GradientSum(parameters)
    grad_out = _after_attention(layer, x, call, grad, attended.out, parameters, sums)
    through = _through_attention(layer, x, call, attended, grad_out)
    _before_attention(layer, x, call, grad, through, parameters, sums)
    return sums.take()


def _after_attention(
    layer: GroupedAttention,
    x: Rows,
    call: Call,
    grad: Tensor,
    out: Slots,
    parameters: list[nn.Parameter],
    sums: GradientSum,
) -> Slots:
    """First pass: overwrite `grad` with the gradient of x beside attention. Returns the gradient of `out`, in its shape."""
    grad_out = out.another()
    for rows in layer.tiles(x.shape[1]):
        attended = by_token(out.tile(rows)).requires_grad_()
        with torch.enable_grad():
            source, y = layer.decoder.finish_with_graph(x, rows, attended, call.tile(rows))
        edge = torch.autograd.graph.get_gradient_edge(y)
        del y
        of_source, of_attended, *gradients = torch.autograd.grad(
            edge, [source, attended, *parameters], grad[:, rows], allow_unused=True
        )
        grad[:, rows] = of_source
        grad_out.put_tile(rows, layer.in_slots(of_attended))
        sums.add(tuple(gradients))
        del of_source, of_attended, gradients, source, attended, edge
    return grad_out


@dataclass(frozen=True)
class _Through:
    """Gradients of attention's inputs."""

    query: Slots
    key_value: Slots
    """dK and dV, concatenated: [G', P, s, B, 2 k, D]."""
    sinks: Tensor | None
    """[H], zero but for this rank's heads; None if the layer has none."""


def _through_attention(
    layer: GroupedAttention, x: Rows, call: Call, attended: Attended, grad_out: Slots
) -> _Through:
    """Second pass: overwrite `attended.out` with dQ, and `grad_out`."""
    out = attended.out
    slots: Slots | None = None
    pair: Tensor | None = None
    of_sinks: Tensor | None = None
    done = 0
    for each in layer.by_group(x, call, out, grad_out):
        if pair is not None and each.kv_group != done:
            slots = _give_back(layer, pair, done, grad_out, slots)
            pair = None
        whole_out, whole_grad = each.slots
        (of_query, *of_pair), of_group = layer.attention(each.group, call, x.shape[0]).backward(
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
    return _Through(out, _give_back(layer, pair, done, grad_out, slots), of_sinks)


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
    layer: GroupedAttention, pair: Tensor, kv_group: int, grad_out: Slots, slots: Slots | None
) -> Slots:
    """Send dK and dV of `kv_group` to the ranks of their tokens. Returns the slots of all kv groups. Collective."""
    groups = layer.groups
    # The output gradients' slots are free once all groups with these kv heads are done.
    slots = grad_out.pairs(groups.num_kv_groups, 2 * groups.kv_heads) if slots is None else slots
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
