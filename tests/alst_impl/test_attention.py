"""The attention interface against attention with an explicit mask."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from cores import attend
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import config_of

from alst_impl.layout import Layout
from alst_impl.ops.attention import flash, fused, tiles
from alst_impl.ops.attention.cores.base import (
    FlashAttention,
    Kernel,
    each_document,
    load_core,
    sdpa,
)
from alst_impl.ops.attention.variant import Variant
from alst_impl.plugin import names
from alst_impl.step import check

CORES = {name: load_core(name) for name in names("alst_impl.ops.attention.cores")}
MODULES = {name: core.module for name, core in CORES.items() if isinstance(core, FlashAttention)}

Documents = tuple[tuple[int, ...], ...] | None


def qkv(seqlen: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """Query, key and value, in fp64."""
    torch.manual_seed(1)
    shapes = [(batch, n, seqlen, 4) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masked(
    tensors: list[Tensor],
    window: int | None,
    documents: Documents,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Textbook attention with scores, an S x S mask and softmax. A fourth tensor holds the sinks."""
    query, key, value, *sinks = tensors
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    seqlen = query.shape[2]
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None]
    allowed = (j <= i).expand(query.shape[0], seqlen, seqlen)
    if window is not None:
        allowed = allowed & (i - j < window)
    if documents is not None:
        owner = [torch.arange(len(d)).repeat_interleave(torch.tensor(d)) for d in documents]
        allowed = allowed & torch.stack([o[:, None] == o[None] for o in owner])
    if chunk is not None:
        allowed = allowed & (i // chunk == j // chunk)
    scores = query @ key.transpose(2, 3) * 0.7
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    for sink in sinks:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    return scores.softmax(-1)[..., :seqlen] @ value


DOCUMENTS = ((5, 1, 11), (17,))


@pytest.mark.parametrize("documents", [None, DOCUMENTS, ((1,) * 17, (8, 9))])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        (name, window)
        for name, core in CORES.items()
        for window in (None, 1, 2, 4, 5, 16, 17, 18)
        if isinstance(core, Kernel) and core.cpu and (core.tiles or (window or 17) >= 17)
    ],
)
def test_attention_equals_the_explicit_mask(
    name: str, window: int | None, documents: Documents
) -> None:
    """Output and gradients are equal, for windows that divide the length, do not, or exceed it."""
    results = []
    for fn in (
        lambda x: attend(*x, scale=0.7, window=window, documents=documents, backend=name),
        lambda x: masked(x, window, documents),
    ):
        tensors = qkv(17)
        out = fn(tensors)
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in tensors)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_variants_equal_the_explicit_mask(
    documents: Documents,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    """Output and every gradient are equal for soft-caps, sinks and chunks, alone and combined, with windows."""
    results = []
    for ours in (True, False):
        tensors = qkv(17)
        sinks = torch.linspace(-1, 2, 4, dtype=torch.float64, requires_grad=True)
        more = [sinks] if with_sinks else []
        if ours:
            limits: dict[str, Any] = {"chunk": chunk, "softcap": softcap}
            limits["sinks"] = sinks if with_sinks else None
            out = attend(*tensors, scale=0.7, window=window, documents=documents, **limits)
        else:
            out = masked([*tensors, *more], window, documents, chunk, softcap)
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(x.grad for x in [*tensors, *more])])
    for ours_, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours_, truth, rtol=1e-11, atol=1e-12)


def test_blocks_of_queries_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys, values and sinks are sums over blocks of queries."""
    monkeypatch.setattr(tiles, "ROWS", 5)
    for window in (None, 4):
        test_variants_equal_the_explicit_mask(None, window, None, 0.5, True)


def flash_attn(monkeypatch: pytest.MonkeyPatch, module: str, returns_statistics: bool) -> list[str]:
    """Fake functions of a flash-attn package, in its layouts. Returns the calls that they receive."""
    calls: list[str] = []

    def one(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        assert q.shape[0] == k.shape[0] == v.shape[0]
        assert options["causal"]
        before, after = options.get("window_size", (-1, 0))
        assert after == 0
        limits = {"window": before + 1 or None, "softcap": options.get("softcap")}
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [S, H, D] -> [1, H, S, D]
        return attend(*heads, scale=options["softmax_scale"], **limits)[0].transpose(0, 1)

    def dense(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        calls.append("dense")
        out = torch.stack([one(*sample, more) for sample in zip(q, k, v, strict=True)])
        return (out, None) if returns_statistics else out

    def varlen(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        calls.append("varlen")
        offsets = more["cu_seqlens_q"]
        assert offsets.dtype == torch.int32
        lengths = offsets.diff().tolist()
        assert max(lengths) == more["max_seqlen_q"] == more["max_seqlen_k"]
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        out = torch.cat([one(*part, more) for part in parts])
        return (out, None) if returns_statistics else out

    fake = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, module, fake)
    if "." in module:
        monkeypatch.setitem(sys.modules, module.partition(".")[0], SimpleNamespace())
    return calls


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.5), (4, 0.5)])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_kernel_of_a_package_is_called_in_its_layout(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    window: int | None,
    softcap: float | None,
    documents: Documents,
    statistics: bool,
) -> None:
    """The sequence dim comes before heads and kv heads are not repeated. Packed documents take one
    call with offsets. The kernel gets the window and the soft-cap.
    """
    calls = flash_attn(monkeypatch, MODULES[name], statistics)
    tensors = [x.detach() for x in qkv(17)]
    limits = {"window": window, "softcap": softcap}
    out = attend(*tensors, scale=0.7, documents=documents, backend=name, **limits)
    expected = masked(tensors, window, documents, softcap=softcap)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert calls == ["dense" if documents is None else "varlen"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_missing_package_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No other kernel replaces it."""
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(ValueError, match=f"attention '{name}' needs .* not installed"):
        attend(*qkv(17), scale=0.7, backend=name)


