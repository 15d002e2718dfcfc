"""Gradients of a cell's first step beside the truth, which `truth.py` computes in a process of its own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alst_impl.config import TrainConfig
from alst_impl.data import Corpus
from alst_impl.methods.base import load_method
from alst_impl.models import materialize, published
from harness import truth
from harness.gate import TOLERANCES, excess
from harness.processes import Rank
from harness.record import Gate, ParameterGate

TRUTH = Path(truth.__file__)


def corpus_of(train: TrainConfig) -> Corpus:
    """The samples of a run; those of accumulated steps hold unequal numbers of labels."""
    vocab_size = published(train.model, train.overrides)["vocab_size"]
    return Corpus(train.data, train.seqlen, train.seed, vocab_size, uneven=train.accumulation > 1)


def first_step_samples(train: TrainConfig) -> dict[str, Tensor]:
    """Every sample of step 0 over all ranks and micro-batches; int64 [N, S] each."""
    dp = load_method(train.method).axes(train.world_size)["dp"]
    corpus = corpus_of(train)
    samples = [corpus.sample(i) for i in range(train.accumulation * dp * train.batch_size)]
    ids, labels, positions, _ = zip(*samples, strict=True)
    return {
        "input_ids": torch.stack(ids),
        "labels": torch.stack(labels),
        "position_ids": torch.stack(positions),
    }


def prepare_truth(rank: Rank, payload: dict[str, Any]) -> str:
    """Path of the truth for `payload["train"]`, kept in the folder `payload["cache"]`.

    Truths are addressed by content: weights, samples, configuration, the script and the libraries
    that compute them. Those who want the same one wait for the first.
    """
    train = TrainConfig(**payload["train"])
    rank.progress("building the model for the truth")
    model = materialize(train).float()  # exact: weights are drawn in fp32 and rounded to the dtype
    samples = first_step_samples(train)
    key = _content_hash(published(train.model, train.overrides), model.state_dict(), samples)
    cache = Path(payload["cache"])
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{key}.safetensors"
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            rank.progress("computing the truth: stock model, whole, fp64")
            folder = rank.scratch / "model"
            model.save_pretrained(folder)
            save_file(samples, rank.scratch / "samples.safetensors")
            _run_truth(folder, rank.scratch / "samples.safetensors", path)
    return str(path)


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


def _run_truth(folder: Path, samples: Path, output: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(TRUTH), str(folder), str(samples), str(output)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(
            f"the truth could not be computed: {lines[-1] if lines else done.returncode}"
        )


def compare(ours: dict[str, Tensor], loss: float, truth_file: str, train: TrainConfig) -> Gate:
    """Every parameter's gradient against the truth, in fp64. A gradient we lack counts as zero."""
    expected = load_file(truth_file)
    truth_loss = float(expected.pop("loss"))
    unknown = sorted(ours.keys() - expected.keys())
    if unknown:
        raise RuntimeError(f"gradients of parameters that the stock model does not have: {unknown}")
    tolerance = TOLERANCES[train.dtype]
    compared = [_compare_one(name, ours.get(name), expected[name]) for name in expected]
    parameters = [parameter for parameter, _ in compared]
    excesses = [
        excess(parameter, tolerance) if usable else float("inf") for parameter, usable in compared
    ]
    worst = max(range(len(parameters)), key=excesses.__getitem__)
    loss_close = abs(loss - truth_loss) <= tolerance.ratio * abs(truth_loss)
    return Gate(
        passed=excesses[worst] <= 1 and loss_close,
        loss=loss,
        truth_loss=truth_loss,
        worst=parameters[worst],
        parameters=parameters,
    )


def _compare_one(name: str, ours: Tensor | None, truth: Tensor) -> tuple[ParameterGate, bool]:
    """The comparison, and whether ours is finite, and zero where the truth is."""
    mine = torch.zeros_like(truth) if ours is None else ours.to(torch.float64)
    if mine.shape != truth.shape:
        raise RuntimeError(f"gradient of {name} is {tuple(mine.shape)}, not {tuple(truth.shape)}")
    ours_norm, truth_norm = float(mine.norm()), float(truth.norm())
    if truth_norm == 0 or not torch.isfinite(mine).all():
        blank = ParameterGate(parameter=name, ratio=None, cosine=None)
        return blank, ours_norm == 0 and truth_norm == 0
    product = float((mine * truth).sum())
    cosine = product / (ours_norm * truth_norm) if ours_norm else 0.0
    return ParameterGate(parameter=name, ratio=ours_norm / truth_norm, cosine=cosine), True
