"""Hugging Face models are changed from outside, one instance at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from training import config_of
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    PreTrainedModel,
    StableLmConfig,
)

from alst_impl import hf, models
from alst_impl.layout import Layout, Part
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.ulysses import UlyssesAttention
from alst_impl.placement import Evidence, no_evidence

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = ["tiny-gemma3", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-qwen3-moe"]
IDS = torch.randint(260, (2, 11), generator=torch.Generator().manual_seed(1))


def build(name: str = "tiny-llama") -> PreTrainedModel:
    """A tiny model in fp64."""
    return models.materialize(config_of(model=name, dtype="float64"))


def wrap(model: PreTrainedModel, tiles: int = 3) -> Evidence:
    """Apply everything that ALST does to a model, without ranks."""
    evidence = no_evidence()
    hf.use_attention(model, UlyssesAttention(load_core("sdpa"), evidence))
    mlps, norms = hf.token_wise_modules(model)
    for module in mlps + norms:
        hf.tile_module(module, lambda _: tiles, evidence)
    hf.tile_loss(model, lambda _: tiles, evidence)
    hf.checkpoint_layers(model, None)
    return evidence


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits of `IDS`."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_a_wrapped_model_without_labels_returns_the_stock_logits(name: str) -> None:
    """Generation and evaluation still work."""
    model = build(name)
    stock = logits_of(model)
    evidence = wrap(model)
    torch.testing.assert_close(logits_of(model), stock, rtol=1e-10, atol=1e-12)
    assert evidence["tiles"] > 0


def test_a_second_model_of_the_same_configuration_object_stays_as_it_was() -> None:
    """Its logits are the same to the bit, its attention is transformers' own, and its modules are not tiled."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.manual_seed(1)
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert first.config is second.config
    before, attention = logits_of(second), second.config._attn_implementation
    wrap(first)
    assert torch.equal(logits_of(second), before)
    assert second.config._attn_implementation == attention == "sdpa"
    assert first.config._attn_implementation == hf.ATTENTION
    assert not any(hasattr(m, "_z3_leaf") for m in second.modules())
    assert torch.equal(logits_of(LlamaForCausalLM(config).eval()).isfinite(), before.isfinite())


@pytest.mark.parametrize("name", MODELS)
def test_attention_gets_no_mask(name: str) -> None:
    """No S x S tensor is built in forward or backward, even with a sliding window."""
    model = build(name)
    evidence = no_evidence()
    seen: list[tuple[Any, Any]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(query.shape), options))
        return load_core("sdpa")(query, key, value, **options)

    class Recording(UlyssesAttention):
        __call__ = staticmethod(record)

    hf.use_attention(model, Recording(load_core("sdpa"), evidence))
    masks: list[Any] = []
    for module in hf.attention_modules(model):
        module.register_forward_pre_hook(
            lambda _, __, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
    positions = torch.arange(5).repeat(3)[None, :11].expand(2, 11)  # restart, as in packed samples
    layout = Layout(11, documents=((5, 5, 1),) * 2)
    model(input_ids=IDS, position_ids=positions, layout=layout, use_cache=False)
    assert masks == [None, None]
    assert [shape for shape, _ in seen] == [(2, 8, 11, 16)] * 2
    assert all(options["layout"] is layout for _, options in seen)
    windows = [options["variant"].window for _, options in seen]
    expected = {"tiny-gemma3": [96, None], "tiny-mistral": [96, 96]}
    assert windows == expected.get(name, [None, None])


@pytest.mark.parametrize(
    "config_class", [StableLmConfig, NemotronConfig], ids=lambda c: c.model_type
)
def test_packed_documents_reach_every_attention(config_class: Any) -> None:
    """Also of models whose layers keep their keyword arguments to themselves, and when a layer is recomputed."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **heads)).double().train()
    positions = torch.tensor([*range(5), *range(6)]).expand(2, 11)
    inputs = {"input_ids": IDS, "position_ids": positions, "use_cache": False}
    gradients = []
    for ours in (False, True):
        layout = {"layout": Layout(11, documents=((5, 6),) * 2)} if ours else {}
        if ours:
            wrap(model)
        model.zero_grad()
        model(**inputs, **layout).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, stock in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], stock, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "config_class", [StableLmConfig, NemotronConfig], ids=lambda c: c.model_type
)
def test_a_recomputed_layer_has_the_layout_of_its_own_forward(config_class: Any) -> None:
    """Also if another batch with other documents ran forward in between."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **heads)).double().train()
    packed = ((5, 6), (3, 4, 4))
    gradients = []
    for ours in (False, True):
        if ours:
            wrap(model)
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for documents in packed:
            positions = torch.cat([torch.arange(n) for n in documents]).expand(2, 11)
            layout = {"layout": Layout(11, documents=(documents,) * 2)} if ours else {}
            output = model(input_ids=IDS, position_ids=positions, use_cache=False, **layout)
            total = total + output.logits.square().mean()
        total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, stock in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], stock, rtol=1e-9, atol=1e-12)


