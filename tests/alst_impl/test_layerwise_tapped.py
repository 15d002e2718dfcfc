"""Layers of unknown parts train exactly in tiles, and what tiles would make wrong is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from phantoms import NEEDED, cell, stepped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training import assert_same_gradients, config_of, corpus_of, run_steps, truth_of

from alst_impl import hf, step
from alst_impl.config import TrainConfig
from alst_impl.hf import known
from alst_impl.layout import Layout
from alst_impl.methods.base import load_method
from alst_impl.models import materialize, published
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.layerwise.arguments import rows_of, unsliceable
from alst_impl.ops.layerwise.attention import HeadAttention
from alst_impl.ops.layerwise.headgroups import HeadGroups
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Ranks

FOLDER = Path(__file__).parents[1] / "families"
FAMILIES = {
    "gemma3_text": "pre- and post-norms, sliding windows beside full attention, two rotary embeddings",
    "gemma2": "soft-capped scores",
    "olmo2": "post-norms, norms of queries and keys over all heads",
    "cohere": "a parallel block",
    "glm4": "a partial rotary embedding",
    "granite": "multipliers",
    "gpt2": "fused projections of another class, no rotary embedding",
    "deepseek_v3": "latent keys and values, experts",
    "qwen3_moe": "experts",
    "gpt_oss": "attention sinks beside windows, experts",
    "llama4_text": "chunked attention, experts",
    "afmoe": "a gate on attention's output",
}
"""Model types without the fast path, and what they have."""


def of(family: str, **settings: Any) -> TrainConfig:
    """A run of method `layerwise` on a tiny model of type `family`, in tiles of 9 rows."""
    settings["method"] = {"name": "layerwise", "rows": 9, **settings.get("method", {})}
    return config_of(model=str(FOLDER / f"{family}.json"), seqlen=45, **settings)


def assert_exact(ranks: Ranks, *configs: TrainConfig) -> None:
    """Every gradient of each run is that of the stock model in fp64. The runs have equally many ranks."""
    runs = ranks(configs[0].world_size)(_first_steps, list(configs))[0]
    for config, run in zip(configs, runs, strict=True):
        assert_same_gradients(run, truth_of(config).gradients)


def _first_steps(
    rank: int, world_size: int, configs: list[TrainConfig]
) -> list[dict[str, Tensor] | None]:
    """Body of a rank: the first step's gradients of each run."""
    runs = [run_steps(rank, world_size, config) for config in configs]
    return [run and run.gradients for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sp", [1, 2])
def test_every_gradient_is_the_stock_models(ranks: Ranks, family: str, sp: int) -> None:
    """For layers with parts that are not known by name, in several tiles, on one rank and two."""
    assert_exact(ranks, of(family, world_size=sp, method={"sp": sp}))


@pytest.mark.parametrize("dim", [10, 24])
def test_values_of_other_head_dims(ranks: Ranks, dim: int) -> None:
    """Narrower and wider ones than those of 16 of queries and keys, in two groups."""
    config = of(
        "deepseek_v3", world_size=2, overrides={"v_head_dim": dim}, method={"sp": 2, "groups": 2}
    )
    assert_exact(ranks, config)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "granite_swa", "deepseek_v3"])
def test_packed_documents_do_not_see_each_other(ranks: Ranks, family: str) -> None:
    """Tested with windows, soft-caps, sinks and latent keys, over two ranks."""
    assert_exact(ranks, of(family, data={"documents": 3}, world_size=2, method={"sp": 2}))


OPTIONS: list[dict[str, Any]] = [
    {"groups": 1},
    {"groups": 2, "keep_attention": True},
    {"groups": 1, "stream": True},
    {"every": 2},
    {"blocks": 3, "offload": False},
    {"overlap": True},
]


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_options_change_no_gradient(ranks: Ranks, family: str) -> None:
    """Head groups, blocks, saved tensors and their place change no gradient, with two samples per batch."""
    runs = [of(family, world_size=2, batch_size=2, method={"sp": 2, **o}) for o in OPTIONS]
    assert_exact(ranks, *runs)