def test_a_named_kernel_runs_or_fails() -> None:
    """The CPU's flash kernel runs by its name. A kernel that only CUDA has fails and is not replaced."""
    tensors = [x.float() for x in qkv(17)]
    named, chosen = (attend(*tensors, scale=0.7, backend=b) for b in ("sdpa_flash", "sdpa"))
    assert torch.equal(named, chosen)
    with pytest.raises(RuntimeError):
        attend(*tensors, scale=0.7, backend="sdpa_cudnn")


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
def test_packed_documents_take_one_call_of_pytorchs_kernel(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    """It is told of grouped heads where there are such, also where there are as many as a head is wide."""
    calls: list[list[int]] = []

    def one(*heads: Tensor, **options: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in heads)  # [S, H, D] -> [1, H, S, D]
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return found[0].transpose(0, 1)

    def varlen(*given: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
        *packed, offsets, of_keys, longest, of_key = given
        calls.append(offsets.diff().tolist())
        assert calls[-1] == of_keys.diff().tolist()
        assert longest == of_key == max(calls[-1])
        assert window_size == (-1, 0)
        parts = zip(*(x.split(calls[-1]) for x in packed), strict=True)
        return torch.cat([one(*part, **options) for part in parts])

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    tensors = [x.detach() for x in qkv(17, heads=8, kv_heads=kv_heads)]
    out = attend(*tensors, scale=0.7, documents=DOCUMENTS, backend="sdpa_flash")
    torch.testing.assert_close(out, masked(tensors, None, DOCUMENTS), rtol=1e-11, atol=1e-12)
    assert calls == [[length for sample in DOCUMENTS for length in sample]]


def test_a_configuration_names_a_core_by_its_file() -> None:
    """An unknown name is refused with the known ones."""
    assert set(MODULES) == {f"flash_attention_{version}" for version in (2, 3, 4)}
    with pytest.raises(
        ValueError, match=r"unknown attention 'eager'; use one of flash_attention_2, "
    ):
        check(config_of(attention="eager"))


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 4, 17, 18])
def test_visible_pairs_are_those_of_the_mask(window: int | None, documents: Documents) -> None:
    """Counted one by one over all samples."""
    layout = Layout(17, documents=documents)
    counted = sum(
        1
        for lengths in documents or ((17,),)
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    kernels = [core for core in CORES.values() if isinstance(core, Kernel)]
    assert kernels
    assert all(core.visible_pairs(layout, window) == counted for core in kernels)


@pytest.mark.parametrize("position", [7, 8, 9, 15, 16])
def test_a_window_ends_where_it_says_at_the_edges_of_blocks(position: int) -> None:
    """With a window of 8, a token is visible to itself and to the next seven tokens only."""
    query, key, value = (x.detach() for x in qkv(32))
    before = attend(query, key, value, scale=1, window=8)
    changed = value.clone()
    changed[:, :, position] += 1
    moved = (attend(query, key, changed, scale=1, window=8) != before).any(-1).any(1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(position, position + 8))


def test_nothing_leaks_between_packed_documents() -> None:
    """A changed token of document 1 changes no output of document 2."""
    query, key, value = (x.detach() for x in qkv(17))
    documents = ((6, 11), (6, 11))
    before = attend(query, key, value, scale=1, documents=documents)
    for x in (query, key, value):
        x[:, :, 2] += 1
    after = attend(query, key, value, scale=1, documents=documents)
    assert torch.equal(after[:, :, 6:], before[:, :, 6:])
    assert not torch.equal(after[:, :, 2:6], before[:, :, 2:6])


@pytest.mark.parametrize("window", [None, 4])
def test_nothing_looks_ahead(window: int | None) -> None:
    """A changed token changes no output before it."""
    query, key, value = (x.detach() for x in qkv(17))
    before = attend(query, key, value, scale=1, window=window)
    for x in (query, key, value):
        x[:, :, 9] += 1
    after = attend(query, key, value, scale=1, window=window)
    assert torch.equal(after[:, :, :9], before[:, :, :9])
    assert not torch.equal(after[:, :, 9:], before[:, :, 9:])


@pytest.mark.parametrize("tokens", [1, 17, 2 * 17, 3 * 17, 4 * 17, 9 * 17, 24 * 17])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_backward_of_some_heads_at_a_time_equals_the_explicit_mask(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    heads: int,
    kv_heads: int,
    sinks: bool,
    batch: int,
) -> None:
    """Parts of any size, also those that divide neither the heads nor the query heads of a kv head."""
    monkeypatch.setattr(fused, "TOKENS", tokens)
    tensors = qkv(17, batch, heads, kv_heads)
    given = [torch.randn(heads, dtype=torch.float64, requires_grad=True)] if sinks else []
    variant = Variant(0.7, sinks=given[0] if given else None)
    expected = masked([*tensors, *given], None, None)
    upstream = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, [*tensors, *given], upstream)
    out = fused.attend(*tensors, variant)
    found = torch.autograd.grad(out, [*tensors, *given], upstream)
    for ours, theirs in zip([out, *found], [expected, *truth], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "calls"), [(1, 4), (17, 4), (18, 2), (68, 1)])
