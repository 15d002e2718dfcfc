"""What the published ALST runs allocated and held, for simulation only: kernels that compute nothing.

Claims are judged on the stack their authors ran, and `alst` is not that stack. Every function here
makes the tensors that its original makes and keeps them as long; values are left undefined.

Sources: torch 2.8 (`torch/utils/checkpoint.py`), DeepSpeed 0.17 (`runtime/sequence_parallel/
ulysses_sp.py`), ArcticTraining 0.0.4 (`arctic_training/model/tiled_compute.py`), Liger-Kernel 0.5
(`liger_kernel/ops/`), transformers 4.51 (`integrations/sdpa_attention.py`).
Legend: B batch, S local sequence, E hidden size, V vocabulary, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as stock_checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from alst_impl import hf
from alst_impl.ops.attention import BACKENDS
from alst_impl.placement import Placement


def _sdpa_of_4_51(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """transformers' `sdpa` of the time: kv heads repeated, all three made contiguous.

    query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D].
    """
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    query, key, value = (x.contiguous() for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


BACKENDS["sdpa_of_4_51"] = _sdpa_of_4_51


def use_fused_kernels(model: PreTrainedModel) -> None:
    """Liger's norm, RoPE and logits+loss.

    Liger replaces the norm's class before the model is built (`AutoLigerKernelForCausalLM`, which
    ArcticTraining's `liger_factory.py` calls), so norms of queries and keys are fused, too.
    """
    for norm in model.modules():
        if "RMSNorm" in type(norm).__name__:
            norm.forward = partial(_FusedNorm.apply, norm.weight)
    for attention in hf.attention_modules(model):
        _fuse_rope(attention)
    _fuse_loss(model)


def use_fused_mlp(model: PreTrainedModel) -> None:
    """Liger's SwiGLU."""
    for mlp in hf.token_wise_modules(model)[0]:
        mlp.forward = partial(_fused_mlp, mlp)


def use_tiled_mlp(model: PreTrainedModel) -> None:
    """DeepSpeed's TiledMLP with ceil(S / E) tiles."""
    for mlp in hf.token_wise_modules(model)[0]:
        mlp.forward = partial(tiled_mlp, mlp, mlp.forward, model.config.hidden_size)


def checkpoint_layers(model: PreTrainedModel, placement: Placement, *, offload: bool) -> None:
    """PyTorch's reentrant checkpoint, or the recipes' patch of it that copies inputs to the host."""

    def run(layer: Callable[..., Any], hidden_states: Tensor, *args: Any) -> Any:
        if offload:
            return _OffloadedCheckpoint.apply(lambda x: layer(x, *args), placement, hidden_states)  # type: ignore[no-untyped-call]
        return stock_checkpoint(layer, hidden_states, *args, use_reentrant=True)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)


class _OffloadedCheckpoint(torch.autograd.Function):
    """PyTorch's reentrant checkpoint with its input on the host.

    Like the original, backward holds the layer's output and the list of incoming gradients in local
    variables while the layer's backward runs, though neither is read again.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], placement: Placement, x: Tensor
    ) -> Tensor:
        ctx.run, ctx.device = run, placement.device
        ctx.x = x.to(placement.host)
        placement.on_host(ctx.x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *args: Tensor) -> tuple[None, None, Tensor | None]:
        x = ctx.x.to(ctx.device).detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.run(x)
        outputs_with_grad, args_with_grad = [outputs], [args[0]]
        torch.autograd.backward(outputs_with_grad, args_with_grad)
        return None, None, x.grad


class _FusedNorm(torch.autograd.Function):
    """Liger's RMSNorm: saves its input and fp32 [B * S] statistics; dX overwrites dY (`in_place`)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.weight = weight
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        _ = ctx.saved_tensors
        return torch.empty_like(ctx.weight), grads[0]


class _FusedRope(torch.autograd.Function):
    """Liger's rotary embedding: in place on q and k, and on their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[1]


def _fused_rope(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """In place of transformers' `apply_rotary_pos_emb`."""
    return _FusedRope.apply(q, k)  # type: ignore[no-any-return, no-untyped-call]


