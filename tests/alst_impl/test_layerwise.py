"""Layerwise training is exact, and its memory is as promised."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from cores import attend
from phantoms import cell, missing, stepped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training import config_of, corpus_of, ratio_and_cosine, run_steps

from alst_impl import hf, step
from alst_impl.config import TrainConfig
from alst_impl.hf.tap import refuse_parts
from alst_impl.methods.base import load_method
from alst_impl.models import build
from alst_impl.ops.attention.flash import attend_backward, attend_with_logsumexp
from alst_impl.ops.layerwise.headgroups import HeadGroups
from alst_impl.ops.memory import float8
from alst_impl.placement import Placement
from harness.gate.verdict import TOLERANCES
from harness.predict.depth import at_depth, structure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Ranks

PHI3 = {
    "model_type": "phi3",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 2048,
    "attention_dropout": 0.0,
    "use_sliding_window": True,
    "sliding_window": 33,
    "max_window_layers": 0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def model_file(folder: Path, fields: dict[str, Any]) -> str:
    """The file of an unpublished configuration."""
    path = folder / f"{fields['model_type']}.json"
    path.write_text(json.dumps(fields))
    return str(path)


def gradients(rank: int, world_size: int, configs: list[TrainConfig]) -> list[dict[str, Tensor]]:
    """Body of a rank: gradients of the first step of each run, from rank 0."""
    runs = [run_steps(rank, world_size, config) for config in configs]
    return [run.gradients for run in runs if run is not None]


def assert_equal_to_stock(
    ranks: Ranks, settings: list[dict[str, Any]], methods: list[dict[str, Any]]
) -> None:
    """Every parameter's gradient equals that of the stock model in the same dtype, to 1e-12 of its norm."""
    sp = methods[0].get("sp", 1)
    stock = [config_of(**{**s, "dtype": "float64", "engine": "plain"}) for s in settings]
    ours = [
        config_of(dtype="float64", method={"name": "layerwise", **m}, world_size=sp, **setting)
        for setting in settings
        for m in methods
    ]
    truths = ranks(1)(gradients, stock)[0]
    found = iter(ranks(sp)(gradients, ours)[0])
    for truth in truths:
        for _ in methods:
            mine = next(found)
            assert mine.keys() == truth.keys()
            for name, expected in truth.items():
                assert (mine[name] - expected).norm() <= 1e-12 * expected.norm(), name


@pytest.mark.parametrize(("sp", "engine"), [(1, "plain"), (2, "fsdp2"), (4, "plain")])
def test_every_gradient_is_the_stock_models(ranks: Ranks, sp: int, engine: str) -> None:
    """Equal for 8, 4, 2 and 1 kv heads of 8 heads, at an indivisible length."""
    settings = [
        {"engine": engine, "seqlen": 67, "overrides": {"num_key_value_heads": kv}}
        for kv in (8, 4, 2, 1)
    ]
    assert_equal_to_stock(
        ranks, settings, [{"sp": sp, "rows": 10}, {"sp": sp, "rows": 10, "stream": True}]
    )


@contextlib.contextmanager
def alone() -> Iterator[DeviceMesh]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "sp"))
    finally:
        dist.destroy_process_group()


DEEP = {"num_hidden_layers": 4}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"groups": 1, "rows": 50},
    {"groups": 2, "rows": 50, "offload": False},
    {"groups": 4, "rows": 7, "keep_attention": True},
    {"rows": 50, "keep_attention": True, "offload": False},
    {"rows": 50, "blocks": 3},
    {"rows": 50, "stream": True},
    {"rows": 50, "stream": True, "keep_attention": True},
]


def test_options_change_no_gradient(ranks: Ranks) -> None:
    """Head groups, tiles, saved tensors and their place change no gradient, with two samples per batch."""
    assert_equal_to_stock(ranks, [{"seqlen": 131, "batch_size": 2}], OPTIONS)


EVERY: list[dict[str, Any]] = [
    {"every": 2, "rows": 50},
    {"every": 3, "rows": 50, "stream": True},
    {"every": 5, "rows": 50, "offload": False},
]


