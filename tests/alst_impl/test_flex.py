"""Core `flex`: its mask and blocks, and what PyTorch's own definition of FlexAttention makes of them on a CPU."""

from __future__ import annotations

import re

import pytest
import torch
from cores import attend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from alst_impl.layout import Layout
from alst_impl.ops.attention import flex
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant
from harness.cells.cell import make_cell
from tests.conftest import Ranks

Samples = tuple[tuple[int, ...], ...]
SAMPLES: list[Samples] = [
    ((35,),),
    ((35,), (35,)),
    ((17, 1, 17), (35,)),
    ((1,) * 35,),
    ((16, 19),),
    ((48,),),
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's definition, which makes all scores, in place of the compiled kernel. Its gradients are allowed on a CPU."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_without_sinks", flex.without_sinks)
    monkeypatch.setattr(flex, "_with_sinks", flex.with_sinks)


def inputs(kv_heads: int = 2, dim: int = 4) -> list[Tensor]:
    """Query, key, value of 17 tokens and another head dim, and sinks, in fp64."""
    torch.manual_seed(1)
    shapes = [(2, 4, 17, 4), (2, kv_heads, 17, 4), (2, kv_heads, 17, dim)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in [*tensors, torch.linspace(-1, 2, 4, dtype=torch.float64)]]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("documents", [None, ((5, 1, 11), (17,)), ((5, 12), (5, 12))])
@pytest.mark.parametrize("window", [None, 1, 4, 17])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_every_variant_is_that_of_core_sdpa(
    documents: Samples | None,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    """Output and all gradients are equal, alone and combined, with fewer kv heads, at an odd length."""
    results = []
    for ours in (True, False):
        *tensors, sinks = inputs()
        variant = Variant(0.7, window, chunk, softcap, sinks if with_sinks else None)
        if ours:
            parts = variant.documents(2, 17, documents)
            out = flex.attend(*tensors, variant.over(17), parts)
        else:
            layout = Layout(17, documents=documents)
            out = load_core("sdpa")(*tensors, layout=layout, variant=variant)
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        tensors += [sinks] if with_sinks else []
        results.append([out.detach(), *(x.grad for x in tensors)])
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("kv_heads", "dim"), [(4, 4), (1, 4), (2, 3), (2, 8)])
def test_heads_and_head_dims_may_differ(kv_heads: int, dim: int) -> None:
    """Every number of kv heads, and values of another head dim."""
    *tensors, sinks = (x.detach() for x in inputs(kv_heads, dim))
    out = flex.attend(*tensors, Variant(0.7, 4, sinks=sinks), None)
    torch.testing.assert_close(out, attend(*tensors, scale=0.7, window=4, sinks=sinks))


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 9, 40])
@pytest.mark.parametrize("samples", SAMPLES)
def test_the_kernel_visits_the_blocks_that_are_seen(
    samples: Samples, window: int | None, block: int
) -> None:
    """Each block that some query sees is listed once, in ascending order, as seen whole only if all its keys
    are by all queries; and so for keys.
    """
    seqlen = sum(samples[0])
    mask = torch.stack([of_document(lengths, window) for lengths in samples])
    missing = -seqlen % block
    mask = torch.cat([mask, mask[:, -1:].expand(-1, missing, -1)], dim=1)
    count = mask.shape[1] // block
    mask = torch.nn.functional.pad(mask, (0, missing)).view(-1, count, block, count, block)
    seen = mask.transpose(2, 3).flatten(3)
    whole, some = seen.all(3), seen.any(3)
    tables = flex.block_tables(flex.first_keys(samples, window), block)
    truths = [some & ~whole, whole, (some & ~whole).mT, whole.mT]
    for (number, place), truth in zip(tables, truths, strict=True):
        assert number.dtype == place.dtype == torch.int32
        assert int(place.min()) >= 0
        assert int(place.max()) < count
        for row, listed, expected in zip(
            number.flatten(), place.flatten(0, 2), truth.flatten(0, 1), strict=True
        ):
            assert listed[: int(row)].tolist() == expected.nonzero().flatten().tolist()


