"""The tracker's count is exact, compared with counts by hand and with the allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from harness.meters.tracker import Tracker

KIB = 1024


def floats(kib: int) -> Tensor:
    """A float32 tensor of `kib` KiB."""
    return torch.ones(kib * KIB // 4)


def test_peak_is_the_largest_sum_of_live_storages() -> None:
    """Temporaries count while they live, views never count, and freed bytes are subtracted."""
    with Tracker() as tracker:
        a = floats(4)
        b = a.view(32, 32).t()[:3]  # a view
        c = a + 1  # 8 KiB live
        del c
        d = a * 2 + a  # 12 KiB while the product lives
        assert tracker.live_bytes == 8 * KIB
        del a
        assert tracker.live_bytes == 8 * KIB  # its view keeps it alive
        del b
        assert tracker.live_bytes == 4 * KIB
        e = torch.tensor([1.0])  # made by Python and passed on by an operator
        assert tracker.live_bytes == 4 * KIB + 4
    assert tracker.peak_bytes == 12 * KIB
    assert d.numel() + e.numel() == KIB + 1


def test_adopted_tensors_count_once() -> None:
    """Existing parameters count from the start, in-place results are not new, and meta tensors do not count."""
    weight, shared = nn.Parameter(floats(2)), floats(1)
    with Tracker() as tracker:
        tracker.adopt([weight, weight.detach().view(-1), None])
        shared.add_(1)  # never adopted, so never counted
        hollow = torch.empty(KIB, device="meta")
        assert tracker.live_bytes == 2 * KIB
        output = weight * 2
        tracker.adopt([output, hollow])
        assert tracker.live_bytes == 4 * KIB
    assert tracker.peak_bytes == 4 * KIB


def test_adopt_finds_all_other_tensors() -> None:
    """A bucket that only an engine references counts, too, and only once."""
    bucket, weight = floats(64), floats(2)
    gc.collect()  # frees garbage of other tests beforehand
    with Tracker() as tracker:
        tracker.adopt([weight])
        tracker.adopt()
        before = tracker.live_bytes
        tracker.adopt()
        assert tracker.live_bytes == before
        del bucket
        assert tracker.live_bytes == before - 64 * KIB
        del weight
        assert tracker.live_bytes == before - 66 * KIB


def test_storage_resizes_count() -> None:
    """The tracker sees a storage freed by resizing it to 0, as FSDP2 does, and growing again."""
    with Tracker() as tracker:
        a = floats(4)
        a.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        b = floats(3)
        assert tracker.peak_bytes == 4 * KIB
        a.untyped_storage().resize_(4 * KIB)
        assert tracker.live_bytes == 7 * KIB
        b.resize_(2 * KIB)
        assert tracker.live_bytes == 12 * KIB
    assert tracker.peak_bytes == 12 * KIB


def test_host_memory_is_counted_separately() -> None:
    """A tensor marked as host memory never counts in the device's peak, not even during its allocation."""
    with Tracker() as tracker:
        a = floats(4)
        for _ in range(2):  # the second reuses the memory of the first
            copy = torch.empty_like(a)
            tracker.mark_host(copy)
            copy.copy_(a)
            del copy
        del a
        assert tracker.live_bytes == 0
    assert (tracker.peak_bytes, tracker.host_peak_bytes) == (4 * KIB, 4 * KIB)


def test_phases_have_their_own_peaks() -> None:
    """A phase starts with the bytes that are live when it begins."""
    with Tracker() as tracker:
        a = floats(4)
        tracker.phase("forward")
        b = a + 1
        del b
        tracker.phase("backward")
        c = floats(1)
        tracker.phase("forward")
        d = a + c.sum()
    assert tracker.phase_peaks == {"start": 4 * KIB, "forward": 9 * KIB + 4, "backward": 5 * KIB}
    assert d.numel() == KIB


class Square(torch.autograd.Function):
    """y = x * x with a custom backward that runs a nested backward, as tiled computation does."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = leaf * leaf
        torch.autograd.backward(y, dy)
        assert leaf.grad is not None
        return leaf.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_is_seen_inside_checkpoints_and_custom_functions(reentrant: bool) -> None:
    """Allocations of recomputation and nested backward in the autograd engine count."""
    x = floats(4).requires_grad_()
    with Tracker() as tracker:
        tracker.adopt([x])
        y = checkpoint(lambda t: Square.apply(t.sin()), x, use_reentrant=reentrant)
        assert tracker.live_bytes == 8 * KIB  # x, y
        tracker.phase("backward")
        y.sum().backward()
        del y
        assert tracker.live_bytes == 8 * KIB  # x, its gradient
    # x, y, sin(x), its square in `Square.backward`, two gradients of that and their sum; with reentrant
    # checkpoints the recomputed output, too; the fp32 scalar y.sum() and its gradient.
    assert tracker.phase_peaks["backward"] == (8 if reentrant else 7) * 4 * KIB + 8


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward, backward and plain SGD."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(p.grad, alpha=0.1)
            p.grad = None


def allocator_peak(run: Callable[[], None]) -> int:
    """Peak of bytes that the CPU allocator handed out during `run`, relative to its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
def test_llama_step_agrees_with_the_allocator(checkpointing: bool) -> None:
    """The tracked peak of a full step equals the CPU allocator's, except for scratch memory of kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if checkpointing:
        model._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
        )
    ids = torch.randint(0, 1024, (1, 1024))
    step(model, ids)
    with Tracker() as tracker:
        tracker.adopt([*model.parameters(), *model.buffers(), ids])
        base = tracker.live_bytes
        step(model, ids)
        assert tracker.live_bytes == base
    tracked, allocated = tracker.peak_bytes - base, allocator_peak(lambda: step(model, ids))
    assert tracked > 8 * 2**20
    assert 0 <= allocated - tracked <= 32 * KIB, (tracked, allocated)
