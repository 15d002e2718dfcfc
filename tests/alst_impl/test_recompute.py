"""Recomputation repeats forward: random numbers, autocast, the offloading checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from training import assert_same_gradients, relative_error
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from alst_impl import hf, library
from alst_impl.ops.memory.loss import tiled_loss
from alst_impl.ops.memory.offload import HostOffload, checkpoint
from alst_impl.ops.memory.recompute import FirstRun
from alst_impl.ops.memory.tiling import tile_bounds, tiled
from alst_impl.placement import Placement, no_evidence

if TYPE_CHECKING:
    from conftest import Ranks

IDS = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


class Noisy(nn.Module):
    """A layer that draws random numbers before and after its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Dropout(0.5), nn.Dropout(0.3)
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(torch.tanh(self.linear(self.before(x))))


def in_tiles(fn: Callable[[Tensor], Tensor], x: Tensor, num_tiles: int) -> Tensor:
    """`fn` over tiles, with plain autograd."""
    return torch.cat([fn(x[:, a:b]) for a, b in tile_bounds(x.shape[1], num_tiles)], dim=1)


TILED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "tiles": (partial(tiled, num_tiles=3), partial(in_tiles, num_tiles=3)),
    "layer": (checkpoint, lambda fn, x: fn(x)),
    "offloaded layer": (
        lambda fn, x: checkpoint(fn, x, HostOffload(Placement(CPU))),
        lambda fn, x: fn(x),
    ),
    "layer of tiles": (
        lambda fn, x: checkpoint(partial(tiled, fn, num_tiles=3), x),
        partial(in_tiles, num_tiles=3),
    ),
}


def noisy_gradients(run: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Output and gradients of two layers that `run` runs, and the next random number, all from one seed."""
    torch.manual_seed(1)
    layers = nn.ModuleList([Noisy(), Noisy()])
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    value = x
    for layer in layers:
        value = run(layer, value)
    value.square().sum().backward()
    found = {name: p.grad for name, p in layers.named_parameters()}
    return {**found, "input": x.grad, "output": value.detach()}, torch.rand(4)


@pytest.mark.parametrize("name", TILED)
def test_dropout_draws_the_same_again_and_nothing_more(name: str) -> None:
    """Every gradient is autograd's for the same seed, and so are later random numbers."""
    ours, plain = TILED[name]
    (found, after), (expected, after_plain) = noisy_gradients(ours), noisy_gradients(plain)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12)
    assert torch.equal(after, after_plain)


def test_no_generator_state_is_kept_without_random_operators() -> None:
    """Recomputation then leaves the generators unchanged, also with fake tensors."""
    with FakeTensorMode(), FirstRun(CPU) as first:
        torch.nn.functional.dropout(torch.ones(5))
    assert first.again()._states is None
    with FirstRun(CPU) as first:
        drawn = torch.rand(5)
    with first.again().part():
        assert torch.equal(torch.rand(5), drawn)


def phi3(dropout: float) -> Phi3ForCausalLM:
    """A small Phi-3 in fp64 with dropout after attention and after the MLP."""
    torch.manual_seed(1)
    config = Phi3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        resid_pdrop=dropout,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return Phi3ForCausalLM(config).double().train()


def adapted(dropout: float) -> Phi3ForCausalLM:
    """The same model with adapters, which have dropout, too."""
    import peft

    model = phi3(dropout)
    adapters = peft.LoraConfig(
        target_modules=["qkv_proj", "down_proj"], lora_dropout=dropout, init_lora_weights=False
    )
    peft.inject_adapter_in_model(adapters, model)
    return model.double().train()


def gradients_of(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of every trained parameter, for one seed."""
    torch.manual_seed(7)
    model(**inputs).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "build", [partial(phi3, 0.5), partial(adapted, 0.5)], ids=["layers", "adapters"]
)
def test_a_checkpointed_model_with_dropout_has_the_gradients_of_the_stock_one(
    build: Callable[[], PreTrainedModel],
) -> None:
    """Equal for the same seed, in layers and in adapters, with offloaded layer inputs."""
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    model = build()
    hf.checkpoint_layers(model, HostOffload(Placement(CPU)))
    assert_same_gradients(gradients_of(model, inputs), gradients_of(build(), inputs), 1e-10, 1e-10)


@pytest.mark.parametrize(
    "build", [partial(phi3, 0.5), partial(adapted, 0.5)], ids=["layers", "adapters"]
)
def test_tiles_in_checkpointed_layers_draw_in_backward_what_they_drew_in_forward(
    build: Callable[[], PreTrainedModel],
) -> None:
    """Gradients are those of the same tiles without any recomputation, for the same seed."""
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    found = []
    for recompute in (True, False):
        model = build()
        mlps, norms = hf.token_wise_modules(model)
        for module in mlps + norms:
            hf.tile_module(module, lambda _: 5, no_evidence(), recompute=recompute)
        if recompute:
            hf.checkpoint_layers(model, HostOffload(Placement(CPU)))
        found.append(gradients_of(model, inputs))
    assert_same_gradients(found[0], found[1], 1e-12, 1e-12)


def sharded_gradients(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Body of a rank: gradients with and without checkpoints and offload."""
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "sp"))
    found = []
    for on in (True, False):
        model = phi3(0.3)
        alst = library.enable(
            model, mesh, tile_norm=False, tile_mlp=False, checkpoint=on, offload=on
        )
        gradients_of(model, alst.shard({"input_ids": IDS, "labels": IDS}))
        alst.reduce_gradients()
        found.append({name: p.grad for name, p in model.named_parameters()})
    return found