@pytest.mark.parametrize("engine", ["fsdp2", {"name": "zero", "stage": 3}], ids=str)
def test_recomputed_layer_inputs_change_no_gradient(ranks: Ranks, engine: Any) -> None:
    """Tested with five layers, segments that do and do not divide them, two ranks and two micro-batches."""
    setting = {"seqlen": 131, "accumulation": 2, "overrides": {"num_hidden_layers": 5}}
    if engine == "fsdp2":
        assert_equal_to_stock(
            ranks, [{**setting, "engine": engine}], [{**each, "sp": 2} for each in EVERY]
        )
        return
    # DeepSpeed has no fp64, so its run must equal the one with all inputs kept, to the bit.
    runs = [
        config_of(
            **setting,
            engine=engine,
            dtype="float32",
            world_size=2,
            method={"name": "layerwise", "sp": 2, "rows": 50, **each},
        )
        for each in ({}, *EVERY)
    ]
    kept, *again = ranks(2)(gradients, runs)[0]
    for found in again:
        assert found.keys() == kept.keys()
        for name, expected in kept.items():
            assert torch.equal(found[name], expected), name


@pytest.mark.phantom
@pytest.mark.skipif(bool(missing()), reason=missing() or "all there")
def test_host_memory_of_recomputed_layer_inputs() -> None:
    """9 layers in segments of 3 keep three inputs, and in backward the other two of one segment.
    The device holds no more than before.
    """
    method = {"name": "layerwise", "sp": 4, "stream": True}
    deep: dict[str, Any] = {
        "overrides": {"num_hidden_layers": 9},
        "seqlen": 8_192,
        "world_size": 4,
    }
    cells = (cell(method={**method, **more}, **deep) for more in ({}, {"every": 3}))
    before, after = (step.memory for step in stepped(*cells))
    assert before is not None
    assert after is not None
    inputs = 8_192 // 4 * 128 * 2
    assert before.host_peak_bytes - after.host_peak_bytes == (9 - (3 + 2)) * inputs
    train = cell(method="layerwise", seqlen=8_192, overrides={"num_hidden_layers": 9}).train
    two = structure(train).num_parameters - structure(at_depth(train, 7)).num_parameters
    # The bf16 weights of two layers stay gathered until backward has passed them.
    assert after.peak_bytes <= before.peak_bytes + 2 * two


@pytest.mark.parametrize(("sp", "stream"), [(1, False), (2, True)])
def test_8_bit_layer_inputs_change_gradients_within_tolerance(
    ranks: Ranks, sp: int, stream: bool
) -> None:
    """Gradients of four layers have a relative error of at most 5 %, but not zero."""
    method = {"name": "layerwise", "rows": 50, "eight_bits": True, "stream": stream}
    ours = config_of(
        seqlen=131, dtype="float64", method={**method, "sp": sp}, world_size=sp, overrides=DEEP
    )
    stock = config_of(seqlen=131, dtype="float64", overrides=DEEP)
    (truth,) = ranks(1)(gradients, [stock])[0]
    (found,) = ranks(sp)(gradients, [ours])[0]
    tolerance = TOLERANCES[load_method(ours.method).precision(ours)]
    errors = {}
    for name, expected in truth.items():
        ratio, cosine = ratio_and_cosine(found[name], expected)
        assert abs(ratio - 1) <= tolerance.ratio, name
        assert 1 - cosine <= tolerance.cosine, name
        errors[name] = float((found[name] - expected).norm() / expected.norm())
    assert 1e-3 < max(errors.values()) < 6e-2


def test_8_bit_values_have_a_relative_error_of_a_sixteenth() -> None:
    """Values within 14 powers of two of their row's largest have a relative error of at most 1/16.
    Rows of zeros stay zeros.
    """
    torch.manual_seed(0)
    rows = torch.randn(50, 64, dtype=torch.float64) * 10.0 ** torch.arange(-25, 25)[:, None]
    rows[7] = 0
    packed, scale = float8.pack(rows)
    assert (packed.dtype, packed.element_size(), scale.shape) == (float8.DTYPE, 1, (50, 1))
    found = float8.unpack(packed, scale, rows.dtype)
    assert not found[7].any()
    large = rows.abs() > rows.abs().amax(dim=1, keepdim=True) * 2**-14
    assert ((found - rows).abs() <= rows.abs() / 16 * (1 + 1e-6))[large].all()


