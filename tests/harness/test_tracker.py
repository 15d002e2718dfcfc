"""The tracker's count is exact: by hand, against the allocator, and on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from harness.tracker import Tracker

KIB = 1024


@pytest.fixture(params=["real", "fake"])
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test on real tensors and again on fake ones."""
    if request.param == "real":
        yield
        return
    with FakeTensorMode():
        yield


def floats(kib: int) -> Tensor:
    """A float32 tensor of `kib` KiB."""
    return torch.ones(kib * KIB // 4)


@pytest.mark.usefixtures("tensors")
def test_peak_is_the_largest_sum_of_live_storages() -> None:
    """Temporaries count while they live, views never, and freed bytes can be used again."""
    with Tracker() as tracker:
        a = floats(4)
        b = a.view(32, 32).t()[:3]  # a view
        c = a + 1  # 8 KiB live
        del c
        d = a * 2 + a  # 12 KiB while the product lives
        assert tracker.live_bytes == 8 * KIB
        del a
        assert tracker.live_bytes == 8 * KIB  # its view holds it
        del b
        assert tracker.live_bytes == 4 * KIB
    assert tracker.peak_bytes == 12 * KIB
    assert d.numel() == KIB


@pytest.mark.usefixtures("tensors")
def test_adopted_tensors_count_once_under_their_category() -> None:
    """Parameters that exist before count from the start, in-place results are not new."""
    weight, shared = nn.Parameter(floats(2)), floats(1)
    with Tracker(events=True) as tracker:
        tracker.adopt([weight, weight.detach().view(-1), None], "parameters")
        shared.add_(1)  # never adopted, so never counted
        assert tracker.live_bytes == 2 * KIB
        output = weight * 2
        tracker.adopt([output], "gradients")
    assert [(a.nbytes, a.category) for a in tracker.peak_live()] == [
        (2 * KIB, "parameters"),
        (2 * KIB, "gradients"),
    ]


def test_adopt_rest_finds_what_nobody_named() -> None:
    """A bucket that only an engine knows counts too, and only once."""
    bucket, weight = floats(64), floats(2)
    with Tracker(events=True) as tracker:
        tracker.adopt([weight], "parameters")
        tracker.adopt_rest()
        live = {(a.nbytes, a.category) for a in tracker.peak_live()}
        before = tracker.live_bytes
        tracker.adopt_rest()
        assert tracker.live_bytes == before
    assert {(64 * KIB, "other"), (2 * KIB, "parameters")} <= live
    assert bucket.numel() == 16 * KIB


@pytest.mark.usefixtures("tensors")
def test_storage_resizes_count() -> None:
    """Freeing by resizing the storage to 0, as FSDP2 does, is seen; so is growing it again."""
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


@pytest.mark.usefixtures("tensors")
def test_host_memory_is_counted_apart() -> None:
    """A tensor marked as host memory never shows in the device's peak, not even while it is made."""
    with Tracker(events=True) as tracker:
        a = floats(4)
        copy = torch.empty_like(a)
        tracker.mark_host(copy)
        copy.copy_(a)
        del a
        assert (tracker.live_bytes, tracker.live_host_bytes) == (0, 4 * KIB)
    assert (tracker.peak_bytes, tracker.host_peak_bytes) == (4 * KIB, 4 * KIB)
    assert [a.host for a in tracker.peak_live()] == [False]


def test_a_host_device_is_host_memory() -> None:
    """Under fake tensors the host is a device of its own."""
    with FakeTensorMode(), Tracker(host="lazy") as tracker:
        a = floats(4)
        copy = a.to("lazy")
        del a
        assert (tracker.live_bytes, tracker.live_host_bytes) == (0, 4 * KIB)
        assert copy.device.type == "lazy"


@pytest.mark.usefixtures("tensors")
def test_phases_have_their_own_peaks() -> None:
    """A phase starts with what it inherits."""
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


def test_sizes_are_rounded_like_an_allocator() -> None:
    """CUDA's caching allocator hands out multiples of 512 bytes."""
    with Tracker(rounding=512) as tracker:
        scalar, long = torch.ones(()), torch.ones(129)
        assert tracker.live_bytes == 512 + 1024
    assert scalar.numel() + long.numel() == 130


def test_scratch_and_live_are_read_at_the_same_instant() -> None:
    """The peak is where live plus scratch is largest, even if more tensors live elsewhere."""

    def scratch(operator: object, args: tuple[object, ...], kwargs: object) -> dict[str, int]:
        return {"sums": 2 * KIB, "sorted": 6 * KIB} if str(operator) == "aten.exp.default" else {}

    with Tracker(scratch=scratch, events=True) as tracker:
        a = floats(1)
        b = a.exp()
        c = floats(6)
    assert (tracker.peak.live_bytes, tracker.peak.scratch_bytes) == (2 * KIB, 8 * KIB)
    held = [(x.category, x.nbytes) for x in tracker.peak_live()]
    assert sorted(held) == [("activations", KIB)] * 2 + [("scratch", 2 * KIB), ("scratch", 6 * KIB)]
    assert tracker.live_bytes == 8 * KIB
    assert b.numel() + c.numel() == 7 * 256


def test_explanation_names_operator_and_line() -> None:
    """What is live at the peak carries where it was allocated, in backward of which forward line."""
    with Tracker(explain=True) as tracker:
        x = floats(4).requires_grad_()
        y = x.sin()  # forward line
        line = test_explanation_names_operator_and_line.__code__.co_firstlineno + 4
        tracker.phase("backward")
        y.backward(y.detach())
    found = {(a.operator, a.location) for a in tracker.peak_live("backward")}
    assert ("aten::sin", f"tests/harness/test_tracker.py:{line}") in found
    assert ("aten::cos", f"tests/harness/test_tracker.py:{line}") in found


class Square(torch.autograd.Function):
    """y = x * x by hand, with a nested backward as tiled computation has it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = leaf * leaf
        torch.autograd.backward(y, dy)
        assert leaf.grad is not None
        return leaf.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_is_seen_inside_checkpoints_and_custom_functions(reentrant: bool) -> None:
    """Recomputation and nested backward allocate inside the autograd engine, and are counted."""
    peaks = []
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=False) if fake else torch.enable_grad():
            x = floats(4).requires_grad_()
            with Tracker() as tracker:
                tracker.adopt([x], "parameters")
                y = checkpoint(lambda t: Square.apply(t.sin()), x, use_reentrant=reentrant)
                assert tracker.live_bytes == 8 * KIB  # x, y
                tracker.phase("backward")
                y.sum().backward()
                del y
                assert tracker.live_bytes == 8 * KIB  # x, its gradient
            peaks.append(tracker.phase_peaks)
    assert peaks[0] == peaks[1]
    assert peaks[0]["backward"] >= 24 * KIB


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward, backward and plain SGD."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(p.grad, alpha=0.1)
            p.grad = None


def allocator_peak(run: Callable[[], None]) -> int:
    """Largest number of bytes the CPU allocator had handed out during `run`, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
def test_llama_step_agrees_with_the_allocator(checkpointing: bool) -> None:
    """The tracked peak of a whole step is the CPU allocator's own, but for its kernels' scratch."""
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
        tracker.adopt([*model.parameters(), *model.buffers(), ids], "parameters")
        base = tracker.live_bytes
        step(model, ids)
        assert tracker.live_bytes == base
    tracked, allocated = tracker.peak_bytes - base, allocator_peak(lambda: step(model, ids))
    assert tracked > 8 * 2**20
    assert 0 <= allocated - tracked <= 32 * KIB, (tracked, allocated)
