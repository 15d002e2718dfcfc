"""Training runs on the ranks of a test, and the truth that they are compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alst_impl import models, step
from alst_impl.config import TrainConfig
from alst_impl.data import Corpus
from alst_impl.layout import make_mesh
from alst_impl.methods.base import layouts, step_samples
from alst_impl.placement import Evidence, Placement
from harness.gate.truth import masks
from harness.gate.truths import pattern_of


@dataclass(frozen=True)
class Run:
    """Results of a run on rank 0: gradients of the first step, losses and norms of every step."""

    gradients: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    """Parameters before the first step."""
    final: dict[str, Tensor]
    """Parameters after the last step."""
    evidence: Evidence


def config_of(**settings: Any) -> TrainConfig:
    """A short run: two layers, a vocabulary of bytes, float32."""
    overrides = {"vocab_size": 260, **settings.pop("overrides", {})}
    defaults = {"model": "tiny-llama", "method": "baseline", "engine": "plain", "seqlen": 67}
    return TrainConfig(**{**defaults, **settings, "overrides": overrides})


def corpus_of(config: TrainConfig) -> Corpus:
    """The samples of a run."""
    vocab_size = models.described(config.model, config.overrides)["vocab_size"]
    return Corpus(
        config.data,
        config.seqlen,
        config.seed,
        vocab_size,
        uneven=config.accumulation > 1,
        step_samples=step_samples(config),
    )


def run_steps(rank: int, world_size: int, config: TrainConfig, steps: int = 1) -> Run | None:
    """Body of a rank: `steps` optimizer steps of `config`. Rank 0 returns the results."""
    step.check(config)
    mesh = make_mesh(layouts(config), "cpu")
    placement = Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)
    initial = {name: value.clone() for name, value in runtime.state_dict().items()}
    corpus = corpus_of(config)
    gradients: dict[str, Tensor] = {}
    losses, norms = [], []
    for index in range(steps):
        batches = step.micro_batches(config, corpus, method, mesh, index, placement.device)
        losses.append(float(step.accumulate_gradients(method, runtime, batches)))
        if index == 0:
            gradients = {name: value.clone() for name, value in runtime.gradients().items()}
        norms.append(float(runtime.update()))
    final = {name: value.clone() for name, value in runtime.state_dict().items()}
    return Run(gradients, losses, norms, initial, final, placement.evidence) if rank == 0 else None


def train(
    rank: int,
    world_size: int,
    config: TrainConfig,
    steps: range,
    load: Path | None = None,
    save: Path | None = None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Body of a rank: losses of `steps`, and the parameters after them."""
    mesh = make_mesh(layouts(config), "cpu")
    placement = Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)
    if load:
        runtime.load(load)
    corpus = corpus_of(config)
    losses = []
    for index in steps:
        batches = step.micro_batches(config, corpus, method, mesh, index, placement.device)
        losses.append(float(step.train_step(method, runtime, batches).loss))
    if save:
        runtime.save(save)
    return losses, {name: p.clone() for name, p in runtime.state_dict().items()}


@dataclass(frozen=True)
class Truth:
    """Results of the stock model in fp64, in one process, with PyTorch's AdamW."""

    gradients: dict[str, Tensor]
    """Gradients of the first step."""
    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]


def truth_of(config: TrainConfig, steps: int = 1) -> Truth:
    """The truth for `steps` of `config`, for any method and engine."""
    key = config.model_dump_json(exclude={"method", "engine", "world_size", "batch_size"})
    return _truth(key, step_samples(config), steps)


