"""Bytes of attention layers of gpt-oss and Gemma 2 by core, at 32K tokens: what forward leaves, and what backward needs."""

import json

import torch

from alst_impl.layout import Layout
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant

SEQLEN = 32_768


def tokens(heads: int, dim: int) -> torch.Tensor:
    """[1, H, S, D], as a projection leaves it."""
    x = torch.zeros(1, SEQLEN, heads, dim, dtype=torch.bfloat16, device="cuda")
    return x.transpose(1, 2).requires_grad_()


def layer(core: str, heads: int, dim: int, variant: Variant) -> dict[str, int]:
    """Bytes beside query, key, value and the output's gradient, in units of 1/1000 of the query."""
    query, key, value = tokens(heads, dim), tokens(8, dim), tokens(8, dim)
    for _ in range(2):  # first calls compile, and try kernels
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        out = load_core(core)(query, key, value, layout=Layout(SEQLEN), variant=variant)
        held, forward = (
            measure() - begin
            for measure in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)
        )
        grad = torch.empty_like(out)
        torch.cuda.reset_peak_memory_stats()
        out.backward(grad)
        backward = torch.cuda.max_memory_allocated() - begin - grad.nbytes
        query.grad = key.grad = value.grad = None
        del out, grad
    found = {"held": held, "forward": forward, "backward": backward}
    return {name: 1000 * nbytes // query.nbytes for name, nbytes in found.items()}


def layers() -> dict[str, dict[str, int]]:
    """By model, whether there is a window, and core."""
    sinks = torch.zeros(64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    found = {}
    for core in ("flex", "sdpa"):
        for name, window in (("window", 128), ("full", None)):
            variant = Variant(0.125, window, sinks=sinks)
            found[f"gpt-oss {name} {core}"] = layer(core, 64, 64, variant)
        for name, window in (("window", 4_096), ("full", None)):
            found[f"gemma2 {name} {core}"] = layer(
                core, 16, 256, Variant(0.0625, window, softcap=50)
            )
    return found


print(json.dumps(layers()))