def _fuse_rope(attention: nn.Module) -> None:
    """Replace the rotary embedding inside calls of `attention`, and only there."""
    stock = attention.forward
    source = sys.modules[type(attention).__module__]

    def forward(*args: Any, **kwargs: Any) -> Any:
        rope = source.apply_rotary_pos_emb
        source.apply_rotary_pos_emb = _fused_rope  # type: ignore[attr-defined]
        try:
            return stock(*args, **kwargs)
        finally:
            source.apply_rotary_pos_emb = rope  # type: ignore[attr-defined]

    attention.forward = forward


class _FusedSilu(torch.autograd.Function):
    """Liger's SiLU * up: saves both inputs; their gradients overwrite them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return gate.detach(), up.detach()


def _fused_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Liger's SwiGLU MLP."""
    product = _FusedSilu.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
    return mlp.down_proj(product)  # type: ignore[no-any-return]


class _TiledMlp(torch.autograd.Function):
    """DeepSpeed's TiledMLP: a list of tile outputs, concatenated; backward tile by tile into zeros.

    Parameters are arguments so that the graph reaches them; their gradients add up in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, fn: Callable[[Tensor], Tensor], num_tiles: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.fn, ctx.num_tiles = fn, num_tiles
        ctx.save_for_backward(x)
        outputs = [
            fn(tile) if real else torch.empty_like(tile) for real, tile in _tiles(x, num_tiles)
        ]
        return torch.cat(outputs, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        x_grad = torch.zeros_like(x)
        incoming = _tiles(grads[0], ctx.num_tiles)
        for (real, tile), (_, grad), (_, into) in zip(
            _tiles(x.detach(), ctx.num_tiles), incoming, _tiles(x_grad, ctx.num_tiles), strict=True
        ):
            if real:
                tile.requires_grad_().grad = into
                with torch.enable_grad():
                    output = ctx.fn(tile)
                torch.autograd.backward(output, grad)
        return None, None, x_grad, *(None for _ in ctx.needs_input_grad[3:])


def _tiles(x: Tensor, num_tiles: int) -> list[tuple[bool, Tensor]]:
    """(computed, tile): the first two tiles and the last are, those between are one piece that is not."""
    tiles = list(torch.chunk(x, num_tiles, dim=1))
    if len(tiles) <= 3:
        return [(True, tile) for tile in tiles]
    head, last = sum(t.shape[1] for t in tiles[:2]), tiles[-1].shape[1]
    between = x[:, head : x.shape[1] - last]
    return [(True, tiles[0]), (True, tiles[1]), (False, between), (True, tiles[-1])]


def tiled_mlp(
    mlp: nn.Module, fn: Callable[[Tensor], Tensor], hidden_size: int, x: Tensor
) -> Tensor:
    return _TiledMlp.apply(fn, -(-x.shape[1] // hidden_size), x, *mlp.parameters())  # type: ignore[no-any-return, no-untyped-call]


class _FusedLoss(torch.autograd.Function):
    """Liger's fused linear cross entropy: gradients are made in forward, chunk by chunk.

    Chunks have next_power_of_2(B S / ceil(V / E)) rows, so they grow with the sequence; the gradient of
    the weight adds up in the weight's dtype; a chunk's logits become their gradient in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden.flatten(0, 1)
        rows, (vocab, width) = x.shape[0], weight.shape
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        losses = torch.zeros(rows, dtype=torch.float32, device=x.device)
        size = 1 << (-(-rows // -(-vocab // width)) - 1).bit_length()
        for start in {0, min(size, rows - 1)}:
            chunk = x[start : start + size]
            logits = chunk @ weight.t()
            grad_x[start : start + size] = logits @ weight
            torch.addmm(grad_weight, logits.t(), chunk, out=grad_weight)
        ctx.grads = grad_x.view_as(hidden), grad_weight
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_weight = ctx.grads
        ctx.grads = None
        return grad_x, grad_weight


def _fuse_loss(model: PreTrainedModel) -> None:
    """Compute the loss inside the head's call, from hidden states and the head's weight."""
    head = model.get_output_embeddings()

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        for key in ("labels", "shift_labels", "num_items_in_batch"):
            kwargs.pop(key, None)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=head(hidden))

    head.forward = lambda hidden: _FusedLoss.apply(hidden, head.weight)  # type: ignore[no-untyped-call]
    model.forward = model_forward
