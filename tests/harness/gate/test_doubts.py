"""What the gate learns about a cell that fails in bf16: what rounding alone can do to its gradients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alst_impl.config import TrainConfig
from alst_impl.models import materialize
from harness.gate import truth
from harness.gate.gradients import compare
from harness.gate.truths import Truth, samples_of

FAMILIES = Path(__file__).parents[2] / "families"
TRAIN = TrainConfig(model="tiny-llama", method="baseline", seqlen=8, dtype="bfloat16")
EXACT = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
OTHER = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([2.0, 0.0])}
SAID = "gate takes 1 in place of 0 for row 3"


@pytest.fixture
def held(tmp_path: Path) -> Truth:
    """A truth that rounding moves by a tenth of `b` beside the weights, and a truth of another choice."""
    loss = {"loss": torch.tensor(2.0)}
    doubts = {f"error|0|{name}": torch.zeros_like(x) for name, x in (EXACT | loss).items()}
    doubts |= {f"error|1|{name}": torch.zeros_like(x) for name, x in (EXACT | loss).items()}
    doubts["error|1|b"] = EXACT["b"] / 10
    doubts |= {f"truth|{SAID}|{name}": x for name, x in (OTHER | loss).items()}
    exact = {name: x.double() for name, x in (EXACT | loss).items()}
    for name, tensors in {"exact": exact, "rounded": exact, "doubts": doubts}.items():
        save_file(tensors, tmp_path / name)
    return Truth(**{name: str(tmp_path / name) for name in ("exact", "rounded", "doubts")})


@pytest.mark.parametrize(("factor", "passed"), [(1.19, True), (0.81, True), (1.21, False)])
def test_an_error_beside_the_weights_counts_as_one_at_the_weights(
    held: Truth, factor: float, passed: bool
) -> None:
    """Twice as much is allowed, of that parameter alone, and only to a cell in doubt."""
    ours = EXACT | {"b": EXACT["b"] * factor}
    assert compare(ours, 2.0, held, TRAIN).passed == passed
    assert not compare(ours, 2.0, held.model_copy(update={"doubts": None}), TRAIN).passed
    assert not compare(EXACT | {"a": EXACT["a"] * factor}, 2.0, held, TRAIN).passed


def test_an_error_of_the_norm_allows_none_of_the_direction(held: Truth) -> None:
    """A gradient of the right norm fails if its direction is further off than the stock model's ever is."""
    turned = torch.tensor([0.98, (1 - 0.98**2) ** 0.5])
    assert not compare(EXACT | {"b": turned}, 2.0, held, TRAIN).passed


def test_gradients_may_be_those_of_another_choice(held: Truth) -> None:
    """All of them, with the usual bounds. What the choice was is kept."""
    assert compare(EXACT, 2.0, held, TRAIN).choice == ""
    gate = compare(OTHER, 2.0, held, TRAIN)
    assert gate.passed
    assert gate.choice == SAID
    assert not compare(OTHER | {"a": EXACT["a"]}, 2.0, held, TRAIN).passed
    assert not compare(OTHER | {"b": OTHER["b"] * 1.3}, 2.0, held, TRAIN).passed
    between = {name: (EXACT[name] + OTHER[name]) / 2 for name in EXACT}
    gate = compare(between, 2.0, held, TRAIN)
    assert not gate.passed
    assert gate.choice == ""


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    """A tiny model with routers, saved, and a batch, for which bf16 itself turns a choice in the second layer."""
    model = str(FAMILIES / "hunyuan_v1_moe.json")
    train = TrainConfig(model=model, method="baseline", seqlen=43, dtype="bfloat16")
    folder = tmp_path_factory.mktemp("model")
    materialize(train).float().save_pretrained(folder)
    return str(folder), samples_of(train, 0)


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative error of a gradient."""
    return float((ours.double() - exact).norm() / exact.norm())


def test_choices_are_told_apart_from_rounding(routed: tuple[str, dict[str, Tensor]]) -> None:
    """bf16 turns a choice, which moves the router's gradient by a tenth; with fp64's choices it moves it by less.

    The truth of that choice is what the gradient in bf16 agrees with.
    """
    exact, rounded = (truth.gradients(*routed, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = truth.doubts(*routed, torch.bfloat16)
    name = "model.layers.1.mlp.gate.wg.weight"
    assert error(rounded[name], exact[name]) > 0.1
    errors = [found[f"error|{index}|{name}"] for index in range(truth.NEIGHBOURS + 1)]
    assert all(0 < error(exact[name] + e, exact[name]) < 0.05 for e in errors)
    assert len({float(e.norm()) for e in errors}) == len(errors)
    others = {key: x for key, x in found.items() if key.startswith("truth|") and key.endswith(name)}
    turned = [key for key in others if error(rounded[name], others[key]) < 0.05]
    assert len(turned) >= 1
    assert all(
        "model.layers.1.mlp.gate.wg takes 0 in place of 1 for row 29" in key for key in turned
    )
    assert len(others) <= 2**truth.TIES - 1


def test_a_choice_that_rounding_cannot_turn_is_no_doubt(
    routed: tuple[str, dict[str, Tensor]],
) -> None:
    """Scores are at most as far apart as both can be rounded. In fp64, none are so close."""
    said = " ".join(truth.doubts(*routed, torch.bfloat16))
    pairs = re.findall(r"scores (\S+) apart, each rounded by up to (\S+)\)", said)
    assert pairs
    assert all(float(apart) <= 2 * float(rounded) for apart, rounded in pairs)
    assert "truth|" not in " ".join(truth.doubts(*routed, torch.float64))


@pytest.mark.parametrize(("error", "ties"), [(0.9, 0), (1.1, 1)])
def test_scores_that_are_masked_are_no_rounding(error: float, ties: int) -> None:
    """Two scores are a tie if rounding of either can turn their order; what is masked differs by nothing."""
    free, forced = (truth._Choices(None) for _ in range(2))
    scores = torch.tensor([[3.0, 1.0, -torch.inf]], dtype=torch.float64)
    free.scores, forced.scores = [scores], [scores + torch.tensor([0.0, error, 0.0])]
    free.taken, free.where = [torch.tensor([[0]])], ["router"]
    assert len(truth._ties(free, forced)) == ties
