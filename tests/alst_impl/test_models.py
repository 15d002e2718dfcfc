"""Published configurations become stock models with reproducible weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from training import Run, assert_trains_as, config_of, run_steps, truth_of

from alst_impl import models, step
from alst_impl.config import Spec, TrainConfig
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from conftest import Ranks
    from transformers import PreTrainedModel

PARAMETERS = {
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "llama2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "gpt-2.7b": 2_775_208_960,
    "tiny-gemma3": 632_000,
    "tiny-llama": 918_144,
    "tiny-mistral": 918_144,
    "tiny-qwen3": 901_824,
    "tiny-qwen3-moe": 1_017_536,
}
"""Number of parameters, as published or counted by hand from the configuration."""


def on_meta(name: str) -> PreTrainedModel:
    """The model without memory for its parameters."""
    return models.build(TrainConfig(model=name, method="baseline", seqlen=8))[0]


@pytest.mark.parametrize("name", models.names())
def test_every_configuration_builds_without_memory(name: str) -> None:
    """On the meta device, even 70B parameters take no memory."""
    parameters = list(on_meta(name).parameters())
    assert parameters
    assert all(p.is_meta for p in parameters)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_configuration_has_its_number_of_parameters(name: str) -> None:
    """The number is exact; tied parameters count once."""
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("tiny-")])
def test_tiny_models_have_two_layers_and_eight_heads(name: str) -> None:
    """Defects in stacked layers and in head sharding only show with these."""
    fields = models.published(name)
    assert fields["num_hidden_layers"] >= 2
    assert fields["num_attention_heads"] == 8


@pytest.mark.parametrize(
    "written",
    ["llama3.1-8b", "Llama3.1_8B", "LLAMA 3.1 8B", "llama-3.1-8b", "meta-llama/Llama-3.1-8B"],
)
def test_small_spelling_of_a_name_is_forgiven(written: str) -> None:
    """Case, spaces, `-`, `_`, and an organisation."""
    assert models.canonical(written) == "llama3.1-8b"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("lama3.1-8b", r"use llama3\.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", r"use llama3\.1-8b"),
        ("./tiny-llama", "unknown model './tiny-llama'"),
        ("/tiny-llama", "unknown model '/tiny-llama'"),
        ("no/such/tiny-llama", "unknown model 'no/such/tiny-llama'"),
    ],
)
def test_a_name_that_is_not_known_offers_near_ones(written: str, words: str) -> None:
    """A path that is not there is no published name."""
    with pytest.raises(ValueError, match=words):
        models.published(models.canonical(written))


def test_a_folder_and_a_cached_name_of_the_hub_come_before_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user has is meant, not our file of the same name."""
    monkeypatch.chdir(tmp_path)
    revision = "0" * 40
    cached = Path("cache/models--some--tiny-llama")
    for folder, layers in ((Path("tiny-llama"), 7), (cached / "snapshots" / revision, 9)):
        folder.mkdir(parents=True)
        config = {**models.published("tiny-llama"), "num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    found = {
        name: models.published(models.canonical(name))["num_hidden_layers"]
        for name in ("./tiny-llama", "some/tiny-llama", "other/tiny-llama", "tiny-llama")
    }
    own = models.published("tiny-llama")["num_hidden_layers"]
    assert found == {
        "./tiny-llama": 7,
        "some/tiny-llama": 9,
        "other/tiny-llama": own,
        "tiny-llama": own,
    }


