"""Modules that mix tokens otherwise than by the attention interface run on whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from training import config_of, run_steps

from alst_impl import enable, hf, models
from alst_impl.config import TrainConfig
from alst_impl.layout import Layout, make_mesh
from alst_impl.ops.attention.gather import gather

if TYPE_CHECKING:
    from conftest import Ranks

FAMILIES = Path(__file__).parents[1] / "families"


def family(name: str, **settings: Any) -> TrainConfig:
    """A run of a tiny model of type `name`."""
    settings = {"seqlen": 43, **settings}
    config = config_of(model="tiny-llama", **settings)
    return config.model_copy(update={"model": str(FAMILIES / f"{name}.json"), "overrides": {}})


def gathered(rank: int, world_size: int, plans: list[Layout]) -> list[tuple[Tensor, Tensor]]:
    """Body of a rank: the whole of a sequence cut by each layout, and this rank's gradient of a sum over it."""
    results = []
    for plan in plans:
        layout = Layout(
            plan.length, cp=plan.cp, sp=plan.sp, order=plan.order, mesh=make_mesh([plan], "cpu")
        )
        positions = layout.positions(layout.shard)
        x = positions.double()[None, :, None].expand(2, -1, 3).clone().requires_grad_()
        whole = gather(x, layout, 1)
        # Each rank weighs the tokens differently, so gradients of all ranks must reach a token.
        (whole * (rank + 1) * torch.arange(layout.padded)[None, :, None]).sum().backward()
        assert x.grad is not None
        results.append((whole.detach()[0, :, 0], x.grad[0, :, 0] / positions.clamp(min=1)))
    return results


def test_every_rank_gets_the_whole_sequence_in_order(ranks: Ranks) -> None:
    """In both orders, over one axis and over two; a token's gradient is the sum of what all ranks ask of it."""
    plans = [
        Layout(17, sp=4),
        Layout(17, cp=4),
        Layout(17, cp=4, order="zigzag"),
        Layout(17, cp=2, sp=2, order="zigzag"),
    ]
    for results in ranks(4)(gathered, plans):
        for plan, (whole, grad) in zip(plans, results, strict=True):
            assert torch.equal(whole, torch.arange(plan.padded).double())
            assert set(grad.tolist()) - {0.0} == {1.0 + 2 + 3 + 4}
            assert (grad == 0).sum() <= 1  # position 0 has weight 0


@pytest.mark.parametrize(
    ("name", "attention", "mixers"),
    [
        ("llama", {"LlamaAttention"}, set()),
        ("gpt2", {"GPT2Attention"}, set()),
        ("qwen3_next", {"Qwen3NextAttention"}, {"Qwen3NextGatedDeltaNet"}),
        ("lfm2", {"Lfm2Attention"}, {"Lfm2ShortConv"}),
        ("mamba2", set(), {"Mamba2Mixer"}),
        ("deepseek_v3", {"DeepseekV3Attention"}, set()),
        ("deepseek_v32", set(), {"DeepseekV32Attention"}),  # its indexer compares tokens
        ("zaya", set(), {"ZayaAttention"}),  # with a convolution before attention
        ("gpt_neo", set(), {"GPTNeoAttention"}),  # without the interface
    ],
)
def test_modules_that_mix_tokens_are_found_by_structure(
    name: str, attention: set[str], mixers: set[str]
) -> None:
    """Attention that mixes tokens in the interface alone is sharded; all other mixers are gathered."""
    model, _ = models.build(family(name))
    assert {type(m).__name__ for m in hf.attention_modules(model)} == attention
    assert {type(m).__name__ for m in hf.mixers(model)} == mixers


def refusals(rank: int, world_size: int, configs: list[TrainConfig]) -> list[str]:
    """Body of a rank: the message with which each run is refused."""
    messages = []
    for config in configs:
        with pytest.raises(ValueError, match="use ") as error:
            run_steps(rank, world_size, config)
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_gathered_is_refused_with_its_reason(ranks: Ranks) -> None:
    """Packed documents, biases by position, positions that a shard would count itself, losses of their own."""
    alst = {"method": {"name": "alst", "sp": 2}, "world_size": 2}
    cases = {
        "cannot tell packed documents apart": family("lfm2", **alst, data={"documents": 3}),
        "gets 'alibi'": family("bloom", **alst),
        "would count positions from the start of each shard": family("bart", **alst),
        "computes its loss by itself": family("whisper", **alst),
    }
    for found in ranks(2)(refusals, list(cases.values())):
        for reason, message in zip(cases, found, strict=True):
            assert reason in message


def hidden_keys(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Body of a rank: attention whose model hides one more key, from a token of each rank."""
    for place in (None, (0, 0, -1, -3)):
        model = models.materialize(family("gpt_neo"))
        alst = enable(model, **options)

        def hide(_: Any, args: Any, kwargs: Any, place: Any = place) -> Any:
            mask = kwargs["attention_mask"].clone()
            if place is not None:
                mask[place] = False if mask.dtype == torch.bool else -1e9
            return args, {**kwargs, "attention_mask": mask}

        hf.mixers(model)[0].register_forward_pre_hook(hide, with_kwargs=True)
        ids = torch.arange(1, 21)[None]
        inputs = alst.shard({"input_ids": ids, "labels": ids})
        if place is None:
            model(**inputs)
        else:
            with pytest.raises(ValueError, match="neither causal nor a sliding window"):
                model(**inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"sp": 2},
        {"cp": 2, "method": "ring"},
        {"cp": 2, "method": "ring", "placement": "contiguous"},
    ],
    ids=["alst", "zigzag", "contiguous"],
)
def test_a_mask_of_another_kind_is_refused(ranks: Ranks, options: dict[str, Any]) -> None:
    """In both orders of tokens: the mask of the whole sequence is made anew, so that of a shard must be known."""
    ranks(2)(hidden_keys, options)


def test_slices_of_a_pipeline_do_not_cut_mixers(ranks: Ranks) -> None:
    """A slice would restart them."""
    config = family("zaya", method={"name": "seq1f1b", "slices": 2})
    (messages,) = ranks(1)(refusals, [config])
    assert "layers that mix tokens" in messages[0]
