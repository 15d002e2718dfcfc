"""Patterns of attention: their masks, and what the cores compute with them, beside dense masks made token by token."""

from __future__ import annotations

import csv
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from training import assert_same_gradients, config_of, run_steps, truth_of
from transformers import BigBirdConfig
from transformers.masking_utils import sliding_window_overlay

import alst_impl
from alst_impl.config import Spec, TrainConfig
from alst_impl.layout import Documents, Layout
from alst_impl.models import materialize
from alst_impl.ops.attention import flex, patterns, sparse
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.meetings import Meeting, Sight
from alst_impl.ops.attention.patterns.base import Pattern, as_pattern
from alst_impl.ops.attention.variant import Variant
from alst_impl.plugin import names
from alst_impl.step import check
from harness.formulas.flops import Shape, attention_forward
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
IDS = torch.arange(61)[None] * 7 % 260
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
    count = min(o.get("random_blocks", 3), len(between))
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
@pytest.mark.parametrize("samples", [((ODD,),), ((70, 1, 78), (ODD,)), ((33, ODD - 33),)])
def test_flex_visits_the_blocks_that_are_seen(
    options: dict[str, Any], block: int, samples: flex.Samples
) -> None:
    """Each block with a key that some query sees is listed once, and as whole only if all queries see all its keys.

    A document may begin with the second key of a block.
    """
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
WINDOWED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ring": (PATTERNS[1], {"name": "ring", "cp": 2}, {}),
    "ring-and-global-tokens": (PATTERNS[3], {"name": "ring", "cp": 3}, {}),
    "contiguous": (PATTERNS[3], {"name": "ring", "cp": 4, "placement": "contiguous"}, {}),
    "many-global-tokens": (PATTERNS[4], {"name": "ring", "cp": 4}, {"data": {"documents": 1}}),
    "unequal-samples": (
        PATTERNS[3],
        {"name": "ring", "cp": 2},
        {"batch_size": 2, "engine": "fsdp2"},
    ),
    "usp": (PATTERNS[3], {"name": "usp", "cp": 2, "sp": 2}, {}),
    "chunked": (PATTERNS[1], {"name": "chunked", "chunk": 30}, {}),
}


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
    expected = truth_of(config).gradients
    full = truth_of(config.model_copy(update={"attention": Spec(name="sdpa")})).gradients
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (expected[name] - full[name]).norm() > 0.01 * full[name].norm()  # it hides something
    run = ranks(config.world_size)(run_steps, config)[0]
    exact = {"float64": 1e-12, "float32": 1e-5}[config.dtype]
    assert_same_gradients(run.gradients, expected, exact, exact)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_as_the_stock_model_with_the_same_mask(ranks: Ranks, run: str) -> None:
    """Under methods with whole sequences of some heads, and every engine."""
    options, method, settings = RUNS[run]
    assert_gradients_are_those_of_the_same_mask(ranks, config_with(options, method, **settings))


@pytest.mark.parametrize("run", WINDOWED)
def test_methods_that_compute_windows_take_a_pattern_that_is_one(ranks: Ranks, run: str) -> None:
    """A ring sends keys to the ranks that see them alone, and global tokens to all."""
    options, method, settings = WINDOWED[run]
    assert_gradients_are_those_of_the_same_mask(ranks, config_with(options, method, **settings))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("borders", [None, [(0, 70, 71, 160)], [(0, 70, 71, 160), (0, 9, 11, 160)]])
def test_a_ring_computes_every_pair_once(zigzag: bool, borders: list[Any] | None) -> None:
    """Those of windows and of global tokens, which do not make other keys travel further."""
    sight = Sight(4, 20 if zigzag else 40, zigzag, 5, borders, 3)
    assert zigzag or sight.offsets() == [0, 1]
    samples = borders or [(0, 160)]
    seen = torch.zeros(len(samples), 160, 160, dtype=torch.int64)
    layout = Layout(160, cp=4, order="zigzag" if zigzag else "contiguous")
    held = [layout.positions(rank) for rank in range(4)]
    shared = torch.full((len(samples), sight.num_global), -1)
    for rank in range(4):
        for sample, into, own in sight.global_places(rank):
            shared[sample, into] = held[rank][own]
    for rank in range(4):
        for index in range(len(samples)):
            calls = [(met, shared[index]) for met in sight.global_meetings(rank)]
            calls += [(met, held[by]) for by in range(4) for met in sight.meetings(rank, by)]
            for met, places in calls:
                if index in range(len(samples))[met.samples]:
                    seen[index] += counted(met, held[rank], places)
    expected = [
        torch.block_diag(*(dense(PATTERNS[3], b - a).double() for a, b in pairwise(each)))
        for each in samples
    ]
    assert torch.equal(seen, torch.stack(expected).long())


