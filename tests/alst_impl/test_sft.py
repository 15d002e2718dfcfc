"""TRL's own SFTTrainer around an enabled model: exact, or refused with a one-line error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from small import LAUNCHER, batches, enabled, stock_gradients, stock_model
from tokenizers import Tokenizer, models
from torch import Tensor
from training import assert_same_gradients
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from alst_impl import LongSequenceTrainer

if TYPE_CHECKING:
    from conftest import Ranks

FAMILIES = Path(__file__).parents[1] / "families"


def sft(folder: str, model: Any, data: list[dict[str, Tensor]], **settings: Any) -> Any:
    """An SFTTrainer on long sequences that takes one step of plain SGD, whose update is the gradient.

    `data` are its micro-batches. Settings of `SFTConfig`, and `peft_config`.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    os.environ.update(LAUNCHER)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, "<pad>"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    columns = {key: torch.cat([b[key] for b in data]).tolist() for key in ("input_ids", "labels")}
    dataset = Dataset.from_dict(columns)
    adapters = settings.pop("peft_config", None)
    arguments = SFTConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=1.0,
        max_grad_norm=0.0,
        max_steps=1,
        per_device_train_batch_size=len(data[0]["input_ids"]),
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=len(data),
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    kind = type("LongSFTTrainer", (LongSequenceTrainer, SFTTrainer), {})
    return kind(
        model,
        arguments,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapters,
    )


def moved(trainer: Any) -> dict[str, Tensor]:
    """The gradients of a trainer's step."""
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in named.items()}


def in_sft_trainer(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: padded samples with prompts, evaluation, and adapters that the trainer makes."""
    data = batches()
    trainer = sft(folder, enabled(2)[0], data)
    stock = stock_model()
    with torch.no_grad():
        losses = [
            float(stock(input_ids=i[None], labels=n[None]).loss)
            for b in data
            for i, n in zip(b["input_ids"], b["labels"], strict=True)
        ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses))
    assert_same_gradients(moved(trainer), stock_gradients(stock_model(), data))

    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = sft(folder, enabled(2)[0], data, peft_config=adapters)
    expected = peft.get_peft_model(stock_model(), adapters)
    expected.load_state_dict(trainer.model.state_dict())
    assert_same_gradients(moved(trainer), stock_gradients(expected, data))


def test_the_trainer_of_trl_is_exact(ranks: Ranks, tmp_path: Path) -> None:
    """The mean loss of samples, and after it gradients of two micro-batches with unequal numbers of labels."""
    ranks(2)(in_sft_trainer, str(tmp_path))


def experts(*, routed: bool) -> Any:
    """A tiny mixture of experts, with or without its router loss."""
    fields = json.loads((FAMILIES / "qwen3_moe.json").read_text()) | {
        "output_router_logits": routed
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()


def with_other_losses(rank: int, world_size: int, folder: str) -> None:
    """Body of a rank: losses that TRL adds or replaces."""
    data = [{key: value[:, :20] for key, value in batches()[0].items()}]
    with pytest.raises(ValueError, match="loss_type 'dft' computes a loss from logits"):
        sft(folder, enabled(2)[0], data, loss_type="dft").train()
    with pytest.raises(ValueError, match=r"became \(True, .*, but were None at enable\(\)"):
        sft(folder, enabled(2, experts(routed=False))[0], data).train()
    model, _ = enabled(2, experts(routed=True))
    with pytest.raises(ValueError, match=r"became \(True, 0\.5\), but were \(True,"):
        sft(folder, model, data, router_aux_loss_coef=0.5).train()
    model, _ = enabled(2, experts(routed=True))
    truth = stock_gradients(experts(routed=True), data)
    assert_same_gradients(moved(sft(folder, model, data)), truth)


def test_other_losses_of_trl_are_exact_or_refused(ranks: Ranks, tmp_path: Path) -> None:
    """A weighted loss is refused, and a router loss that begins after `enable`; one from before trains."""
    ranks(2)(with_other_losses, str(tmp_path))