def of_document(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """The mask [S, S] of one sample."""
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(owner))[:, None] - torch.arange(len(owner))
    return (distance >= 0) & (distance < (window or len(owner))) & (owner[:, None] == owner)


@pytest.mark.parametrize(
    ("lengths", "window", "block"),
    [
        ((131_072,), None, 128),
        ((1_048_576,), None, 1_024),
        ((1_048_576,), 128, 128),
        ((1_000_001,), 4_096, 128),
        ((900_000, *[1_000] * 100), None, 1_024),
    ],
)
def test_a_mask_stays_small(lengths: tuple[int, ...], window: int | None, block: int) -> None:
    """Tables of blocks take 16 MiB or less at a million tokens; blocks are as small as that allows."""
    mask = flex.block_mask((lengths,), window, 1, torch.device("cpu"))
    assert set(mask.BLOCK_SIZE) == {block}
    tables = [mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices]
    assert max(table.numel() for table in tables) <= flex.ENTRIES == 2**20
    assert sum(table.nbytes for table in tables) <= 2**24


def test_a_mask_is_made_once() -> None:
    """Layers of the same variant share it."""
    masks = [flex.block_mask(((64,),), window, 1, torch.device("cpu")) for window in (8, None, 8)]
    assert masks[0] is masks[2] is not masks[1]


def test_a_mask_of_an_evaluation_serves_training() -> None:
    """Tensors that are made in inference mode could not be saved for a backward."""
    with torch.inference_mode():
        mask = flex.block_mask(((63,),), 7, 1, torch.device("cpu"))
    assert not mask.kv_indices.is_inference()
    assert not mask.full_q_indices.is_inference()


def test_tokens_that_lie_far_apart_are_copied() -> None:
    """The kernel's offsets of tokens have 32 bits."""
    near, far = (
        torch.empty(1, seqlen, 64, 64, device="meta").transpose(1, 2)
        for seqlen in (2**19 - 1, 2**19)
    )
    assert flex._within_reach(near, 1) is near
    assert flex._within_reach(far, 1).is_contiguous()
    assert flex._within_reach(near, 2).is_contiguous()


def test_a_cpu_is_refused_with_the_way_out(ranks: Ranks) -> None:
    """In a call, in a cell, and in `enable` before it changes the model."""
    query = torch.zeros(1, 2, 17, 16)
    with pytest.raises(ValueError, match="no backward on cpu; use attention 'sdpa'"):
        load_core("flex")(query, query, query, layout=Layout(17), variant=Variant(1))
    with pytest.raises(ValueError, match=r"'flex' needs a CUDA device.*use attention 'sdpa'"):
        make_cell(
            {
                "model": "tiny-llama",
                "seqlen": 64,
                "method": "alst",
                "world": "cpu",
                "attention": "flex",
            }
        )
    assert ranks(1)(_enable) == [True]


def _enable(rank: int, world_size: int) -> bool:
    from small import stock_model

    from alst_impl import enable

    model = stock_model()
    with pytest.raises(ValueError, match=r"'flex' needs a CUDA device.*use attention='sdpa'"):
        enable(model, attention="flex")
    enable(model)  # nothing had changed
    return True


@pytest.mark.parametrize(
    ("dim", "dtype", "said"), [(8, torch.bfloat16, "head dim of 8"), (16, torch.float64, "float64")]
)
def test_what_the_kernel_does_not_compute_is_refused(
    dim: int, dtype: torch.dtype, said: str
) -> None:
    """In one line, with the way out."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 17, dim, dtype=dtype, device="cuda")
        with pytest.raises(ValueError, match=f"{re.escape(said)}.*use attention 'sdpa'"):
            load_core("flex")(query, query, query, layout=Layout(17), variant=Variant(1))
