"""Tiling changes memory and no result."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alst_impl.ops.memory.tiling import parameters_of, tile_bounds, tiled


class Mlp(nn.Module):
    """A gated MLP, the usual tiled module."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(6, 10, dtype=dtype)
        self.up = nn.Linear(6, 10, bias=False, dtype=dtype)
        self.down = nn.Linear(10, 6, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def rows(batch: int, count: int) -> Tensor:
    """Hidden states [B, S, 6] that require a gradient."""
    torch.manual_seed(2)
    return torch.randn(batch, count, 6, dtype=torch.float64, requires_grad=True)


def results(fn: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> list[Tensor]:
    """Output, then the gradients of input and parameters under a nonuniform loss."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    out = fn(x)
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [out.detach(), *([x.grad] if x.grad is not None else []), *gradients]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("count", [1, 3, 7, 9, 16])
def test_tiled_equals_the_whole(count: int, num_tiles: int, batch: int) -> None:
    """Output and every gradient are equal for any number of rows and tiles, also with more tiles than rows."""
    mlp, x = Mlp(), rows(batch, count)
    expected = results(mlp, x, mlp)
    found = results(lambda value: tiled(mlp, value, num_tiles), x, mlp)
    assert len(found) == len(expected) == 7
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tiles", [1, 2, 5, 9])
def test_two_layers_on_top_of_each_other_are_exact(num_tiles: int) -> None:
    """The second layer's input gradient reaches the first layer's parameters."""
    layers, x = nn.ModuleList([Mlp(), nn.LayerNorm(6, dtype=torch.float64), Mlp()]), rows(1, 7)

    def run(wrap: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        def stack(value: Tensor) -> Tensor:
            for layer in layers:
                value = value + wrap(layer, value)
            return value

        return results(stack, x, layers)

    for ours, truth in zip(
        run(lambda layer, value: tiled(layer, value, num_tiles)),
        run(lambda layer, value: layer(value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_tile_bounds_cover_every_row_once() -> None:
    """No row is missing or repeated, no tile is empty, and there are no extra tiles."""
    for count in range(1, 20):
        for num_tiles in range(1, 25):
            bounds = tile_bounds(count, num_tiles)
            covered = [row for start, stop in bounds for row in range(start, stop)]
            assert covered == list(range(count))
            assert len(bounds) <= num_tiles
            assert all(stop > start for start, stop in bounds)


def test_no_tiles_are_refused() -> None:
    """Zero tiles would compute nothing."""
    with pytest.raises(ValueError, match="num_tiles must be at least 1, not 0"):
        tiled(Mlp(), rows(1, 3), 0)


def test_frozen_parameters_get_no_gradient_and_the_others_their_own() -> None:
    """As in a model where only adapters are trained."""
    mlp, x = Mlp(), rows(2, 5)
    for parameter in (*mlp.gate.parameters(), mlp.down.weight):
        parameter.requires_grad_(False)
    expected = results(mlp, x, mlp)
    found = results(lambda value: tiled(mlp, value, 3), x, mlp)
    assert mlp.gate.weight.grad is None
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_an_input_without_gradient_still_trains_the_parameters() -> None:
    """As with frozen embeddings."""
    mlp, x = Mlp(), rows(1, 5).detach()
    expected = results(mlp, x, mlp)
    found = results(lambda value: tiled(mlp, value, 2), x, mlp)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_parameters_are_discovered_wherever_a_function_keeps_them() -> None:
    """In a module, a bound method, a partial or a closure."""
    mlp = Mlp()

    def closure(x: Tensor) -> Tensor:
        return mlp(x)

    def called(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    everything = list(mlp.parameters())
    for fn in (mlp, mlp.forward, functools.partial(called, mlp), closure):
        assert {id(p) for p in parameters_of(fn)} == {id(p) for p in everything}
    assert parameters_of(torch.tanh) == []


def test_a_shared_parameter_is_discovered_once() -> None:
    """Otherwise tied weights would get their gradient twice."""
    mlp = Mlp()
    mlp.up.weight = mlp.gate.weight
    assert len(parameters_of(mlp)) == 4
    x = rows(1, 7)
    for ours, truth in zip(
        results(lambda value: tiled(mlp, value, 3), x, mlp), results(mlp, x, mlp), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


class Routed(nn.Module):
    """Two experts. The sign of a token's first feature selects one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == bool(index)
            if chosen.any():
                out = out.index_put((chosen,), expert(x[chosen]))
        return out


def test_a_parameter_that_some_tiles_do_not_touch_gets_the_gradient_of_the_others() -> None:
    """An expert without tokens in a tile gets no gradient from it."""
    routed, x = Routed(), rows(1, 8).detach()
    x[:, :4, 0], x[:, 4:, 0] = 1, -1  # each expert gets one half
    x.requires_grad_()
    for num_tiles in (2, 4, 8):
        found = results(lambda value, n=num_tiles: tiled(routed, value, n), x, routed)
        for ours, truth in zip(found, results(routed, x, routed), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_the_error_of_bf16_weight_gradients_does_not_grow_with_the_number_of_tiles() -> None:
    """Tiles are summed in fp32, so 256 tiles cost no more than rounding the sum once."""
    torch.manual_seed(4)
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, 1024, 32, dtype=torch.bfloat16) + 0.5
    upstream = torch.rand(1, 1024, 32, dtype=torch.bfloat16)
    truth = upstream.double()[0].T @ x.double()[0]

    def error(num_tiles: int) -> float:
        linear.zero_grad()
        (tiled(linear, x, num_tiles) * upstream).sum().backward()
        assert linear.weight.grad is not None
        return float((linear.weight.grad.double() - truth).norm() / truth.norm())

    assert error(256) < 1.5 * error(1)
    assert error(1) < 4e-3


def test_the_hook_of_each_parameter_fires_once() -> None:
    """Engines reduce a gradient when its hook fires. A second call is an error or a wrong gradient."""
    mlp = Mlp()
    fired: list[str] = []
    for name, parameter in mlp.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    tiled(mlp, rows(1, 9), 4).sum().backward()
    assert sorted(fired) == sorted(name for name, _ in mlp.named_parameters())


def test_only_the_input_is_saved_for_backward() -> None:
    """Tensors that the function computes are freed after forward."""
    mlp, x = Mlp(), rows(1, 9)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiled(mlp, x, 4)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
