"""Compares the gradients of a cell's first step with the truth (`truths`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alst_impl.config import OptimizerConfig, TrainConfig
from alst_impl.models import materialize
from harness.gate import truth
from harness.gate.truths import Truth, pattern_of, samples_of
from harness.gate.verdict import (
    TOLERANCES,
    UPDATE_TOLERANCES,
    Tolerance,
    noise_floor,
    precision,
    scales,
    used,
    widened,
    without_noise,
)
from harness.records.record import Gate, ParameterGate


def compare(ours: dict[str, Tensor], loss: float, truth: Truth, train: TrainConfig) -> Gate:
    """Compare every parameter's gradient with the truth, in fp64. A missing gradient of ours counts as zero.

    With doubts, gradients may instead agree with the truth of other choices, with the same bounds.
    """
    truths = _truths(truth)
    exact = {name: gradient for name, gradient in truths[""].items() if name != "loss"}
    limits = _limits(exact, _alone(truth, exact), TOLERANCES[precision(train)])
    first: Gate | None = None
    for choice, expected in sorted(
        truths.items(), key=lambda pair: len(pair[0])
    ):  # few choices first
        gate = _judged(ours, loss, expected, limits, train).model_copy(update={"choice": choice})
        first = first or gate
        if gate.passed:
            return gate
    assert first is not None
    return first


def _judged(
    ours: dict[str, Tensor],
    loss: float,
    expected: dict[str, Tensor],
    limits: dict[str, Tolerance],
    train: TrainConfig,
) -> Gate:
    """The comparison with one truth."""
    expected = dict(expected)
    truth_loss = float(expected.pop("loss"))
    rounding = precision(train)
    parameters = without_noise(_compared(ours, expected), rounding)
    scale = scales(parameters)
    shares = [
        used(p, limits[p.parameter], noise_floor(p, scale[p.parameter], rounding))
        for p in parameters
    ]
    worst = max(range(len(shares)), key=shares.__getitem__)
    loss_close = abs(loss - truth_loss) <= TOLERANCES[train.dtype].ratio * abs(truth_loss)
    return Gate(
        passed=shares[worst] <= 1 and loss_close,
        loss=loss,
        truth_loss=truth_loss,
        worst=parameters[worst],
        parameters=parameters,
    )


class Companion:
    """The stock model in fp64. Before each step it takes the run's weights and computes its own gradient."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._model = materialize(train.model_copy(update={"dtype": "float64"}))

    def cosine(self, ours: dict[str, Tensor], weights: dict[str, Tensor], step: int) -> float:
        """Cosine between our whole gradient of `step` and the stock model's at the same `weights`."""
        held = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                held[name].copy_(weight)
        samples, pattern = samples_of(self._train, step), pattern_of(self._train)
        if pattern is not None:
            samples["masks"] = truth.masks(pattern, samples["position_ids"])
        expected = truth.gradients_of(self._model, samples)
        del expected["loss"]
        self._model.zero_grad()
        mine = torch.cat([ours[name].double().flatten() for name in expected])
        theirs = torch.cat([gradient.flatten() for gradient in expected.values()])
        return float(torch.nn.functional.cosine_similarity(mine, theirs, dim=0))


def compare_update(
    gate: Gate,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    truth: Truth,
    train: TrainConfig,
    noise: dict[str, Tensor] | None = None,
) -> Gate:
    """`gate` with the update of every parameter, compared with PyTorch's optimizer on the true gradients.

    `noise` has our gradients of parameters whose true gradient is only rounding error; they replace it.
    """
    ours = noise or {}
    gradients = _truths(truth)[gate.choice] | ours
    del gradients["loss"]
    expected = stock_change(before, gradients, train.optimizer)
    change = {name: after[name].double() - before[name].double() for name in after}
    # A parameter without a gradient is frozen and must not change.
    expected |= {name: torch.zeros_like(c) for name, c in change.items() if name not in expected}
    tolerance = UPDATE_TOLERANCES[precision(train)]
    # An optimizer in that dtype rounds weights more than once, in the stock run too.
    dtype: torch.dtype = getattr(torch, train.dtype)
    alone = [
        stock_change(before, each | ours, train.optimizer, dtype)
        for each in _alone(truth, gradients)
    ]
    limits = _limits(expected, alone, tolerance)
    updates = _compared(change, expected)
    shares = [used(p, limits[p.parameter]) for p in updates]
    worst = max(range(len(shares)), key=shares.__getitem__)
    found: dict[str, Any] = {"updates": updates}
    if gate.passed and shares[worst] > 1:
        found |= {"passed": False, "wrong_update": updates[worst]}
    return gate.model_copy(update=found)


