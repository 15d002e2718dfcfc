"""What the scripts beside this file share: arguments, the process group, and text as samples.

A model is a local folder or a name on the hub. Text is a local file or folder, or the name of a data set on the hub
with a column `text` (which needs the package `datasets`).
"""

import argparse
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="local folder or hub name")
    parser.add_argument("--data", default="emozilla/pg19", help="local text or hub name")
    parser.add_argument("--output", default="trained", help="folder of the trained model")
    parser.add_argument("--sp", type=int, default=2, help="ranks that share each sample")
    parser.add_argument("--seqlen", type=int, default=32_768, help="most tokens of a sample")
    parser.add_argument("--batch", type=int, default=1, help="samples per micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    return parser.parse_args(argv)


def start() -> torch.device:
    """Join the process group of torchrun; the device of this rank."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    return torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))


class Text(Dataset):
    """One sample per document, at most `seqlen` tokens of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.documents, self.seqlen = documents(args.data), args.seqlen
        self.collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        text = self.documents[index]
        ids = self.tokenizer(text, truncation=True, max_length=self.seqlen)["input_ids"]
        return {"input_ids": ids}


def documents(data: str) -> list[str]:
    """Texts of a local file or folder, one per file, or of a data set on the hub."""
    path = Path(data)
    if path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        return [file.read_text() for file in files]
    return import_module("datasets").load_dataset(data, split="train")["text"]


def steps(loader: DataLoader, count: int, accumulate: int = 1) -> Iterator[list]:
    """The micro-batches of each of `count` optimizer steps, epoch after epoch."""
    batches, epoch = [], 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            if len(batches) == accumulate:
                yield batches
                batches, count = [], count - 1
                if count == 0:
                    return
        epoch += 1