@pytest.mark.parametrize("sp", [1, 2])
def test_families_of_models(ranks: Ranks, tmp_path: Path, sp: int) -> None:
    """Gradients are exact with QK norms, biases, tied weights, sliding windows, fused projections
    and partial rotary embeddings.
    """
    models = ["tiny-qwen3", "tiny-mistral", *(model_file(tmp_path, f) for f in (PHI3, QWEN2))]
    settings = [{"model": model, "seqlen": 131} for model in models]
    assert_equal_to_stock(ranks, settings, [{"sp": sp, "rows": 50}])


def test_packed_documents_do_not_see_each_other(ranks: Ranks) -> None:
    """Tested with and without windows, over several ranks."""
    settings = [
        {"model": model, "seqlen": 260, "data": {"documents": 3}}
        for model in ("tiny-llama", "tiny-mistral")
    ]
    assert_equal_to_stock(ranks, settings, [{"sp": 2, "rows": 50}])


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [None, ((9, 14), (23,))])
@pytest.mark.parametrize("block", [None, 10, 1])
def test_attention_by_operator_equals_attention_by_autograd(
    num_kv_heads: int,
    window: int | None,
    documents: tuple[tuple[int, ...], ...] | None,
    block: int | None,
) -> None:
    """Output and the three gradients are equal."""
    torch.manual_seed(0)
    heads = (4, num_kv_heads, num_kv_heads)
    tensors = [torch.randn(2, h, 23, 8, dtype=torch.float64, requires_grad=True) for h in heads]
    upstream = torch.randn(2, 4, 23, 8, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.3, "window": window, "documents": documents}
    expected = attend(*tensors, **options)
    expected_grads = torch.autograd.grad(expected, tensors, upstream)
    with torch.no_grad():
        options["block"] = block
        out, logsumexp, rests = attend_with_logsumexp(*tensors, **options)
        grads = attend_backward(upstream, *tensors, out, logsumexp, rests, **options)
    for ours, truth in zip([out, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_groups_hold_every_head_once_beside_its_own_kv_head(
    num_kv_heads: int, degree: int, num_groups: int
) -> None:
    """On every rank, for any number of groups."""
    if 8 // degree % num_groups:
        with pytest.raises(ValueError, match=r"use groups in \["):
            HeadGroups.of(8, num_kv_heads, degree, num_groups)
        return
    groups = HeadGroups.of(8, num_kv_heads, degree, num_groups)
    seen = []
    for group in range(num_groups):
        queries, keys = groups.query_heads(group), groups.key_heads(groups.kv_group(group))
        seen += queries
        for rank in range(degree):
            of_rank = queries[rank * groups.heads : (rank + 1) * groups.heads]
            kv_of_rank = keys[rank * groups.kv_heads : (rank + 1) * groups.kv_heads]
            shared = groups.heads // groups.kv_heads
            for i, head in enumerate(of_rank):
                assert kv_of_rank[i // shared] == head // (8 // num_kv_heads)
    assert sorted(seen) == list(range(8))


def test_the_hook_of_each_parameter_fires_once_and_one_pass_begins_in_each_direction() -> None:
    """Engines reduce a gradient when its hook fires. World `phantom` counts the passes."""
    passes: list[None] = []
    placement = Placement(torch.device("cpu"), on_layer=lambda: passes.append(None))
    config = config_of(method={"name": "layerwise", "rows": 20}, dtype="float32")
    with alone() as mesh:
        method, runtime = step.start(config, mesh, placement)
        fired: list[str] = []
        for name, parameter in runtime.module.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
        batches = step.micro_batches(config, corpus_of(config), method, mesh, 0, placement.device)
        step.accumulate_gradients(method, runtime, batches)
    assert sorted(fired) == sorted(name for name, _ in runtime.module.named_parameters())
    assert len(passes) == 2 * 2  # layers, directions


def test_embeddings_are_freed_once_the_first_layer_has_run() -> None:
    """But not those that the caller gives, which are needed again, and not without gradients."""
    config = config_of(method={"name": "layerwise"}, dtype="float32")
    seen: list[Tensor] = []
    ids, labels = torch.arange(8)[None], torch.arange(1, 9)[None]
    rest = {
        "shift_labels": labels,
        "num_items_in_batch": torch.tensor(8.0),
        "use_cache": False,
    }
    with alone() as mesh:
        model: Any = step.start(config, mesh, Placement(torch.device("cpu")))[1].module
        model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[2]))
        given = torch.ones(1, 8, model.config.hidden_size, requires_grad=True)
        model(input_ids=ids, **rest).loss.backward()
        model(inputs_embeds=given, **rest).loss.backward()
        with torch.no_grad():
            model(input_ids=ids, **rest)
    taken, given, evaluated = (
        (x.shape, x.untyped_storage().nbytes()) for x in (seen[0], given, seen[1])
    )
    assert seen[0].isnan().all()
    assert taken == (given[0], 4)
    assert given == evaluated
    assert given[1] == 4 * 8 * model.config.hidden_size


# -- refusals -------------------------------------------------------------------------------------


def test_dropout_of_a_model_is_refused(tmp_path: Path) -> None:
    """The error names the part and its probability, in one line."""
    fields = {**PHI3, "resid_pdrop": 0.1}
    config = config_of(model=model_file(tmp_path, fields), method={"name": "layerwise"})
    with alone() as mesh, pytest.raises(ValueError, match="use method 'alst'") as caught:
        step.start(config, mesh, Placement(torch.device("cpu")))
    assert "has dropout (resid_attn_dropout, p=0.1)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_is_refused_at_any_depth() -> None:
    """Backward recomputes parts of a layer in another order, so it would draw other random numbers."""
    model, _ = build(config_of())
    layer: Any = hf.decoder_layers(model)[0]
    refuse_parts(layer)
    layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"dropout \(mlp.act_fn.1, p=0.1\); use method 'alst'"):
        refuse_parts(layer)