def test_attention_that_is_not_causal_is_refused() -> None:
    """Shards and kernels are causal."""
    model = build()
    wrap(model)
    hf.attention_modules(model)[0].is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention is not causal"):
        logits_of(model)


def test_a_layout_of_another_length_is_refused() -> None:
    """It would cut or gather the wrong tokens."""
    model = build()
    wrap(model)
    with pytest.raises(ValueError, match="got 11 tokens of a sample, but its layout says 12"):
        model(input_ids=IDS, layout=Layout(12, documents=((5, 7),) * 2), use_cache=False)


def test_a_pipeline_needs_layers_that_pass_on_their_arguments() -> None:
    """Other micro-batches run between a layer's forward and its recomputation."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 260, "num_hidden_layers": 1}
    config = NemotronConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    wrap(model)
    for layout in (Layout(11, pp=2, documents=((5, 6),) * 2), Layout(22, part=Part(0, 0, 2))):
        with pytest.raises(ValueError, match="NemotronAttention, which a pipeline needs"):
            model(input_ids=IDS, layout=layout, use_cache=False)


def test_an_attention_mask_is_refused() -> None:
    """Otherwise a padding mask would be dropped silently."""
    model = build()
    wrap(model)
    hook = hf.attention_modules(model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": torch.ones(2, 1, 11, 11)}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        logits_of(model)
    hook.remove()


def test_a_padding_mask_given_to_the_model_is_refused() -> None:
    """It has zeros that attention would ignore."""
    model = build()
    wrap(model)
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        model(input_ids=IDS, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("name", ["position_bias", "of_another_model"])
def test_attention_that_sharding_would_change_is_refused(name: str) -> None:
    """A tensor that attention is not known to get may belong to heads or positions of the full model."""
    model = build()
    wrap(model)
    with pytest.raises(ValueError, match=f"'{name}' is not supported"):
        model(input_ids=IDS, use_cache=False, **{name: torch.ones(8)})


@pytest.mark.parametrize(
    ("name", "num_mlps", "num_norms"),
    [
        ("tiny-llama", 2, 5),
        ("tiny-mistral", 2, 5),
        ("tiny-qwen3", 2, 9),
        ("tiny-qwen3-moe", 2, 9),
        ("tiny-gemma3", 2, 13),  # six norms a layer
    ],
)
def test_token_wise_modules_are_found_by_structure(
    name: str, num_mlps: int, num_norms: int
) -> None:
    """Every layer has one MLP, the norms around it and norms of queries and keys; the model has a final norm."""
    model = build(name)
    mlps, norms = hf.token_wise_modules(model)
    assert (len(mlps), len(norms)) == (num_mlps, num_norms)
    assert len(hf.decoder_layers(model)) == len(hf.attention_modules(model)) == 2
    inside = {id(m) for a in hf.attention_modules(model) for m in a.modules()}
    assert not inside & {id(m) for m in mlps}
    assert hf.head_name(model) == "lm_head"


def without_mlp(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = nn.Identity()


def without_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()


def without_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList()


def without_head(model: Any) -> None:
    model.lm_head = None


@pytest.mark.parametrize(
    ("remove", "find", "message"),
    [
        (without_mlp, hf.token_wise_modules, "LlamaDecoderLayer has no MLP"),
        (without_attention, hf.attention_modules, "LlamaForCausalLM has no module that uses"),
        (without_layers, hf.decoder_layers, "LlamaForCausalLM has no layers"),
        (without_head, hf.head_name, "LlamaForCausalLM has no output embedding"),
    ],
)
def test_a_model_that_lacks_a_part_is_refused_by_name(
    remove: Callable[[Any], None], find: Callable[[Any], Any], message: str
) -> None:
    """Nothing is skipped silently."""
    model = build()
    remove(model)
    with pytest.raises(ValueError, match=message):
        find(model)


def test_tiles_are_counted_as_they_run() -> None:
    """Two MLPs, five norms and the loss have three tiles each. There are never more tiles than rows."""
    for asked, used in ((3, 3), (50, 11)):
        model = build()
        evidence = wrap(model, asked)
        with torch.no_grad():
            model(input_ids=IDS, shift_labels=IDS, num_items_in_batch=torch.tensor(22))
        assert evidence["tiles"] == 8 * used
