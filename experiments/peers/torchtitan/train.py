"""torchtitan's Trainer: context parallelism over FSDP2, full activation checkpointing, chunked loss."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from case import LEARNING_RATE, Case, read_case, refuse
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer
from untimed import compile_untimed

SPECS = {
    ("llama", 32): (llama3, "8B"),
    ("qwen3", 36): (qwen3, "8B"),
    ("qwen3", 64): (qwen3, "32B"),
}
"""torchtitan's own configuration of a model, by type and number of layers."""

case = read_case()
if case.gated:
    refuse("FlexAttention, the only kernel with context parallelism, has no backward on the CPU")


class Blank(BaseDataLoader):
    """Samples of the run, in torchtitan's form: labels are shifted by the loader."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, **_: object) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for _ in range(case.steps):
            for row in case.rows(case.accumulation):
                inputs = {"input": row["input_ids"][None], "positions": row["position_ids"][None]}
                labels = row["labels"].roll(-1)
                labels[-1] = -100
                yield inputs, labels[None]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass


class Ready(BaseTokenizer):
    """Samples are token ids already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, **_: object) -> None:
        super().__init__()

    def encode(self, *_: object, **__: object) -> list[int]:
        return []

    def decode(self, *_: object, **__: object) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 0


def spec(case: Case) -> ModelSpec:
    """The model, with positions up to the length of a sample."""
    config = json.loads((Path(case.model) / "config.json").read_text())
    models, size = SPECS[config["model_type"], config["num_hidden_layers"]]
    found = models.model_registry(size)
    for layer in found.model.layers:
        layer.attention.rope = replace(layer.attention.rope, max_seq_len=case.seqlen)
    return found


compile_untimed()
model = spec(case)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        Trainer.Config(
            model_spec=model,
            dump_folder=folder,
            tokenizer=Ready.Config(),
            dataloader=Blank.Config(),
            optimizer=default_adamw(lr=LEARNING_RATE),
            training=TrainingConfig(
                local_batch_size=1,
                global_batch_size=case.accumulation,
                seq_len=case.seqlen,
                steps=case.steps,
                dtype="bfloat16",
                enable_cpu_offload=case.states == "host",
                disable_cuda_graphs=True,
            ),
            parallelism=ParallelismConfig(
                context_parallel_degree=case.world_size,
                # the default backend needs DTensor features of a later PyTorch; the bytes of the other two are equal
                spmd_backend="partial_dtensor",
            ),
            activation_checkpoint=FullAC.Config(),
            loss=ChunkedLossWrapper.Config(
                loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(model))
            ),
        )
    )
    samples = trainer.batch_generator(trainer.dataloader)
    for trainer.step in range(1, case.steps + 1):
        trainer.train_step(samples)
    trainer.close()
