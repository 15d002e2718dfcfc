"""DeepSpeed's own classes hold what the published stack's stand-ins hold, on the same fake tensors."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from alst_impl import published_stack
from alst_impl.ops.ulysses import UlyssesAttention
from alst_impl.placement import Evidence
from harness.scratch import cuda_scratch
from harness.tracker import Tracker
from harness.worlds.sim import flash_by_name

RANKS = 8
LOCAL = 16_384
"""Tokens of one rank."""
HEADS, KV_HEADS, DIM = 32, 8, 128
WIDTH = 1_024
"""Features of the MLP."""


@pytest.fixture(autouse=True, scope="module")
def deepspeed() -> None:
    """DeepSpeed, loaded so that it compiles no operator; its import warns of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("harness.preload")


@contextmanager
def fake_ranks() -> Iterator[dist.ProcessGroup]:
    """A fake process group that DeepSpeed knows, with this process as rank 0."""
    import deepspeed.comm as deepspeed_comm

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        deepspeed_comm.init_distributed(dist_backend="fake", verbose=False)
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        deepspeed_comm.comm.cdb = None
        dist.destroy_process_group()


def peaks(run: Callable[[], Tensor]) -> tuple[int, int, int]:
    """Bytes that `run` holds: at the peak of forward, between, at the peak of backward."""
    with Tracker(rounding=512, scratch=cuda_scratch("flash_attention_2")) as tracker:
        tracker.phase("forward")
        out = run()
        held = tracker.live_bytes
        tracker.phase("backward")
        torch.autograd.backward(out, torch.empty_like(out))
    return tracker.phase_peaks["forward"], held, tracker.phase_peaks["backward"]


def test_tiled_mlp() -> None:
    """DeepSpeed's TiledMLP and the stand-in are equal to the byte in forward, between and in backward."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    with FakeTensorMode():
        x = torch.empty(1, LOCAL, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        mlp: Any = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=3 * WIDTH))
        for name, linear in mlp.named_children():
            if isinstance(linear, nn.Linear):
                weight = torch.empty_like(linear.weight, dtype=torch.bfloat16)
                getattr(mlp, name).weight = nn.Parameter(weight)
        stock = mlp.forward

        def theirs() -> Tensor:
            parameters = list(mlp.parameters())
            run = LlamaMLP.forward
            out: Tensor = TiledMLP.apply(run, mlp, x, LOCAL // WIDTH, parameters)
            return out

        def ours() -> Tensor:
            return published_stack.tiled_mlp(mlp, stock, WIDTH, x)

        found = []
        for run in (theirs, ours):
            mlp.zero_grad()
            x.grad = None
            found.append(peaks(run))
    assert found[0] == found[1]


def test_ulysses_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's UlyssesSPAttentionHF holds as much between forward and backward, and peaks as high.

    In forward its copies peak higher by one q of a rank; no published step peaks there.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_by_name)

    def core(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    def heads(count: int) -> Tensor:
        x = torch.empty(1, LOCAL, count, DIM, dtype=torch.bfloat16, requires_grad=True)
        return x.transpose(1, 2)

    with fake_ranks() as group:
        peer = UlyssesSPAttentionHF(
            attn=core,
            batch_size=1,
            attn_head_count=HEADS,
            attn_head_size=DIM,
            kv_head_count=KV_HEADS,
            num_hidden_layers=1,
            process_group=group,
            local_seq_length=LOCAL,
            global_seq_length=LOCAL * RANKS,
        )
        own = UlyssesAttention(group, "sdpa", Evidence())
        with FakeTensorMode():
            q, k, v = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)
            positions = torch.arange(LOCAL)[None]
            theirs = peaks(lambda: peer(nn.Module(), q, k, v, None, position_ids=positions)[0])
        with FakeTensorMode():
            q, k, v = heads(HEADS), heads(KV_HEADS), heads(KV_HEADS)
            ours = peaks(lambda: own(q, k, v, scale=DIM**-0.5, window=None, documents=None))
    copies = LOCAL * HEADS * DIM * 2
    assert ours[1:] == theirs[1:]
    assert 0 <= theirs[0] - ours[0] <= 2 * copies
