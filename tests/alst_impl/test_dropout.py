"""Dropout of a sharded model: which ranks draw which masks, and the distribution that follows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from small import batches, stock_model
from torch import Tensor, nn
from training import config_of, run_steps
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.neftune import activate_neftune

from alst_impl import enable
from alst_impl.config import LoraConfig, TrainConfig
from alst_impl.ops import draws
from alst_impl.ops.memory.recompute import FirstRun, drawing

if TYPE_CHECKING:
    from conftest import Ranks

FAMILIES = Path(__file__).parents[1] / "families"
P = 0.3


def model_of(name: str, **fields: Any) -> PreTrainedModel:
    """A tiny model in fp64."""
    torch.manual_seed(1)
    fields = json.loads((FAMILIES / f"{name}.json").read_text()) | fields
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields)
    )
    return model.double().train()


def adapted(model: PreTrainedModel, projection: str) -> PreTrainedModel:
    """`model` with adapters beside its layers' `projection`, with dropout. Every weight is trained."""
    adapters = peft.LoraConfig(
        r=2,
        target_modules=[projection],
        lora_dropout=P,
        init_lora_weights=False,
        fan_in_fan_out=projection == "c_attn",
    )
    peft.inject_adapter_in_model(adapters, model)
    return model.double().requires_grad_()


def gpt2(**fields: Any) -> PreTrainedModel:
    """GPT-2 with dropout after embedding, attention and MLP, and in adapters."""
    return adapted(model_of("gpt2", embd_pdrop=P, resid_pdrop=P, **fields), "c_attn")


def gpt_neo() -> PreTrainedModel:
    """GPT-Neo, whose attention runs on whole sequences, with dropout in and around it."""
    return adapted(model_of("gpt_neo", embed_dropout=P, resid_dropout=P), "k_proj")


# -- noise on embeddings ---------------------------------------------------------------------------


def noise(rank: int, world_size: int) -> list[Tensor]:
    """Body of a rank: NEFTune's noise on its shard of 21 tokens, and the strength that the loop set, after the step."""
    model = stock_model()
    embedding: Any = model.get_input_embeddings()
    alst = enable(model, sp=world_size)
    activate_neftune(model, 5.0)
    found: list[Tensor] = []
    embedding.register_forward_hook(
        lambda _, ids, out: found.append(out.detach() - embedding.weight[ids[0]].detach())
    )
    ids = batches()[0]["input_ids"]
    model(**alst.shard({"input_ids": ids, "labels": ids})).loss.backward()
    return [*found, torch.tensor(embedding.neftune_noise_alpha)]


def test_noise_on_embeddings_is_as_strong_as_on_whole_samples(ranks: Ranks) -> None:
    """NEFTune's uniform noise has the bound alpha / sqrt(tokens x hidden size), of all tokens of a sample."""
    bound = 5.0 / (21 * 32) ** 0.5
    shards = ranks(2)(noise)
    for drawn, alpha in shards:
        assert 0.97 * bound < float(drawn.abs().max()) < bound * (1 + 1e-6)
        assert float(alpha) == 5.0
    assert not torch.equal(shards[0][0], shards[1][0])


# -- who draws what -------------------------------------------------------------------------------