@functools.cache
def _truth(key: str, num_samples: int, steps: int) -> Truth:
    config = TrainConfig.model_validate_json(key[:-1] + ', "method": "baseline"}')
    model = models.materialize(config.model_copy(update={"dtype": "float64"})).train()
    with torch.no_grad():
        for name, held in models.build(config)[0].named_parameters():
            p = model.get_parameter(name)  # start where the run starts
            p.copy_(p.to(held.dtype))
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), o.learning_rate, o.betas, o.eps, o.weight_decay
    )
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    corpus = replace(corpus_of(config), step_samples=num_samples)
    first: dict[str, Tensor] = {}
    losses, norms = [], []
    for index in range(steps):
        samples = range(index * num_samples, (index + 1) * num_samples)
        rows = [row for i in samples for row in corpus.rows(i)]
        losses.append(_stock_gradients(model, rows, pattern_of(config)))
        if index == 0:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            first = {name: _gradient(p).clone() for name, p in trained}
        limit = o.max_grad_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        optimizer.zero_grad()
    final = {name: p.detach() for name, p in model.named_parameters()}
    return Truth(first, losses, norms, initial, final)


def _stock_gradients(model: Any, samples: list[Any], pattern: dict[str, Any] | None) -> float:
    """Loss over all labels of `samples`, with gradients from the model's own forward, and the mask of a pattern."""
    valid = max(sum(int((labels[1:] != -100).sum()) for _, labels, _, _ in samples), 1)
    total = 0.0
    for ids, labels, positions, _ in samples:
        loss = model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=None if pattern is None else _added(pattern, positions, model.dtype),
            labels=labels[None],
            num_items_in_batch=torch.tensor(valid),
            use_cache=False,
        ).loss
        loss.backward()
        total += float(loss.detach())
    return total


def _added(pattern: dict[str, Any], positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0, or -inf for what a query does not see."""
    return masks(pattern, positions[None])[:, None].to(dtype).log()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def assert_trains_as(run: Run, truth: Truth) -> None:
    """Asserts that gradients of the first step, losses, norms and parameter changes agree."""
    assert_same_gradients(run.gradients, truth.gradients)
    for ours, expected in zip(run.losses, truth.losses, strict=True):
        assert abs(ours - expected) <= 1e-5 * expected
    for ours, expected in zip(run.grad_norms, truth.grad_norms, strict=True):
        assert abs(ours - expected) <= 1e-4 * expected
    change = {name: run.final[name].double() - run.initial[name] for name in run.final}
    expected_change = {name: truth.final[name] - truth.initial[name] for name in truth.final}
    assert change.keys() == expected_change.keys()
    assert relative_error(change, expected_change) < 1e-4


def ratio_and_cosine(ours: Tensor, truth: Tensor) -> tuple[float, float]:
    """Norm of `ours` over norm of `truth`, and their cosine, in fp64."""
    mine, norm = ours.double(), truth.norm()
    return float(mine.norm() / norm), float((mine * truth).sum() / (mine.norm() * norm))


def assert_same_gradients(
    ours: dict[str, Tensor], truth: dict[str, Tensor], ratio: float = 1e-5, cosine: float = 1e-6
) -> None:
    """Asserts that every gradient has the truth's norm and direction. A true zero may have rounding errors of fp32."""
    assert set(ours) == set(truth)
    wrong = []
    largest = max(float(gradient.norm()) for gradient in truth.values())
    for name, expected in truth.items():
        if float(expected.norm()) <= torch.finfo(torch.float64).eps * largest:
            if not float(ours[name].norm()) <= torch.finfo(torch.float32).eps * largest:
                wrong.append(f"{name} should be zero")
            continue
        r, c = ratio_and_cosine(ours[name], expected)
        # This form makes NaN fail.
        if not (abs(r - 1) <= ratio and 1 - c <= cosine):
            wrong.append(f"{name}: ratio {r:.7f}, cosine {c:.9f}")
    assert not wrong, "\n".join(wrong)


def relative_error(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Norm of all differences, divided by the norm of all of `truth`."""
    difference = sum(float((ours[name].double() - truth[name]).square().sum()) for name in truth)
    return float((difference / sum(float(t.square().sum()) for t in truth.values())) ** 0.5)
