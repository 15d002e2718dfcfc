"""Compares the gradients of a cell's first step with the truth, which `truth.py` computes in another process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alst_impl.config import DType, Frozen, LoraConfig, OptimizerConfig, TrainConfig
from alst_impl.data import Corpus
from alst_impl.methods.base import step_samples
from alst_impl.models import described, materialize, published
from alst_impl.ops.attention.cores.base import load_core
from harness.gate import truth
from harness.gate.verdict import (
    ROUNDED,
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
from harness.processes.jobs import Rank
from harness.records.record import Gate, ParameterGate

TRUTH = Path(truth.__file__)


def corpus_of(train: TrainConfig) -> Corpus:
    """The samples of a run. With accumulation, micro-batches have unequal numbers of labels."""
    vocab_size = described(train.model, train.overrides)["vocab_size"]
    return Corpus(
        train.data,
        train.seqlen,
        train.seed,
        vocab_size,
        uneven=train.accumulation > 1,
        step_samples=step_samples(train),
    )


def samples_of(train: TrainConfig, step: int) -> dict[str, Tensor]:
    """All sequences of `step`, over all ranks and micro-batches: int64 [N, S] each."""
    corpus, count = corpus_of(train), step_samples(train)
    rows = [row for i in range(step * count, (step + 1) * count) for row in corpus.rows(i)]
    ids, labels, positions, _ = zip(*rows, strict=True)
    return {
        "input_ids": torch.stack(ids),
        "labels": torch.stack(labels),
        "position_ids": torch.stack(positions),
    }


def pattern_of(train: TrainConfig) -> dict[str, Any] | None:
    """The attention pattern of a run with all its options, as `truth.masks` takes it; None without one."""
    pattern = load_core(train.attention).pattern
    if pattern is None:
        return None
    return {"name": pattern.name, **pattern.model_dump()}


class Truth(Frozen):
    """Files with the gradients that a cell is compared with."""

    exact: str
    """Gradients in fp64."""
    rounded: str | None = None
    """Gradients of the stock model in the cell's dtype, if that dtype alone loses much accuracy."""
    doubts: str | None = None
    """What rounding to that dtype can do to gradients, for a cell that failed: see `truth.doubts`."""


def prepare_truths(rank: Rank, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """A `Truth` for each of `payload["trains"]`, kept in the folder `payload["cache"]`; with `payload["doubts"]` or without.

    The name of a truth is a hash of weights, samples, configuration, `truth.py` and its libraries. One process
    computes all missing truths. Processes that need the same truth wait for the first to compute it.
    """
    cache = Path(payload["cache"])
    cache.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, _Job] = {}
    truths = []
    for raw in payload["trains"]:
        rank.progress("building the model for the truth")
        truths.append(_wanted(TrainConfig(**raw), cache, jobs, doubts=payload["doubts"]))
    with contextlib.ExitStack() as stack:
        for key in sorted(jobs):  # all processes lock in this order, so none deadlocks
            lock = stack.enter_context((cache / f"{key}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [job for job in jobs.values() if not job.output.exists()]
        if missing:
            rank.progress("computing the truth: stock model, whole, fp64")
            _run_truth([job.saved(rank.scratch / str(i)) for i, job in enumerate(missing)])
    return [truth.model_dump() for truth in truths]


@dataclass(frozen=True)
class _Job:
    """One run of the stock model."""

    model: PreTrainedModel
    samples: dict[str, Tensor]
    output: Path
    dtype: DType
    what: str
    lora: LoraConfig | None
    pattern: dict[str, Any] | None

    def saved(self, folder: Path) -> list[str]:
        """Write the input of `truth.py` to `folder`. Returns its arguments."""
        if self.lora is None:
            self.model.save_pretrained(folder)
        else:
            self._save_adapted(folder, self.lora)
        if self.pattern is not None:
            (folder / truth.PATTERN).write_text(json.dumps(self.pattern))
        save_file(self.samples, folder / "samples.safetensors")
        paths = [str(folder), str(folder / "samples.safetensors"), str(self.output)]
        return [*paths, self.dtype, self.what]

    def _save_adapted(self, folder: Path, lora: LoraConfig) -> None:
        self.model.config.save_pretrained(folder)
        arguments = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(lora.targets),
            "lora_dropout": lora.dropout,
        }
        (folder / truth.LORA).write_text(json.dumps(arguments))
        # A safetensors file can hold tied parameters only once; `named_parameters` lists them once.
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        save_file(weights, folder / truth.ADAPTED)


def _wanted(train: TrainConfig, cache: Path, jobs: dict[str, _Job], *, doubts: bool) -> Truth:
    """The truth of `train`, with `doubts` or without. Adds the runs for what does not exist yet to `jobs`."""
    model = materialize(
        train
    ).float()  # exact, since weights are drawn in fp32 and then rounded to the dtype
    samples = samples_of(train, 0)
    config = published(train.model, train.overrides)
    if train.lora is not None:
        config["lora"] = train.lora.model_dump(mode="json")
    pattern = pattern_of(train)
    if pattern is not None:
        config["pattern"] = pattern
    content = _content_hash(config, model.state_dict(), samples)

    def file(dtype: DType, what: str = "gradients") -> str:
        key = content if dtype == "float64" else f"{content}-{dtype}"
        key += "" if what == "gradients" else f"-{what}"
        output = cache / f"{key}.safetensors"
        if not output.exists():
            jobs[key] = _Job(model, samples, output, dtype, what, train.lora, pattern)
        return str(output)

    if train.dtype not in ROUNDED:
        return Truth(exact=file("float64"))
    return Truth(
        exact=file("float64"),
        rounded=file(train.dtype),
        doubts=file(train.dtype, "doubts") if doubts else None,
    )


def _content_hash(
    config: dict[str, Any], weights: dict[str, Tensor], samples: dict[str, Tensor]
) -> str:
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    digest = hashlib.sha256(json.dumps([config, libraries], sort_keys=True).encode())
    digest.update(TRUTH.read_bytes())
    for tensors in (weights, samples):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _run_truth(jobs: list[list[str]]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    arguments = [argument for job in jobs for argument in job]
    done = subprocess.run(
        [sys.executable, str(TRUTH), *arguments],
        cwd=jobs[0][0],  # keeps our code off the path of the truth
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    for code, refusal in ((truth.REFUSED, truth.Refused), (truth.UNABLE, truth.Unable)):
        if done.returncode == code:
            raise refusal(lines[-1])
    if done.returncode:
        raise RuntimeError(
            f"the truth could not be computed: {lines[-1] if lines else done.returncode}"
        )


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