@pytest.mark.parametrize("engine", ["fsdp2", {"name": "zero", "stage": 3}], ids=str)
def test_engines_that_gather_weights(ranks: Ranks, engine: Any) -> None:
    """The layer is gathered as a whole, also where its forward ends at attention. Tested over two steps."""
    assert_exact(ranks, of("qwen3_moe", world_size=2, engine=engine, method={"sp": 2, "every": 2}))


ADAPTED: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("q_proj", "v_proj"), {}),
    (("o_proj", "up_proj", "down_proj"), {"groups": 1}),
    (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), {"every": 2, "stream": True}),
]
"""Modules with adapters, and options."""


@pytest.mark.parametrize(("targets", "options"), ADAPTED, ids="-".join)
@pytest.mark.parametrize(
    "model", ["tiny-llama", str(FOLDER / "gemma3_text.json")], ids=["llama", "gemma3"]
)
def test_adapters_are_parts_of_their_layers(
    ranks: Ranks, model: str, targets: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Every gradient of an adapter is the stock model's. One at a projection takes Llama off the fast path."""
    method = {"name": "layerwise", "sp": 2, "rows": 9, **options}
    lora = {"rank": 2, "targets": targets}
    assert_exact(ranks, config_of(model=model, method=method, lora=lora, world_size=2, seqlen=45))


def test_bf16_gradients_are_near_the_truth(ranks: Ranks) -> None:
    """Queries and values keep the dtype that the layer gave them."""
    config = of("gemma3_text", world_size=2, dtype="bfloat16", method={"sp": 2})
    found = ranks(2)(_first_steps, [config])[0][0]
    assert_same_gradients(found, truth_of(config).gradients, ratio=5e-2, cosine=1e-2)


def test_known_layers_keep_the_fast_path() -> None:
    """Llama's and Qwen3's parts are known; those of the families here are not."""
    for model in ("tiny-llama", "tiny-qwen3"):
        layers = hf.decoder_layers(materialize(config_of(model=model)))
        assert all(known.read(layer) is not None for layer in layers)
    for family in FAMILIES:
        layers = hf.decoder_layers(materialize(of(family)))
        assert all(known.read(layer) is None for layer in layers), family


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["softcap", "sinks", "both"])
@pytest.mark.parametrize("documents", [None, ((9, 14), (23,))])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_some_heads_equals_its_formula(
    part: str, documents: tuple[tuple[int, ...], ...] | None, window: int | None
) -> None:
    """Output and gradients, those of the sinks included, equal autograd's through softmax."""
    torch.manual_seed(0)
    sizes = [(2, 4, 23, 8), (2, 2, 23, 8), (2, 2, 23, 8), (4,)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    *tensors, sinks = inputs
    softcap = None if part == "sinks" else 2.0
    variant = Variant(0.3, window, softcap=softcap, sinks=None if part == "softcap" else sinks)
    upstream = torch.randn(2, 4, 23, 8, dtype=torch.float64)
    wanted = inputs if variant.sinks is not None else tensors
    expected = by_formula(*tensors, variant, documents or ((23,),) * 2)
    truths = torch.autograd.grad(expected, wanted, upstream)
    with torch.no_grad():
        attention = HeadAttention.of(variant, 2, 23, documents, None)
        out, *kept = attention.forward(*tensors)
        grads, of_sinks = attention.backward(upstream, *tensors, out, *kept)
    found = [out, *grads, *([] if of_sinks is None else [of_sinks])]
    for ours, truth in zip(found, [expected, *truths], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, variant: Variant, documents: Any
) -> Tensor:
    """Causal attention with a mask, a soft-cap and a column of sinks."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = query @ key.mT * variant.scale
    if variant.softcap is not None:
        scores = variant.softcap * (scores / variant.softcap).tanh()
    number = torch.stack(
        [torch.repeat_interleave(torch.arange(len(d)), torch.tensor(d)) for d in documents]
    )
    place = torch.arange(scores.shape[-1])
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= (variant.window or 99))
    hidden = hidden | (number[:, :, None] != number[:, None])
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    if variant.sinks is not None:
        column = variant.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(dim=-1)[..., : value.shape[2]] @ value


def test_arguments_are_sliced_along_their_tokens() -> None:
    """Tensors in tuples and dicts are sliced; a feature axis of as many entries is left alone."""
    rows, position = slice(2, 5), torch.arange(7)
    value = {"a": (position, position.expand(3, 1, 7)), "b": torch.rand(1, 7, 7), "c": None}
    found = rows_of(value, rows, 7)
    assert torch.equal(found["a"][0], position[2:5])
    assert found["a"][1].shape == (3, 1, 3)
    assert torch.equal(found["b"], value["b"][:, 2:5])
    assert found["c"] is None
    assert unsliceable("x", value, 7) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.rand(1, 1, 7, 7), "shape [1, 1, 7, 7]"),
        ((None, torch.rand(7, 7)), "'x[1]' has shape [7, 7]"),
        ({"y": torch.rand(3)}, "'x['y']' has shape [3]"),
        (torch.rand(1, 7, requires_grad=True), "requires a gradient"),
        (object(), "is a object"),
    ],
    ids=["a mask", "in a tuple", "in a mapping", "with a gradient", "an object"],
)
def test_arguments_that_cannot_be_sliced_are_named(value: Any, reason: str) -> None:
    """The reason says which tensor it is, and its shape."""
    assert reason in (unsliceable("x", value, 7) or "")


def test_groups_by_default_multiply_the_projections_by_four_at_most() -> None:
    """Where a group projects all heads, the default is the largest legal number up to a limit."""
    assert HeadGroups.of(32, 8, 1, None).num_groups == 32
    assert HeadGroups.of(32, 8, 1, None, most=4).num_groups == 4
    assert HeadGroups.of(6, 3, 1, None, most=4).num_groups == 3
    assert HeadGroups.of(32, 8, 1, 16, most=4).num_groups == 16


# -- refusals -------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone() -> Iterator[DeviceMesh]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "sp"))
    finally:
        dist.destroy_process_group()


def first_step(config: TrainConfig, mesh: DeviceMesh) -> None:
    """Forward and backward of a step."""
    placement = Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)
    corpus = corpus_of(config)
    batches = step.micro_batches(config, corpus, method, mesh, 0, placement.device)
    step.accumulate_gradients(method, runtime, batches)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("diffllama", "DiffLlamaDecoderLayer in tiles, because it calls attention more than once"),
        ("minimax", "does not mix tokens in one call of transformers' attention interface alone"),
        ("gpt_neo", "does not mix tokens in one call of transformers' attention interface alone"),
        ("lfm2", "mixes tokens outside attention (conv.conv, Conv1d)"),
        ("gemma4_text", "'per_layer_input' is a tensor that requires a gradient"),
        ("gemma3n_text", "hidden states of 4 axes"),
        ("phimoe", "draws random numbers"),
        (
            "deepseek_v32",
            "does not mix tokens in one call of transformers' attention interface alone",
        ),
    ],
)
def test_what_tiles_do_not_allow_is_refused(family: str, reason: str) -> None:
    """The error names the layer, the reason and a way out, in one line."""
    with alone() as mesh, pytest.raises(ValueError, match="use method 'alst'") as caught:
        first_step(of(family), mesh)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


class Changed(nn.Module):
    """A module with a change to its output [B, s, E]."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        return self.change(out)


def shifted(x: Tensor) -> Tensor:
    """Adds the token before, as a causal convolution does."""
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def looked_ahead(x: Tensor) -> Tensor:
    """Adds the token after."""
    return x + torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def counted(x: Tensor) -> Tensor:
    """Adds what depends on the place in the tile."""
    return x + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


def averaged(x: Tensor) -> Tensor:
    """Adds the mean over tokens."""
    return x + x.mean(dim=1, keepdim=True)


def noisy(x: Tensor) -> Tensor:
    """Dropout without a module."""
    return nn.functional.dropout(x, 0.1)


@pytest.mark.parametrize("change", [shifted, looked_ahead, counted, averaged, noisy])
@pytest.mark.parametrize("place", ["mlp", "self_attn.q_proj", "self_attn.o_proj"])
def test_a_layer_that_mixes_tokens_is_refused_whatever_its_parts_are_called(
    change: Callable[[Tensor], Tensor], place: str
) -> None:
    """The first call compares rows at the border of two tiles, and the states of random generators."""
    config = of("granite")
    model = materialize(config).train()
    parent, _, name = f"model.layers.0.{place}".rpartition(".")
    inner = model.get_submodule(f"{parent}.{name}")
    setattr(model.get_submodule(parent), name, Changed(inner, change))
    ids = torch.arange(45)[None]
    reason = "draws random numbers" if change is noisy else "rows at the border of tiles differ"
    with alone() as mesh:
        load_method(config.method).apply(model, config, mesh, Placement(torch.device("cpu")))
        with pytest.raises(ValueError, match=reason):
            model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize(
    "config", [of("granite"), config_of(method="layerwise")], ids=["granite", "llama"]
)
def test_a_cache_is_refused(config: TrainConfig) -> None:
    """Tiles have no place in a cache of keys and values."""
    model = materialize(config).train()
    with alone() as mesh:
        load_method(config.method).apply(model, config, mesh, Placement(torch.device("cpu")))
        with pytest.raises(ValueError, match="key/value cache; set use_cache=False"):
            model(input_ids=torch.arange(45)[None], use_cache=True)


def test_keys_of_another_layer_are_refused() -> None:
    """They would not get gradients through this layer's input, and would be those of another tile."""
    config = of("granite")
    model = materialize(config).train()
    projection: Any = model.get_submodule("model.layers.0.self_attn.k_proj")
    vars(projection)["forward"] = lambda x: x.new_zeros(*x.shape[:2], projection.out_features)
    with alone() as mesh:
        load_method(config.method).apply(model, config, mesh, Placement(torch.device("cpu")))
        with pytest.raises(ValueError, match="has a key that does not depend on its own hidden"):
            model(input_ids=torch.arange(45)[None], use_cache=False)


def test_a_layout_is_found_where_layers_are_not_given_one() -> None:
    """It is noted on the attention modules when the decoder is called."""
    config = of("gpt2")
    model = materialize(config)
    with alone() as mesh:
        load_method(config.method).apply(model, config, mesh, Placement(torch.device("cpu")))
        modules = hf.attention_modules(model)
        tap = vars(modules[0])["alst_attention"]
        assert tap.noted_layout() is None
        vars(modules[0])["noted_layout"] = Layout(45)
        assert tap.noted_layout() == Layout(45)


# -- memory ---------------------------------------------------------------------------------------


@NEEDED[0]
@NEEDED[1]
def test_peak_is_that_of_the_fast_path_at_as_many_groups(tmp_path: Path) -> None:
    """Granite has Llama's shapes. In four groups both take as much, and in one group it takes more."""
    changed = {"model_type": "granite", "logits_scaling": 1.0, "residual_multiplier": 0.5}
    granite = tmp_path / "granite.json"
    granite.write_text(json.dumps({**published("tiny-llama"), **changed}))

    cells = [
        cell(
            model=model,
            method={"name": "layerwise", "sp": 2, "groups": groups},
            seqlen=16_384,
            world_size=2,
        )
        for groups, model in ((4, "tiny-llama"), (4, str(granite)), (1, str(granite)))
    ]
    fast, tapped, whole = (
        step.memory.phase_peak_bytes["backward"] for step in stepped(*cells) if step.memory
    )
    assert tapped <= fast * 1.02
    assert whole > tapped * 1.1