def counted(met: Meeting, queries: Tensor, keys: Tensor) -> Tensor:
    """How often a call computes each pair, [160, 160]."""
    rows, columns = queries[met.queries].chunk(met.blocks), keys[met.keys].chunk(met.blocks)
    found = torch.zeros(160, 160, dtype=torch.int64)
    for row, column in zip(rows, columns, strict=True):
        mask = torch.ones(len(row), len(column), dtype=torch.bool)
        if met.causal:
            mask = mask.triu() if met.backwards else mask.tril()
        found[row[:, None], column] += mask
    return found


def test_every_pattern_is_among_those_of_these_tests() -> None:
    """And so it has a dense mask in the program that computes the truth."""
    assert {options["name"] for options in PATTERNS} == set(names(patterns.__name__))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "window", "window": 0}, "window = 0: .* greater than or equal to 1"),
        ({"name": "window", "window": 4, "dilation": 0}, "dilation = 0: .* greater than or equal"),
        ({"name": "window", "window": 4, "global_tokens": 67}, r"global_tokens \(67\) .* up to 66"),
        (
            {"name": "window", "window": 4, "dilation": 67},
            r"dilation \(67\) .* use dilation up to 66",
        ),
        ({"name": "block_sparse", "block": 68}, r"block \(68\) .* use block up to 67"),
        ({"name": "block_sparse", "block": 16, "random_blocks": 6}, r"\(6\) .* up to 5"),
        (
            {"name": "windows", "window": 4},
            "unknown pattern 'windows'; use one of block_sparse, win",
        ),
        ({"name": "window", "windows": 4}, "windows = 4: Extra inputs are not permitted"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused_in_one_line(
    options: dict[str, Any], words: str
) -> None:
    """The error names the value, the rule and the way out."""
    attention = {"name": "sdpa", "pattern": options}
    with pytest.raises(ValueError, match=words) as caught:
        check(config_of(method="alst", attention=attention))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"method": "layerwise"}, PATTERNS[1], "'layerwise' does not .* use method 'alst'"),
        ({"method": "seq1f1b"}, PATTERNS[1], "'seq1f1b' does not .* use method 'alst'"),
        ({"method": "deepspeed_alst"}, PATTERNS[1], "'deepspeed_alst' does not"),
        ({"method": {"name": "ring", "cp": 2}}, PATTERNS[5], "'ring' does not .* 'alst'"),
        ({"method": {"name": "chunked", "chunk": 30}}, PATTERNS[3], "'chunked' does not"),
        (
            {"model": "tiny-mistral", "overrides": {"sliding_window": 13}},
            PATTERNS[1],
            "sliding_window=.* a model without",
        ),
    ],
)
def test_a_pattern_is_refused_where_it_is_not_computed(
    settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    """By methods whose attention knows no pattern, and for layers that have a window of their own."""
    settings = {"method": "alst", "world_size": 2, **settings}
    with pytest.raises(ValueError, match=words) as caught:
        check(config_of(**settings, attention={"name": "sdpa", "pattern": options}))
    assert "\n" not in str(caught.value)


def test_a_kernel_without_patterns_refuses_one() -> None:
    """It names those that have them."""
    spec = Spec(name="flash_attention_2", options={"pattern": PATTERNS[1]})
    with pytest.raises(ValueError, match=r"window \(window=7\); use attention 'sdpa' or 'flex'"):
        load_core(spec)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_a_kernel_with_patterns_takes_one(name: str) -> None:
    """As the refusal of the others says."""
    spec = Spec(name=name, options={"pattern": PATTERNS[1]})
    pattern = load_core(spec).pattern
    assert pattern is not None
    assert pattern.text == "window (window=7)"


def test_attention_without_options_is_written_as_its_name() -> None:
    """As before it could have options, so that keys of cells and files of runs stay valid."""
    plain = config_of(attention={"name": "sdpa"})
    assert plain.model_dump()["attention"] == "sdpa"
    assert plain == config_of() == TrainConfig(**plain.model_dump())
    asked = {"name": "sdpa", "pattern": PATTERNS[1]}
    sparse_run = config_of(attention=asked)
    assert sparse_run.model_dump(mode="json")["attention"] == asked
    assert str(sparse_run.attention) == "sdpa (pattern=window (window=7))"


def test_flops_are_those_of_the_pattern() -> None:
    """Two matrix products over its pairs, in each packed document."""
    shape = Shape(
        num_parameters=1,
        num_lookup_parameters=0,
        num_layers=3,
        hidden_size=8,
        num_heads=2,
        head_dim=4,
    )
    pattern = pattern_of(PATTERNS[3])
    pairs = sum(int(dense(PATTERNS[3], n).sum()) for n in (70, 79))
    assert attention_forward(shape, [70, 79], pattern) == 2 * 2 * 4 * 2 * 3 * pairs


def published() -> dict[str, str]:
    """Value of each published fact."""
    path = Path(__file__).parents[2] / "experiments/published/attention_patterns.csv"
    with path.open(newline="") as file:
        return {row["item"]: row["value"] for row in csv.DictReader(file)}


def test_a_window_is_that_of_transformers() -> None:
    """Its mask, pair by pair, and that of attention sinks by their formula."""
    rows = torch.arange(ODD)
    q, k = rows[:, None], rows
    overlay = sliding_window_overlay(7)(0, 0, q, k)
    mask = pattern_of(PATTERNS[1]).sees(ODD, rows.device)(q, k)
    assert published()["sliding_window"] == "q - k < window"
    assert torch.equal(mask, overlay)
    assert torch.equal(mask, q - k < 7)
    with_sinks = pattern_of(PATTERNS[3]).sees(ODD, rows.device)(q, k)
    assert published()["attention_sinks"] == "k < n_sink or q - k < window"
    assert torch.equal(with_sinks, (k < 3) | (q - k < 5))


def test_defaults_of_blocks_are_those_of_bigbird() -> None:
    """As transformers has them, and the published table."""
    found, theirs = pattern_of({"name": "block_sparse"}).model_dump(), BigBirdConfig()
    assert found["block"] == theirs.block_size == int(published()["block_size"])
    assert found["random_blocks"] == theirs.num_random_blocks
    assert theirs.num_random_blocks == int(published()["num_random_blocks"])


def test_flex_has_no_backward_on_a_cpu() -> None:
    """PyTorch says so, and the core offers another."""
    query, key, value, _ = (x.float() for x in inputs())
    with pytest.raises(NotImplementedError):
        flex_attention.flex_attention(query, key, value, enable_gqa=True)
    core = load_core(Spec(name="flex", options={"pattern": PATTERNS[1]}))
    with pytest.raises(ValueError, match="no backward on cpu; use attention 'sdpa'"):
        core(query, key, value, layout=Layout(ODD), variant=Variant(1))


def loss_of_an_enabled_model(rank: int, world_size: int) -> float:
    """Body of a rank: the loss of a model of the user's, whose attention has a pattern."""
    model = materialize(config_of(dtype="float64"))
    attention = {"name": "sdpa", "pattern": PATTERNS[3]}
    alst = alst_impl.enable(model, sp=world_size, attention=attention)
    batch = alst.shard({"input_ids": IDS, "labels": IDS})
    return float(model(**batch).loss.detach())


def test_an_enabled_model_takes_a_pattern(ranks: Ranks) -> None:
    """The library's loss is that of the stock model with a dense mask."""
    mask = dense(PATTERNS[3], IDS.shape[1])[None, None].double().log()
    stock = materialize(config_of(dtype="float64"))
    expected = float(stock(input_ids=IDS, labels=IDS, attention_mask=mask).loss.detach())
    assert sum(ranks(2)(loss_of_an_enabled_model)) / 2 == pytest.approx(expected, rel=1e-6)