def masks_of(
    rank: int, world_size: int, build: Callable[[], PreTrainedModel], seeds: list[int], options: Any
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Body of a rank: the masks of a step by module, in the order of calls, and the next numbers of the generator."""
    model = build()
    alst = enable(model, **options)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.register_forward_hook(lambda _, __, out, name=name: found[name].append(out == 0))
    torch.manual_seed(seeds[rank])
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(4))
    if alst.mesh.get_local_rank("dp"):
        ids = ids.flip(1)
    model(**alst.shard({"input_ids": ids, "labels": ids})).loss.backward()
    return dict(found), [torch.rand(3)]


@pytest.mark.parametrize("seeds", [[5, 5, 5, 5], [5, 6, 7, 8]], ids=["one-seed", "own-seeds"])
def test_each_rank_draws_masks_of_its_own_and_repeats_them(ranks: Ranks, seeds: list[int]) -> None:
    """At dp 2, sp 2, whatever seeds ranks have: no two ranks or modules have equal masks, and recomputation has those
    of forward. The same seeds give the same masks, and leave the same numbers to come as on the other ranks.
    """
    results = ranks(4)(masks_of, gpt2, seeds, {"sp": 2, "tiles": 2})
    held = []
    for masks, _ in results:
        assert len(masks) == 1 + 2 * 3  # the embedding's; adapters, attention and MLP of each layer
        for name, calls in masks.items():
            tiles = 2 if ".mlp." in name else 1
            assert len(calls) == (
                1 if name == "transformer.drop" else 3 * tiles if tiles > 1 else 2
            )
            assert all(torch.equal(call, calls[i % tiles]) for i, call in enumerate(calls))
            held += calls[:tiles]
    same = [a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(held) for b in held[:i]]
    assert not any(same)
    again = ranks(4)(masks_of, gpt2, seeds, {"sp": 2, "tiles": 2})
    for (masks, left), (others, left_again), seed in zip(results, again, seeds, strict=True):
        assert all(torch.equal(masks[k][0], others[k][0]) for k in masks)
        assert torch.equal(left[0], left_again[0])
        assert torch.equal(left[0], results[0][1][0]) == (seed == seeds[0])


RING = {"cp": 2, "method": "ring"}


@pytest.mark.parametrize("options", [{"sp": 2}, RING], ids=["alst", "ring-zigzag"])
def test_ranks_that_run_a_module_on_the_whole_sequence_draw_the_same_masks(
    ranks: Ranks, options: dict[str, Any]
) -> None:
    """With different seeds of the ranks, in forward and again in backward. Modules and samples draw others."""
    (first, _), (second, _), *of_other_sample = ranks(4)(masks_of, gpt_neo, [5, 6, 7, 8], options)
    for name, calls in first.items():
        assert not any(torch.equal(calls[0], masks[name][0]) for masks, _ in of_other_sample)
        whole = ".attn." in name
        assert calls[0].shape[1] == (16 if whole else 8)
        assert all(torch.equal(a, b) == whole for a, b in zip(calls, second[name], strict=True))
        assert all(torch.equal(calls[0], call) for call in calls)
    held = [calls[0] for name, calls in first.items() if ".attn." in name]
    assert len(held) == 2 * 2
    assert not any(torch.equal(a, b) for i, a in enumerate(held) for b in held[:i])


# -- the distribution -----------------------------------------------------------------------------

DRAWS, STEPS = 2048, 20
"""Samples of a step, each with masks of its own, and steps."""
REPEATED = torch.tensor([1, 2, 1, 2]).expand(DRAWS, -1)
"""The tokens of one shard are those of the other, so that equal masks would make them the same to attention."""


def small() -> PreTrainedModel:
    """One layer, eight features, and no positions."""
    sizes = {"vocab_size": 4, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 1.0}
    model = gpt2(**sizes, layer_norm_epsilon=0.1)
    model.get_parameter("transformer.wpe.weight").data.zero_()
    return model


def found(model: PreTrainedModel, loss: float) -> Tensor:
    """The loss and every gradient, in one row. Clears the gradients."""
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat([torch.tensor([loss], dtype=torch.float64), *gradients])


def stock_draws(seed: int) -> Tensor:
    """Losses and gradients [steps, ...] of the stock model, each a mean over `DRAWS` draws."""
    model, rows = small(), []
    torch.manual_seed(seed)
    for _ in range(STEPS):
        loss = model(input_ids=REPEATED, labels=REPEATED, use_cache=False).loss
        loss.backward()
        rows.append(found(model, float(loss.detach())))
    return torch.stack(rows)


def equal_masks(patch: pytest.MonkeyPatch) -> None:
    """Every rank draws the same numbers, as from generators of one seed."""
    patch.setattr(draws, "of_rank", lambda layout, device: drawing(device, layout.draws))


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    """What is left is not scaled up."""
    dropped = nn.Dropout.forward
    patch.setattr(nn.Dropout, "forward", lambda self, x: dropped(self, x) * (1 - self.p))


def other_masks_in_backward(patch: pytest.MonkeyPatch) -> None:
    """Recomputation draws anew."""
    patch.setattr(FirstRun, "__exit__", lambda self, *_: setattr(self, "_states", None))


PLANTS = (equal_masks, wrong_scale, other_masks_in_backward)


def sharded_draws(rank: int, world_size: int) -> list[Tensor]:
    """Body of a rank: the same at sp 2, as it is and with each mistake. The ranks have one seed."""
    results = []
    for plant in (lambda _: None, *PLANTS):
        model, rows = small(), []
        alst = enable(model, sp=2, tiles=2)
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            for _ in range(STEPS):
                loss = model(**alst.shard({"input_ids": REPEATED, "labels": REPEATED})).loss
                loss.backward()
                alst.reduce_gradients()
                rows.append(found(model, alst.reduce_loss(loss)))
        results.append(torch.stack(rows))
    return results


def farthest(ours: Tensor, stock: Tensor) -> float:
    """The largest distance of two means, over the loss and every gradient, in standard errors of the difference."""
    error = (ours.var(0) / STEPS + stock.var(0) / STEPS).sqrt()
    draws = error > 1e-12
    return float(((ours.mean(0) - stock.mean(0))[draws] / error[draws]).abs().max())


def test_loss_and_gradients_have_the_mean_of_the_stock_models(ranks: Ranks) -> None:
    """Over 40,000 draws of a model with dropout in embedding, layer and adapters, in tiles and recomputed: within six
    standard errors. Equal masks on both shards, a wrong scale, and other masks in backward are farther off.
    """
    stock = stock_draws(7)
    right, *wrong = (farthest(ours, stock) for ours in ranks(2)(sharded_draws)[0])
    assert max(farthest(stock_draws(8), stock), right) < 6
    assert min(wrong) > 9


def evaluated(rank: int, world_size: int) -> float:
    """Body of a rank: the loss in evaluation."""
    model = small()
    alst = enable(model, sp=2)
    model.eval()
    batch = {"input_ids": REPEATED[:2], "labels": REPEATED[:2]}
    with torch.no_grad():
        return alst.reduce_loss(model(**alst.shard(batch)).loss)


def test_nothing_is_dropped_in_evaluation(ranks: Ranks) -> None:
    """The loss is the stock model's."""
    stock = small().eval()(input_ids=REPEATED[:2], labels=REPEATED[:2]).loss
    assert ranks(2)(evaluated)[0] == pytest.approx(stock.item(), rel=1e-6)


# -- the suite ------------------------------------------------------------------------------------


def losses(rank: int, world_size: int, configs: list[TrainConfig]) -> list[list[float]]:
    """Body of a rank: the losses of two steps of each run, each after other random numbers."""
    results = []
    for index, config in enumerate(configs):
        torch.manual_seed(10 * index + rank)
        run = run_steps(rank, world_size, config, steps=2)
        results.append([] if run is None else run.losses)
    return results


METHODS = [{"name": "alst", "sp": 2}, {"name": "ring", "cp": 2}, {"name": "seq1f1b", "pp": 2}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_masks_of_a_run_follow_from_its_seed(
    ranks: Ranks, tmp_path: Path, method: dict[str, Any]
) -> None:
    """The same losses again after other random numbers, and not those of a run without dropout."""
    options = {"method": method, "world_size": 2, "dtype": "float64"}
    without = config_of(**options, lora=LoraConfig(rank=2))
    adapters = config_of(**options, lora=LoraConfig(rank=2, dropout=P))
    fields = json.loads((FAMILIES / "phi3.json").read_text()) | {"resid_pdrop": P}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    layers = without.model_copy(update={"model": str(tmp_path), "lora": None})
    kept, dropped, again, hidden, hidden_again = ranks(2)(
        losses, [without, adapters, adapters, layers, layers]
    )[0]
    assert dropped == again
    assert hidden == hidden_again
    assert min(abs(a - b) for a, b in zip(kept, dropped, strict=True)) > 1e-6


# -- refusals -------------------------------------------------------------------------------------


def refused(rank: int, world_size: int) -> None:
    """Body of a rank: draws that are not for one token at a time, and a method that computes layers by hand."""
    for name in ("rank_dropout", "module_dropout"):
        model = stock_model()
        adapters = peft.LoHaConfig(r=2, target_modules=["q_proj"], **{name: 0.1})
        peft.inject_adapter_in_model(adapters, model)
        with pytest.raises(ValueError, match=rf"LoHaConfig drops parts of weights \({name}=0.1\)"):
            enable(model, sp=2)
        enable(model, sp=1)
    for field in ("attn_pdrop", "layerdrop"):
        model = stock_model()
        setattr(model.config, field, 0.1)
        with pytest.raises(
            ValueError, match=rf"\({field}=0.1.*; 0 turns it off\), .*; use method 'baseline'"
        ):
            enable(model, sp=2)
    model = model_of("gpt2")
    model.get_submodule("transformer.h.1.attn.attn_dropout").p = 0.1  # the configuration says 0
    alst = enable(model, sp=2)
    batch = {"input_ids": REPEATED[:2], "labels": REPEATED[:2]}
    with pytest.raises(
        ValueError,
        match=r"attention dropout \(0.1\) is not supported.*set it to 0 .*, or use method 'baseline'",
    ):
        model(**alst.shard(batch))
    with pytest.raises(ValueError, match=r"has dropout \(.*, p=0.3\); use method 'alst'"):
        enable(model_of("gpt2", resid_pdrop=P), sp=2, method="layerwise")


def test_what_is_not_drawn_by_token_is_refused(ranks: Ranks) -> None:
    """Adapters that drop weights, skipped layers, attention dropout by any name; any dropout in method `layerwise`."""
    ranks(2)(refused)
