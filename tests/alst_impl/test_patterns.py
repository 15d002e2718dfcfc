"""Patterns of attention: their masks, and what the cores compute with them, beside dense masks made token by token."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from training import assert_same_gradients, config_of, run_steps

from alst_impl.config import Spec, TrainConfig
from alst_impl.layout import Documents, Layout
from alst_impl.models import materialize
from alst_impl.ops.attention import flex, sparse
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.patterns.base import Pattern, as_pattern
from alst_impl.ops.attention.variant import Variant
from harness.gate import truth
from harness.gate.gradients import pattern_of as pattern_of_run
from harness.gate.gradients import samples_of
from harness.gate.verdict import TOLERANCES
from tests.conftest import Ranks

PATTERNS: list[dict[str, Any]] = [
    {"name": "window", "window": 1},
    {"name": "window", "window": 7},
    {"name": "window", "window": 500},
    {"name": "window", "window": 5, "global_tokens": 3},
    {"name": "window", "window": 1, "global_tokens": 90},
    {"name": "window", "window": 4, "dilation": 3},
    {"name": "window", "window": 2, "dilation": 71, "global_tokens": 1},
    {"name": "window", "window": 3, "dilation": 2, "global_tokens": 9},
    {"name": "block_sparse", "block": 8},
    {
        "name": "block_sparse",
        "block": 5,
        "window_blocks": 1,
        "global_blocks": 0,
        "random_blocks": 0,
    },
    {"name": "block_sparse", "block": 3, "global_blocks": 2, "random_blocks": 4, "seed": 7},
    {"name": "block_sparse", "block": 90, "random_blocks": 2},
]
ODD = 149
DOCUMENTS: list[Documents | None] = [None, ((70, 1, 78), (149,)), ((9, 140), (9, 140))]
named = pytest.mark.parametrize("options", PATTERNS, ids=lambda o: "-".join(map(str, o.values())))


def seen(options: dict[str, Any], query: int, key: int) -> bool:
    """The definition of each pattern, for one pair of places in a document."""
    if key > query:
        return False
    o = dict(options)
    if o.pop("name") == "window":
        steps, rest = divmod(query - key, o.get("dilation", 1))
        return (not rest and steps < o["window"]) or key < o.get("global_tokens", 0)
    block, last, first = o["block"], o.get("window_blocks", 3), o.get("global_blocks", 1)
    own, other = query // block, key // block
    between = np.arange(first, own - last + 1)
    count = min(o.get("random_blocks", 1), len(between))
    rng = np.random.default_rng([o.get("seed", 0), own])
    drawn = rng.choice(between, count, replace=False) if count else []
    return own - other < last or other < first or other in drawn


@lru_cache
def _dense(options: tuple[tuple[str, Any], ...], length: int) -> Tensor:
    rows = range(length)
    return torch.tensor([[seen(dict(options), q, k) for k in rows] for q in rows])


def dense(options: dict[str, Any], length: int) -> Tensor:
    """The mask of a document, bool [n, n]."""
    return _dense(tuple(options.items()), length)


def pattern_of(options: dict[str, Any]) -> Pattern:
    found: Pattern = as_pattern(options)
    return found


@named
def test_the_mask_is_that_of_the_definition(options: dict[str, Any]) -> None:
    """Token by token."""
    rows = torch.arange(ODD)
    mask = pattern_of(options).sees(ODD, rows.device)(rows[:, None], rows)
    assert torch.equal(mask & (rows <= rows[:, None]), dense(options, ODD))


@named
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_runs_hold_every_key_that_is_seen_and_no_empty_tile(
    options: dict[str, Any], rows: int
) -> None:
    """They ascend and do not touch. Both ends of each run are seen by some query."""
    pattern, mask = pattern_of(options), dense(options, ODD)
    for first in range(0, ODD, rows):
        stop = min(first + rows, ODD)
        runs = pattern.runs(first, stop)
        covered = torch.zeros(ODD, dtype=torch.bool)
        for start, end in runs:
            covered[start:end] = True
        assert all(a[1] < b[0] for a, b in pairwise(runs))
        some = mask[first:stop].any(0)
        assert not (some & ~covered).any()
        assert all(some[start] and some[end - 1] for start, end in runs)


@named
@pytest.mark.parametrize("documents", [None, ((70, 1, 78), (149,))])
def test_visible_pairs_are_those_of_the_mask(
    options: dict[str, Any], documents: Documents | None
) -> None:
    """Counted one by one over all documents."""
    core = load_core(Spec(name="sdpa", options={"pattern": options}))
    lengths = [n for sample in documents or ((ODD,),) for n in sample]
    expected = sum(int(dense(options, n).sum()) for n in lengths)
    assert core.visible_pairs(Layout(ODD, documents=documents)) == expected


def expected_attention(
    options: dict[str, Any], tensors: list[Tensor], variant: Variant, documents: Documents | None
) -> Tensor:
    """PyTorch's operators on all S x S scores."""
    query, key, value = tensors
    samples = documents or ((ODD,),) * len(query)
    mask = torch.stack(
        [torch.block_diag(*(dense(options, n).double() for n in sample)) for sample in samples]
    )
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    scores = query @ key.mT * variant.scale
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
    if variant.sinks is not None:
        column = variant.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
    return scores.softmax(3)[..., :ODD] @ value


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value with fewer kv heads and a longer head dim of values, and sinks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, ODD, 6), (2, 2, ODD, 6), (2, 2, ODD, 8), (4,)]
    return [
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]


