"""A stand-in for TRL where it is not installed: the hooks of Trainer that its SFTTrainer overrides, and no more.

It packs documents into rows whose positions restart, and computes metrics from logits in `compute_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


@dataclass
class SFTConfig(TrainingArguments):
    """TRL's options that the script uses."""

    packing: bool = False
    max_length: int = 1024


class Dataset(list[dict[str, Any]]):
    """Rows, as those of the package `datasets`."""

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]]) -> Dataset:
        """One row for each value of the columns."""
        names = list(columns)
        return cls(
            dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """TRL's padding-free collator: rows beside each other, positions that restart, no mask."""
    ids = torch.tensor([i for row in rows for i in row["input_ids"]])[None]
    positions = torch.tensor([p for row in rows for n in row["seq_lengths"] for p in range(n)])[
        None
    ]
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


class SFTTrainer(Trainer):
    """TRL's trainer of packed documents."""

    def __init__(
        self, model: Any, args: SFTConfig, train_dataset: Dataset, processing_class: Any
    ) -> None:
        assert args.packing
        texts = [row["text"] for row in train_dataset]
        ids = [processing_class(t, truncation=True, max_length=args.max_length) for t in texts]
        rows = [{"input_ids": i["input_ids"], "seq_lengths": [len(i["input_ids"])]} for i in ids]
        self._metrics: dict[str, list[float]] = {}
        super().__init__(model, args, data_collator=collate, train_dataset=Dataset(rows))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "seq_lengths"]

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """TRL's computes the entropy of all logits, which a shard's loss in tiles never makes."""
        raise AssertionError("the mixin's comes first")

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """TRL's marks the inputs."""
        inputs["_prediction_loss_only"] = True
        return super().prediction_step(model, inputs, *args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's adds the means of its metrics."""
        means = {key: sum(values) / len(values) for key, values in self._metrics.items()}
        super().log({**logs, **means}, start_time)


def modules() -> dict[str, ModuleType]:
    """The modules `trl` and `datasets`."""
    trl, datasets = ModuleType("trl"), ModuleType("datasets")
    for module in (trl, datasets):
        module.__spec__ = ModuleSpec(module.__name__, None)
    vars(trl).update(SFTConfig=SFTConfig, SFTTrainer=SFTTrainer)
    vars(datasets).update(Dataset=Dataset)
    return {"trl": trl, "datasets": datasets}
