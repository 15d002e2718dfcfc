"""FlexAttention (arXiv:2412.05496): PyTorch compiles a kernel for a mask and a function of scores that are given as code.

Under causal attention with a window, chunks and packed documents, a query sees a run of keys that ends with its own. So
the first key of every run is the whole mask, and one kernel serves all of them. Which blocks of keys the kernel visits
also follows from it: PyTorch's own way to that (`create_block_mask`) makes an S x S tensor, or compiled one of blocks by
blocks, which takes 4 GiB at a million tokens.
Legend: B batch, S sequence, H query heads, K kv heads, D head dim, n blocks of the sequence, w most blocks that a row lists.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch._dynamo as dynamo
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from alst_impl.layout import Documents
from alst_impl.ops.attention import flash
from alst_impl.ops.attention.patterns.base import Pattern
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import as_it_stands

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

BLOCK = 128
"""Tokens of a block, at least. The kernel's tiles divide it."""
ENTRIES = 2**20
"""Maximum number of entries of a table of blocks. Blocks grow until it holds: at 128K tokens that see all before them
they still have 128 tokens, at a million 1,024, of which the kernel computes 0.1 % too many scores."""
MASKS = 4
"""Masks that are kept: of two variants for two layouts."""
GRAPHS = 64
"""Maximum number of kernels of a process. There is one for each combination of heads, head dims, soft-cap, whether there
are sinks, whether gradients are recorded, size of blocks, and for the first length and all others."""
OPTIONS: FlexKernelOptions = {"BACKEND": "TRITON"}
"""The kernel for few queries, which PyTorch may choose without it, does not take every mask."""

Samples = tuple[tuple[int, ...], ...]
"""Lengths of the documents of each sample."""
Pairs = NDArray[np.int64]
"""Sample, block of queries and block of keys, [N, 3]."""
Table = tuple[Tensor, Tensor]
"""For each row of blocks, how many blocks are listed, [B, 1, n], and which, [B, 1, n, w]; int32."""


@as_it_stands  # the functions that it calls are compiled apart from its caller
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    documents: Documents | None,
    pattern: Pattern | None = None,
) -> Tensor:
    """query [B, H, S, D], key [B, K, S, D], value [B, K, S, V] -> [B, H, S, V] in their dtype, causal. On CUDA.

    A query sees the last `variant.window` keys of its document, or those of `pattern`. `variant.chunk` is ignored: `documents` are cut at the borders of chunks. Scores and sums are in fp32.
    """
    samples = tuple(map(tuple, documents or [[query.shape[2]]]))
    if len(set(samples)) == 1:
        samples = samples[:1]
    mask = block_mask(samples, pattern or variant.window, query.shape[0], query.device)
    wider = max(value.shape[3] / query.shape[3], 1)  # strides of the output over those of the query
    query, key, value = (_within_reach(x, wider) for x in (query, key, value))
    # A soft-cap that is no constant is an error in the kernel.
    with dynamo.config.patch(recompile_limit=GRAPHS, specialize_float=True):
        out, logsumexp = _without_sinks(query, key, value, mask, variant.scale, variant.softcap)
        if variant.sinks is None:
            return out
        # Compiled with it, the kernel's backward would round its sums of output times gradient to the dtype.
        return _with_sinks(out, logsumexp, variant.sinks)


def _within_reach(x: Tensor, times: float) -> Tensor:
    """`x` [B, H, S, D], copied if its tokens lie so far apart that the kernel's 32-bit offsets would overflow.

    See https://github.com/pytorch/pytorch/issues/190857.
    """
    return x if x.shape[2] * x.stride(2) * times < 2**31 else x.contiguous()