def test_checkpoints_change_no_gradient_of_a_sharded_model_with_dropout(ranks: Ranks) -> None:
    """At sp 2 every rank draws random numbers for its own tokens."""
    for ours, plain in ranks(2)(sharded_gradients):
        assert_same_gradients(ours, plain, 1e-10, 1e-10)


def refuse(rank: int, world_size: int) -> None:
    """Body of a rank: a model whose rotary frequencies follow the longest position, on sharded and
    on whole sequences.
    """
    model = phi3(0)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    parts = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "sp"))
    with pytest.raises(ValueError, match=r"rotary scaling 'dynamic'.*at sp \(2\).*use sp=1"):
        library.enable(model, parts)
    library.enable(model, init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("dp", "sp")))


def test_rotary_scaling_by_the_longest_position_is_refused_only_at_sp_2(ranks: Ranks) -> None:
    """The library refuses it as the suite does."""
    ranks(2)(refuse)


# -- autocast -------------------------------------------------------------------------------------


def wrapped(tiles: int) -> Phi3ForCausalLM:
    """A small Phi-3 in fp32 with all changes that ALST makes."""
    model, evidence = phi3(0).float(), no_evidence()
    mlps, norms = hf.token_wise_modules(model)
    for module in mlps + norms:
        hf.tile_module(module, lambda _: tiles, evidence)
    hf.tile_loss(model, lambda _: tiles, evidence)
    hf.checkpoint_layers(model, HostOffload(Placement(CPU)))
    return model


def autocast_gradients(model: PreTrainedModel, *, inside: bool) -> dict[str, Tensor]:
    """Gradients under bf16 autocast. Backward runs inside it or, as PyTorch recommends, after it."""
    inputs = {"input_ids": IDS, "shift_labels": IDS, "labels": IDS, "use_cache": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, num_items_in_batch=torch.tensor(12)).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("inside", [False, True])
def test_recomputation_runs_under_the_autocast_of_forward(inside: bool) -> None:
    """With one tile every gradient is the stock model's. With several tiles the error is at most
    1.2 times that of the stock model.
    """
    stock = autocast_gradients(phi3(0).float(), inside=inside)
    whole = autocast_gradients(wrapped(1), inside=inside)
    assert_same_gradients(whole, {name: g.double() for name, g in stock.items()})
    inputs = {"input_ids": IDS, "shift_labels": IDS, "labels": IDS, "use_cache": False}
    truth = gradients_of(phi3(0), {**inputs, "num_items_in_batch": torch.tensor(12)})
    error = relative_error(autocast_gradients(wrapped(3), inside=inside), truth)
    assert error <= 1.2 * relative_error(stock, truth)


@pytest.mark.parametrize("run", [partial(tiled, num_tiles=2), checkpoint])
@pytest.mark.parametrize("first", [True, False])
def test_recomputation_has_the_dtype_of_the_first_run(
    run: Callable[..., Tensor], first: bool
) -> None:
    """Tested with autocast around only forward and around only backward."""
    linear, seen = nn.Linear(6, 6), set()

    def fn(x: Tensor) -> Tensor:
        out = linear(x)
        seen.add(out.dtype)
        return out

    x = torch.ones(1, 4, 6, requires_grad=True)

    def autocast(on: bool) -> contextlib.AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)

    with autocast(first):
        out = run(fn, x)
    with autocast(not first):
        out.sum().backward()
    assert seen == {torch.bfloat16 if first else torch.float32}
    assert linear.weight.grad is not None


def test_a_loss_that_leaves_autocast_has_its_gradients_in_its_own_dtype() -> None:
    """A model with an fp32 head does this."""
    head, labels, count = nn.Linear(6, 9), torch.tensor([[1, 4, 8, 2]]), torch.tensor(4)

    def loss(hidden: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            logits = head(hidden).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / count

    found = []
    for run in (loss, partial(tiled_loss, loss, num_tiles=1)):
        hidden = torch.linspace(-1, 1, 24).view(1, 4, 6).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(hidden, labels, count)
        found.append(torch.autograd.grad(out, [hidden, *head.parameters()]))
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-7)


# -- transformers' own switch ---------------------------------------------------------------------


def offloaded_bytes(model: PreTrainedModel, placement: Placement) -> int:
    """Bytes that one forward pass with gradients offloads to the host."""
    before = placement.evidence["offloaded_bytes"]
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return placement.evidence["offloaded_bytes"] - before


def test_checkpointing_that_is_turned_on_again_still_offloads() -> None:
    """Trainer turns it on by either method of transformers. Turned off it is off; turned on again it offloads."""
    model, placement = phi3(0), Placement(CPU)
    hf.checkpoint_layers(model, HostOffload(placement))
    expected = 2 * IDS.numel() * 32 * 8
    assert offloaded_bytes(model, placement) == expected
    for part in (model, model.base_model):
        with pytest.warns(UserWarning, match="stay checkpointed by ALST"):
            hf.stock_checkpointing(part, use_reentrant=False)
        assert offloaded_bytes(model, placement) == expected
    turn_off = getattr(model, "activation_checkpointing_disable", None)
    (turn_off or model.gradient_checkpointing_disable)()
    assert offloaded_bytes(model, placement) == 0
    with pytest.warns(UserWarning, match="stay checkpointed by ALST"):
        hf.stock_checkpointing(model, use_reentrant=False)
    assert offloaded_bytes(model, placement) == expected
    other = phi3(0)
    hf.stock_checkpointing(other, use_reentrant=False)
    assert offloaded_bytes(other, placement) == 0