def weights(**settings: object) -> dict[str, Tensor]:
    """Initial weights of a tiny model."""
    model = models.materialize(config_of(**settings))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [name for name in models.names() if name.startswith("tiny-")])
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    """The same seed gives the same bits, another seed gives others, and no matrix is constant."""
    first, again, other = weights(model=name), weights(model=name), weights(model=name, seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    matrices = [key for key in first if first[key].dim() > 1]
    assert all(not torch.equal(first[key], other[key]) for key in matrices)
    assert all(float(first[key].std()) > 0 for key in matrices)


def test_making_weights_leaves_the_global_generator_alone() -> None:
    """A library must not reseed its caller."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights()
    assert torch.equal(torch.rand(3), expected)


def test_all_dtypes_start_from_one_model() -> None:
    """Weights are drawn in fp32 and then cast."""
    single = weights()
    for dtype in ("float64", "bfloat16"):
        other = weights(dtype=dtype)
        assert all(torch.equal(other[k], single[k].to(getattr(torch, dtype))) for k in single)


def test_tied_weights_stay_tied() -> None:
    """They are one parameter with two names."""
    model = models.materialize(config_of(model="tiny-gemma3"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def initial_state(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor] | None:
    """Body of a rank: full parameters before any step."""
    mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "sp"))
    _, runtime = step.start(config, mesh, Placement(torch.device("cpu")))
    state = {name: value.clone() for name, value in runtime.state_dict().items()}
    return state if rank == 0 else None


def assert_starts_from(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and, to the bit, the same values."""
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero"])
def test_initial_weights_are_the_same_under_every_engine(ranks: Ranks, engine: str) -> None:
    """Equal for any sharding, also with tied weights."""
    config = config_of(model="tiny-gemma3", engine=engine, world_size=2)
    state = ranks(2)(initial_state, config)[0]
    assert_starts_from(state, weights(model="tiny-gemma3"))


@pytest.mark.parametrize("engine", ["plain", "zero"])
def test_a_folder_with_weights_is_trained_from_them(
    ranks: Ranks, engine: str, tmp_path: Path
) -> None:
    """The folder is as `save_pretrained` writes it."""
    saved = models.materialize(config_of(seed=7))
    saved.save_pretrained(tmp_path / "model")
    config = config_of(model=str(tmp_path / "model"), engine=engine, world_size=2)
    state = ranks(2)(initial_state, config)[0]
    assert_starts_from(state, {name: p.detach() for name, p in saved.named_parameters()})


def test_a_path_to_a_configuration_is_a_model(tmp_path: Path) -> None:
    """The path is a file or its folder. Without weights in the folder they are drawn as for a published model."""
    published = Path(models.__file__).parent / "tiny-llama.json"
    path = tmp_path / "config.json"
    path.write_text(published.read_text())
    by_name = weights()
    for model in (path, tmp_path):
        found = weights(model=str(model))
        assert all(torch.equal(found[name], by_name[name]) for name in by_name)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    """The error lists the known models, or those with a similar name."""
    with pytest.raises(ValueError, match=r"unknown model 'x'; use one of .*llama3.1-70b, .*tiny-q"):
        models.published("x")
    with pytest.raises(ValueError, match=r"unknown model 'lama3.1-8b'; use llama3.1-8b or "):
        models.published("lama3.1-8b")


def test_an_unknown_override_is_refused_with_the_known_ones() -> None:
    """Otherwise it would silently have no effect."""
    with pytest.raises(ValueError, match=r"override 'layers' is not a field .* num_hidden_layers"):
        models.published("tiny-llama", {"layers": 3})


@pytest.mark.parametrize("text", ["[]", "{}", "no json"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """The error names the path."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a model configuration"):
        models.published(str(path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attn_logit_softcapping": 50.0}, "soft-capped attention logits"),
        (
            {"attention_dropout": 0.1},
            "attention dropout (attention_dropout=0.1: kernels, tiles and rings draw no masks",
        ),
        ({"attn_pdrop": 0.1}, "of attention weights; 0 turns it off)"),
        (
            {"layerdrop": 0.1},
            "skipped at random, which each rank would choose alone (layerdrop=0.1;",
        ),
        ({"output_router_logits": True}, "a router loss"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention in layer 1"),
        ({"model_type": "gpt_oss"}, "attention sinks"),
    ],
)
def test_features_that_sharding_would_change_are_named(
    fields: dict[str, object], reason: str
) -> None:
    """A method can name the feature in its error."""
    found = models.unsupported({"model_type": "llama", **fields})
    assert found is not None
    assert reason in found


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "sliding_window": 5,
}
UNFUSED = [
    {**SIZES, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 8},
    {
        **SIZES,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
]


def steps_of(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Run | None]:
    """Body of a rank: one step of each run."""
    return [run_steps(rank, world_size, config) for config in configs]


def test_models_without_fused_attention_in_transformers_train(ranks: Ranks, tmp_path: Path) -> None:
    """Method 'baseline' uses their eager attention, and ALST its own for sinks and soft-caps; both are exact."""
    configs = []
    for fields in UNFUSED:
        path = tmp_path / f"{fields['model_type']}.json"
        path.write_text(json.dumps(fields))
        stock = config_of(model=str(path), dtype="float64", seqlen=21)
        configs += [stock, stock.model_copy(update={"method": Spec(name="alst")})]
    for config, run in zip(configs, ranks(1)(steps_of, configs)[0], strict=True):
        assert_trains_as(run, truth_of(config))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope_parameters": DYNAMIC}, "dynamic"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}, "su"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"rope_scaling": None}, None),
    ],
)
def test_rotary_scaling_by_the_longest_position_is_found(
    fields: dict[str, object], scaling: str | None
) -> None:
    """It is found under both names of the field, in old spellings, and for one kind of layer."""
    assert models.rotary_by_longest(fields) == scaling


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ({"name": "alst", "sp": 2}, "use sp=1"),
        ({"name": "layerwise", "sp": 2}, "use sp=1"),
        ({"name": "ring", "cp": 2}, "use cp=1"),
        ({"name": "usp", "cp": 2}, "use cp=1"),
        ({"name": "seq1f1b", "slices": 2}, "use slices=1"),
        ({"name": "alst"}, None),
        ({"name": "ring"}, None),
        ({"name": "seq1f1b", "pp": 2, "slices": 1}, None),
        ({"name": "mst"}, None),
    ],
)
def test_rotary_scaling_by_the_longest_position_is_refused_on_cut_sequences(
    method: dict[str, object], way_out: str | None
) -> None:
    """The error is one line with a fix. Methods that keep sequences whole are not refused."""
    settings = config_of(method=method, world_size=2, overrides={"rope_parameters": DYNAMIC})
    if way_out is None:
        step.check(settings)
        return
    with pytest.raises(ValueError, match=f"rotary scaling 'dynamic'.*{way_out}$"):
        step.check(settings)


def test_published_models_can_be_sharded() -> None:
    """No published model has an unsupported feature."""
    assert [models.unsupported(models.published(name)) for name in models.names()] == [None] * len(
        models.names()
    )


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4}, (48, 3, 4)),
        (
            {
                "model_type": "gemma3",
                "text_config": {
                    "hidden_size": 40,
                    "num_hidden_layers": 5,
                    "num_attention_heads": 8,
                },
            },
            (40, 5, 8),
        ),
        ({"model_type": "llama"}, (4096, 32, 32)),
    ],
    ids=["other names", "nested", "defaults"],
)
def test_sizes_are_read_from_the_configuration_object(
    fields: dict[str, object], sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Also where a `config.json` names them otherwise, nests them, or leaves them out."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    found = models.described(str(path))
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    assert tuple(models.field(found, key) for key in keys) == sizes


FAMILIES = Path(__file__).parents[1] / "families"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("diffllama", "model.layers.0.self_attn.lambda_q1"),  # drawn by the constructor, on the CPU
        ("qwen3_next", "model.layers.0.mlp.gate.weight"),  # drawn by the module around it
        ("apertus", "model.layers.0.mlp.act_fn.beta"),  # a constant of the constructor
    ],
)
def test_weights_that_transformers_does_not_draw_are_the_same_in_every_process(
    name: str, tensor: str
) -> None:
    """They depend on the seed alone, whatever the state of the random generators."""
    config = config_of().model_copy(
        update={"model": str(FAMILIES / f"{name}.json"), "overrides": {}}
    )
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(models.materialize(config).state_dict()[tensor])
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