def test_autocast_is_refused() -> None:
    """Tensors that are kept for backward have the model's dtype."""
    config = config_of(method={"name": "layerwise"})
    with alone() as mesh, torch.autocast("cpu", dtype=torch.bfloat16):
        method, runtime = step.start(config, mesh, Placement(torch.device("cpu")))
        batches = step.micro_batches(
            config, corpus_of(config), method, mesh, 0, torch.device("cpu")
        )
        with pytest.raises(ValueError, match=r"autocast \(torch.bfloat16\); leave autocast"):
            step.accumulate_gradients(method, runtime, batches)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        (
            {"groups": 3},
            {},
            r"groups \(3\) must split the 8 query and 4 kv heads .* \[1, 2, 4, 8\]",
        ),
        ({"stream": True, "offload": False}, {}, "stream keeps tiles in host memory"),
        ({"eight_bits": True, "offload": False}, {}, "set eight_bits: false"),
        ({"every": 3}, {}, r"every .3. is more than the 2 layers"),
        ({"every": 2, "keep_attention": True}, {}, "set keep_attention: false or every: 1"),
        ({"overlap": True}, {}, "exchanges between ranks, but sp is 1"),
        ({}, {"checkpoint": False}, "set checkpoint: true"),
        ({"sp": 3}, {"world_size": 3}, "num_attention_heads"),
    ],
)
def test_impossible_settings_are_refused(
    options: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    """The error names the values, the rule and a fix."""
    config = config_of(method={"name": "layerwise", **options}, **more)
    with pytest.raises(ValueError, match=message):
        load_method(config.method).check(config)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.phantom
@pytest.mark.skipif(bool(missing()), reason=missing() or "all there")
@pytest.mark.parametrize(
    ("method", "tokens", "limit"),
    [
        pytest.param({"name": "layerwise", "sp": 1}, 2**19, 32, id="one GPU"),
        pytest.param({"name": "layerwise", "stream": True}, 2**14, 14, id="one GPU, streaming"),
        pytest.param({"name": "layerwise", "sp": 8}, 2**17, 48, id="eight"),
        pytest.param({"name": "layerwise", "sp": 32}, 2**14, 96, id="thirty-two"),
        pytest.param({"name": "alst", "sp": 8}, 2**16, 86, id="alst on eight"),
    ],
)
def test_bytes_per_token_of_an_8b_llama(method: dict[str, Any], tokens: int, limit: int) -> None:
    """Peak bytes per token stay below the limit, at lengths at which layers hold more than the loss."""
    sp = method.get("sp", 1)
    near, far = (
        cell(
            model="llama3.1-8b",
            overrides={"num_hidden_layers": 2},
            method=method,
            engine={"name": "fsdp2", "offload": True},
            seqlen=of_rank * sp,
            world_size=sp,
        )
        for of_rank in (tokens, 2 * tokens)
    )
    peaks = [step.memory.peak_bytes for step in stepped(near, far) if step.memory]
    assert 0 < (peaks[1] - peaks[0]) / tokens <= limit * 1024