def test_long_attention_takes_its_backward_in_parts(
    monkeypatch: pytest.MonkeyPatch, tokens: int, calls: int
) -> None:
    """The kernel's backward runs once for as few heads as hold `TOKENS` tokens; short attention stays whole."""
    monkeypatch.setattr(fused, "TOKENS", tokens)
    heads_of: list[int] = []
    whole = flash.CPU

    def watched(grad: Tensor, *args: Any, **options: Any) -> flash.Grads:
        heads_of.append(grad.shape[1])
        return whole.gradients(grad, *args, **options)

    monkeypatch.setattr(flash, "CPU", whole._replace(gradients=watched))
    query, key, value = qkv(17, batch=1, heads=4, kv_heads=2)
    sdpa(query, key, value, 0.7).sum().backward()
    assert heads_of == ([] if calls == 1 else [4 // calls] * calls)


def test_what_the_flash_kernel_does_not_compute_stays_with_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values of another width than keys, and calls without gradients."""
    monkeypatch.setattr(fused, "TOKENS", 1)
    query, key, value = qkv(17)
    assert fused.in_parts(query, key, value, 0.7)
    assert fused.in_parts(*qkv(2), 0.7)  # as many tokens as kv heads
    assert not fused.in_parts(query, key, torch.cat([value, value], dim=3), 0.7)
    with torch.no_grad():
        assert not fused.in_parts(query, key, value, 0.7)
    with sdpa_kernel(SDPBackend.MATH):
        assert not fused.in_parts(query, key, value, 0.7)


@pytest.mark.parametrize("name", CORES)
def test_flash_operators_run_the_kernels_that_pytorch_knows(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By PyTorch's names of them; PyTorch's own kernel is left as the user set it."""
    core = CORES[name]
    known = {"flash_attention_3": "FA3", "flash_attention_4": "FA4"}
    assert core.by_operator == (name in {"sdpa", "sdpa_flash", *known})
    assert set(known.values()) <= set(torch.nn.attention.list_flash_attention_impls())
    asked: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(type(core), "missing", lambda _: None)
    core.activate()
    assert asked == ([known[name]] if name in known else [])


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4"])
def test_a_kernel_that_is_not_installed_is_not_activated(name: str) -> None:
    """The error names the package."""
    with pytest.raises(ValueError, match="is not installed"):
        CORES[name].activate()


def test_gradients_of_a_single_head_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to put together, so those of the kernel are returned as they are."""
    x, logsumexp = torch.ones(1, 1, 2 * fused.TOKENS, 1), torch.ones(1, 1, 2 * fused.TOKENS)
    found = (x + 1, x + 2, x + 3)
    monkeypatch.setattr(fused.flash, "attend_backward", lambda *_, **__: found)
    assert fused.gradients(x, x, x, x, x, logsumexp, [], scale=1.0) is found


def test_a_single_document_is_not_copied() -> None:
    """Its output is what the kernel made, which backward keeps already."""
    x = torch.ones(1, 2, 5, 4)
    made: list[Tensor] = []

    def next_to(query: Tensor, *_: object) -> Tensor:
        made.append(query + 1)
        return made[-1]

    assert each_document(next_to, x, x, x, Variant(scale=1.0), [[5]]) is made[0]
    two = each_document(next_to, x, x, x, Variant(scale=1.0), [[2, 3]])
    assert torch.equal(two, torch.cat(made[1:], dim=2))
