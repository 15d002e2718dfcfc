"""Hand-written backward of a decoder layer, in the three passes that `layer` describes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alst_impl.ops.attention.flash import attend_backward
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
    grad_out = _after_attention(layer, x, grad, attended.out, parameters, sums)
    grad_key_value = _through_attention(layer, x, call, attended, grad_out)
    _before_attention(layer, x, call, grad, attended.out, grad_key_value, parameters, sums)
    return sums.take()


def _after_attention(
    layer: GroupedAttention,
    x: Rows,
    grad: Tensor,
    out: Slots,
    parameters: list[nn.Parameter],
    sums: GradientSum,
) -> Slots:
    """First pass: overwrite `grad` with the gradient of the residual. Returns the gradient of `out`, in its shape."""
    grad_out = out.another()
    for rows in layer.tiles(x.shape[1]):
        attended = by_token(out.tile(rows)).requires_grad_()
        with torch.enable_grad():
            residual = x.tile(rows) + layer.decoder.output(attended)
            y = residual + layer.decoder.feed_forward(residual)
        edge = torch.autograd.graph.get_gradient_edge(y)
        del y
        of_residual, of_attended, *gradients = torch.autograd.grad(
            edge, [residual, attended, *parameters], grad[:, rows], allow_unused=True
        )
        grad[:, rows] = of_residual
        grad_out.put_tile(rows, layer.in_slots(of_attended))
        sums.add(tuple(gradients))
        del of_residual, of_attended, gradients, residual, attended, edge
    return grad_out


def _through_attention(
    layer: GroupedAttention, x: Rows, call: Call, attended: Attended, grad_out: Slots
) -> Slots:
    """Second pass: overwrite `attended.out` with dQ. Returns dK and dV, concatenated: [G', P, s, B, 2 k, D]."""
    out = attended.out
    slots: Slots | None = None
    pair: Tensor | None = None
    done = 0
    for each in layer.by_group(x, call, out, grad_out):
        if pair is not None and each.kv_group != done:
            slots = _give_back(layer, pair, done, grad_out, slots)
            pair = None
        whole_out, whole_grad = each.slots
        of_query, *of_pair = attend_backward(
            whole_grad,
            each.query,
            each.key,
            each.value,
            whole_out,
            attended.logsumexp[each.group],
            attended.rests,
            **layer.settings(call),
        )
        group, done = each.group, each.kv_group
        del each, whole_out, whole_grad
        layer.to_slot(of_query, out, group)
        del of_query
        pair = _summed(pair, *of_pair)
        del of_pair
    assert pair is not None, "there is at least one group"
    return _give_back(layer, pair, done, grad_out, slots)


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
    grad_query: Slots,
    grad_key_value: Slots,
    parameters: list[nn.Parameter],
    sums: GradientSum,
) -> None:
    """Third pass: add to `grad`, of the residual, the gradient through the projections and the norm."""
    for rows in layer.tiles(x.shape[1]):
        tile = x.tile(rows).detach().requires_grad_()
        with torch.enable_grad():
            outputs = layer.decoder.qkv(layer.decoder.before(tile), *call.tile(rows))
        of_outputs = layer.of_qkv(grad_query.tile(rows), grad_key_value.tile(rows))
        of_tile, *gradients = torch.autograd.grad(
            outputs, [tile, *parameters], of_outputs, allow_unused=True
        )
        grad[:, rows] += of_tile
        sums.add(tuple(gradients))
        del of_tile, gradients, outputs, of_outputs, tile