def loss(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()


@named
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (0.5, True)])
def test_tiles_are_exact(
    options: dict[str, Any], documents: Documents | None, softcap: float | None, with_sinks: bool
) -> None:
    """Output and every gradient equal those of dense scores with the same mask, in fp64, at an odd length."""
    assert ODD > 2 * sparse.ROWS
    core = load_core(Spec(name="sdpa", options={"pattern": options}))
    results = []
    for ours in (True, False):
        *tensors, sinks = inputs()
        variant = Variant(0.7, softcap=softcap, sinks=sinks if with_sinks else None)
        if ours:
            out = core(*tensors, layout=Layout(ODD, documents=documents), variant=variant)
        else:
            out = expected_attention(options, tensors, variant, documents)
        loss(out).backward()
        grads = [x.grad for x in [*tensors, *([sinks] if with_sinks else [])]]
        results.append([out.detach(), *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's definition of FlexAttention, whose gradients are allowed on a CPU, in place of the compiled kernel."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_without_sinks", flex.without_sinks)
    monkeypatch.setattr(flex, "_with_sinks", flex.with_sinks)


@pytest.mark.usefixtures("uncompiled")
@named
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_flex_has_the_same_mask(options: dict[str, Any], documents: Documents | None) -> None:
    """Output and every gradient equal those of dense scores, by PyTorch's own definition of the kernel."""
    results = []
    for ours in (True, False):
        *tensors, sinks = inputs()
        variant = Variant(0.7, softcap=0.5, sinks=sinks)
        if ours:
            out = flex.attend(*tensors, variant, documents, pattern_of(options))
        else:
            out = expected_attention(options, tensors, variant, documents)
        loss(out).backward()
        results.append([out.detach(), *(x.grad for x in [*tensors, sinks])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@named
@pytest.mark.parametrize("block", [4, 16, 32])
@pytest.mark.parametrize("samples", [((ODD,),), ((70, 1, 78), (ODD,))])
def test_flex_visits_the_blocks_that_are_seen(
    options: dict[str, Any], block: int, samples: flex.Samples
) -> None:
    """Each block with a key that some query sees is listed once, and as whole only if all queries see all its keys."""
    for sample, found in enumerate(samples):
        mask = torch.block_diag(*(dense(options, n).double() for n in found)).bool()
        part, whole = (
            {(row, column) for which, row, column in pairs.tolist() if which == sample}
            for pairs in flex.listed_blocks(samples, pattern_of(options), block)
        )
        assert not part & whole
        for row in range(-(-ODD // block)):
            for column in range(-(-ODD // block)):
                tile = mask[row * block : (row + 1) * block, column * block : (column + 1) * block]
                if tile.any():
                    assert (row, column) in part | whole
                if (row, column) in whole:
                    assert tile.all()
                    assert tile.shape[1] == block


@pytest.mark.parametrize("options", [PATTERNS[3], {"name": "block_sparse", "block": 128}], ids=str)
def test_tables_of_blocks_stay_small(options: dict[str, Any]) -> None:
    """At a million tokens; both directions list the same blocks."""
    block, tables = flex.sparse_tables(((2**20,),), pattern_of(options))
    assert block == 1_024
    assert max(place.numel() for _, place in tables) <= flex.ENTRIES
    kv, whole_kv, q, whole_q = (int(number.sum()) for number, _ in tables)
    assert (kv, whole_kv) == (q, whole_q)


ULYSSES = {"name": "alst", "sp": 2, "tiles": 3}
ZERO = {"engine": {"name": "zero", "stage": 3}, "dtype": "float32"}
RUNS = {
    "window-and-global-tokens": (PATTERNS[3], ULYSSES, {}),
    "dilated": (PATTERNS[5], ULYSSES, {}),
    "random-blocks": (PATTERNS[10], ULYSSES, {}),
    "fsdp2": (PATTERNS[10], ULYSSES, {"engine": "fsdp2"}),
    "zero": (PATTERNS[10], ULYSSES, ZERO),
    "baseline": (PATTERNS[10], {"name": "baseline"}, {}),
    "mst": (PATTERNS[7], {"name": "mst"}, {"engine": "fsdp2", "dtype": "float32"}),
}
WINDOWED = [
    {"name": "ring", "cp": 2},
    {"name": "usp", "cp": 2, "sp": 2},
    {"name": "chunked", "chunk": 30},
]


def config_with(options: dict[str, Any], method: dict[str, Any], **more: Any) -> TrainConfig:
    """A run whose attention has a pattern, with packed documents at an odd length, and accumulation."""
    settings = {"dtype": "float64", "accumulation": 2, "data": {"documents": 3, "mask": "prefix"}}
    return config_of(
        **{**settings, **more},
        method=method,
        seqlen=ODD,
        world_size=max(2, method.get("cp", 1) * method.get("sp", 1)),
        attention={"name": "sdpa", "pattern": options},
    )


def assert_gradients_are_those_of_the_same_mask(ranks: Ranks, config: TrainConfig) -> None:
    """Every gradient is that of the stock model in fp64 with a dense mask."""
    model = materialize(config).double()  # the weights that the run starts with
    samples, pattern = samples_of(config, 0), pattern_of_run(config)
    assert pattern is not None
    full = truth.gradients_of(model, samples)
    model.zero_grad()
    samples["masks"] = truth.masks(pattern, samples["position_ids"])
    expected = truth.gradients_of(model, samples)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (expected[name] - full[name]).norm() > 0.1 * full[name].norm()  # the pattern hides much
    del expected["loss"]
    run = ranks(config.world_size)(run_steps, config)[0]
    exact = TOLERANCES[config.dtype]
    assert_same_gradients(run.gradients, expected, exact.ratio, exact.cosine)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_as_the_stock_model_with_the_same_mask(ranks: Ranks, run: str) -> None:
    """Under methods with whole sequences of some heads, and every engine."""
    options, method, settings = RUNS[run]
    assert_gradients_are_those_of_the_same_mask(ranks, config_with(options, method, **settings))


@pytest.mark.parametrize("method", WINDOWED, ids=itemgetter("name"))
def test_methods_that_compute_windows_take_a_pattern_that_is_one(
    ranks: Ranks, method: dict[str, Any]
) -> None:
    """A ring sends keys to the ranks that see them alone."""
    config = config_with(PATTERNS[1], method)
    assert_gradients_are_those_of_the_same_mask(ranks, config)