def stock_change(
    weights: dict[str, Tensor],
    gradients: dict[str, Tensor],
    o: OptimizerConfig,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The change of `weights` by clipping and one step of PyTorch's optimizer.

    Computes in `dtype`, and rounds the new weights to the dtype of the old ones.
    """
    parameters = {
        name: torch.nn.Parameter(weights[name].to(dtype, copy=True)) for name in gradients
    }
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].to(dtype, copy=True)
    if o.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), o.max_grad_norm)
    optimizer: torch.optim.Optimizer
    if o.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters.values(), lr=o.learning_rate, weight_decay=o.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(), o.learning_rate, o.betas, o.eps, o.weight_decay
        )
    optimizer.step()
    return {
        name: p.detach().to(weights[name].dtype).double() - weights[name].double()
        for name, p in parameters.items()
    }


def _compared(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[ParameterGate]:
    unknown = sorted(ours.keys() - expected.keys())
    if unknown:
        raise RuntimeError(f"gradients of parameters that the stock model does not have: {unknown}")
    return [_compare_one(name, ours.get(name), expected[name]) for name in expected]


def _limits(
    expected: dict[str, Tensor], alone: Iterable[dict[str, Tensor]], tolerance: Tolerance
) -> dict[str, Tolerance]:
    """The bounds of each parameter: `tolerance`, or more if rounding to the dtype alone, as in `alone`, needs more."""
    limits = dict.fromkeys(expected, tolerance)
    for p in (p for each in alone for p in _compared(each, expected)):
        limits[p.parameter] = widened(limits[p.parameter], p)
    return limits


def _alone(truth: Truth, expected: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Gradients with the errors of the stock model in the run's dtype, as often as they are known."""
    if truth.doubts is not None:
        for errors in _groups(truth.doubts, "error").values():
            yield {name: true + errors[name] for name, true in expected.items()}
    elif truth.rounded is not None:
        gradients = load_file(truth.rounded)
        del gradients["loss"]
        yield gradients


def _truths(truth: Truth) -> dict[str, dict[str, Tensor]]:
    """The exact gradients under "", and those of other choices, with `loss`."""
    others = {} if truth.doubts is None else _groups(truth.doubts, "truth")
    return {"": load_file(truth.exact), **others}


def _groups(doubts: str, kind: str) -> dict[str, dict[str, Tensor]]:
    """The entries `kind|GROUP|NAME` of a file that `truth.doubts` made, by group and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(doubts).items():
        held, group, name = key.split("|")
        if held == kind:
            found.setdefault(group, {})[name] = tensor
    return found


def _compare_one(name: str, ours: Tensor | None, truth: Tensor) -> ParameterGate:
    """Compare one gradient in fp64. A gradient that is not finite has no norm."""
    mine = torch.zeros_like(truth) if ours is None else ours.to(torch.float64)
    if mine.shape != truth.shape:
        raise RuntimeError(f"gradient of {name} is {tuple(mine.shape)}, not {tuple(truth.shape)}")
    norm, truth_norm = float(mine.norm()), float(truth.norm())
    blank = ParameterGate(parameter=name, ratio=None, cosine=None, truth_norm=truth_norm)
    if not torch.isfinite(mine).all():
        return blank
    found = {"norm": norm, "error_norm": float((mine - truth).norm())}
    if truth_norm:
        product = float((mine * truth).sum())
        found |= {"ratio": norm / truth_norm}
        found |= {"cosine": product / (norm * truth_norm) if norm else 0.0}
    return blank.model_copy(update=found)