def without_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention without sinks, and its log-sum-exp [B, H, S] in fp32. Not compiled, it makes all S x S scores."""
    out, more = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=OPTIONS,
        return_aux=AuxRequest(lse=True),
    )
    assert more.lse is not None, "it was asked for"
    return out, more.lse


def with_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """`out` [B, H, S, V] with one more score for each head, `sinks` [H]."""
    return flash.add_sinks(out, logsumexp, sinks)[0]


# Where the whole function is not one graph there is an error, never the function as it stands.
_without_sinks = torch.compile(without_sinks, fullgraph=True)
_with_sinks = torch.compile(with_sinks, fullgraph=True)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=MASKS)
def block_mask(
    samples: Samples, limit: int | Pattern | None, batch: int, device: torch.device
) -> BlockMask:
    """The mask of `batch` samples with documents of the lengths in `samples`: one for all, or one for each.

    A query sees the last `limit` keys of its document, or those of the pattern `limit`. The mask is made on the host,
    and none of its tensors has more than B x S or `ENTRIES` entries.
    """
    with torch.inference_mode(mode=False):  # it may be made in an evaluation, and kept for training
        sees = None
        if isinstance(limit, Pattern):
            first, sees = first_keys(samples, None), limit.sees(sum(samples[0]), device)
            block, tables = sparse_tables(samples, limit)
        else:
            first = first_keys(samples, limit)
            block = _block_size(first)
            tables = block_tables(first, block)
        kv, whole_kv, q, whole_q = (_on(device, table) for table in tables)
        first = first.to(device).expand(batch, -1)
    seqlen = first.shape[1]

    def mask_mod(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = first[sample, query]
        seen = (key <= query) & (key >= start)
        return seen if sees is None else seen & sees(query - start, key - start)

    lengths, blocks = (seqlen, seqlen), (block, block)
    return BlockMask(lengths, *kv, *whole_kv, *q, *whole_q, BLOCK_SIZE=blocks, mask_mod=mask_mod)


def first_keys(samples: Samples, window: int | None) -> Tensor:
    """The first key that each query sees, int32 [B, S], ascending, on the host."""
    rows = []
    for lengths in samples:
        parts = torch.tensor(lengths, device="cpu")
        rows.append((parts.cumsum(0) - parts).repeat_interleave(parts))
    first = torch.stack(rows)
    if window is not None:
        first = torch.maximum(first, torch.arange(first.shape[1], device="cpu") - window + 1)
    return first.to(torch.int32)


def _block_size(first: Tensor) -> int:
    """The smallest size of blocks, for first keys [B, S], with which no table exceeds `ENTRIES`."""
    block = BLOCK
    while True:
        seen = first[:, ::block] // block
        most = int((torch.arange(seen.shape[1], device="cpu") - seen).max()) + 1
        if seen.numel() * most <= ENTRIES:
            return block
        block *= 2


def block_tables(first: Tensor, block: int) -> tuple[Table, Table, Table, Table]:
    """What the kernel visits, in blocks of `block` tokens, for first keys [B, S] on the host.

    For blocks of queries, the blocks of keys that they see in part, and those that they see whole. For blocks of keys,
    the blocks of queries that see them in part, and those that see them whole. Listed blocks ascend, as the kernel needs
    where the last block is not full: it visits no more tiles than the sequence has.
    """
    samples, seqlen = first.shape
    starts = torch.arange(0, seqlen, block, device="cpu")
    own = torch.arange(len(starts), device="cpu").expand(samples, -1).contiguous()
    # Of queries: the first block that the first one sees, and the first that the last one sees whole, before their own.
    # A query sees nothing before what an earlier one sees, so both ascend.
    seen = first[:, starts].long() // block
    last = first[:, (starts + block).clamp(max=seqlen) - 1].long()
    whole = torch.minimum((last + block - 1) // block, own)
    # Of keys: the block after the last one whose queries see them whole, and whose queries see them at all.
    until_whole, until = (torch.searchsorted(x, own, right=True) for x in (whole, seen))
    return (
        _table((seen, whole), (own, own + 1)),
        _table((whole, own)),
        _table((own, own + 1), (until_whole, until)),
        _table((own + 1, until_whole)),
    )


def _table(run: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor] | None = None) -> Table:
    """The blocks of one or two runs, each from a block to before another, [B, n]."""
    start, stop = run
    following, end = (stop, stop) if more is None else more
    first = stop - start
    number = first + end - following
    column = torch.arange(
        max(int(number.max()), 2), device="cpu"
    )  # 1 would have a kernel of its own
    shift = torch.where(column < first[..., None], start[..., None], (following - first)[..., None])
    place = (column + shift).clamp(max=start.shape[1] - 1)  # those beyond the number are not used
    return number.to(torch.int32).unsqueeze(1), place.to(torch.int32).unsqueeze(1)


def sparse_tables(samples: Samples, pattern: Pattern) -> tuple[int, tuple[Table, ...]]:
    """The smallest size of blocks with which no table exceeds `ENTRIES`, and the tables, as `block_tables` has them."""
    block = BLOCK
    while True:
        rows = len(samples), -(-sum(samples[0]) // block)
        of_queries = listed_blocks(samples, pattern, block)
        of_keys = [pairs[np.lexsort(pairs.T[[1, 2, 0]])][:, [0, 2, 1]] for pairs in of_queries]
        listed = [
            (pairs, np.bincount(pairs[:, 0] * rows[1] + pairs[:, 1], minlength=rows[0] * rows[1]))
            for pairs in (*of_queries, *of_keys)
        ]
        if max(int(number.max()) for _, number in listed) * rows[0] * rows[1] <= ENTRIES:
            return block, tuple(_listed(*each, rows) for each in listed)
        block *= 2


def listed_blocks(samples: Samples, pattern: Pattern, block: int) -> tuple[Pairs, Pairs]:
    """Blocks of keys that a block of queries sees in part, and those that it sees whole, ascending."""
    part, whole = [], []
    for sample, lengths in enumerate(samples):
        borders = [0, *accumulate(lengths)]
        for row, first in enumerate(range(0, borders[-1], block)):
            stop = min(first + block, borders[-1])
            some: set[int] = set()
            every: set[int] = set()
            for document in range(bisect_right(borders, first) - 1, bisect_left(borders, stop)):
                start = borders[document]
                queries = max(first, start) - start, min(stop, borders[document + 1]) - start
                for key, end in pattern.runs(*queries):
                    some |= set(range((start + key) // block, (start + end - 1) // block + 1))
                if queries[1] - queries[0] == stop - first:
                    for key, end in pattern.whole_runs(*queries):
                        every |= set(range(-(-(start + key) // block), (start + end) // block))
            part += [(sample, row, column) for column in sorted(some - every)]
            whole += [(sample, row, column) for column in sorted(every)]
    return np.array(part).reshape(-1, 3), np.array(whole, dtype=int).reshape(-1, 3)


def _listed(pairs: Pairs, number: NDArray[np.int64], rows: tuple[int, int]) -> Table:
    """The table of `pairs`, of which each row has `number`, [B * n]."""
    place = np.zeros((len(number), max(int(number.max()), 2)), dtype=np.int32)
    place[np.arange(place.shape[1]) < number[:, None]] = pairs[:, 2]
    counted = torch.from_numpy(number.astype(np.int32)).view(rows[0], 1, rows[1])
    return counted, torch.from_numpy(place).view(rows[0], 1, rows[1], -1)


def _on(device: torch.device, table: Table) -> Table:
    """`table` on `device`. A change of its width does not need another kernel."""
    number, place = (x.to(device) for x in table)
    dynamo.maybe_mark_dynamic(place, 3)
    return number, place
