"""Prepares the truths of cells: the gradients of their first steps, which `truth.py` computes in another process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from alst_impl.config import DType, Frozen, LoraConfig, TrainConfig
from alst_impl.data import Corpus
from alst_impl.methods.base import step_samples
from alst_impl.models import described, materialize, published
from alst_impl.ops.attention.cores.base import load_core
from harness.gate import truth
from harness.gate.verdict import ROUNDED
from harness.processes.jobs import Rank

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
            run_truth([job.saved(rank.scratch / str(i)) for i, job in enumerate(missing)])
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


def run_truth(jobs: list[list[str]]) -> None:
    """Run `truth.py` in another process on the arguments of each of `jobs`, of which there is at least one.

    Raises what it refuses, `RuntimeError` where it fails.
    """
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
