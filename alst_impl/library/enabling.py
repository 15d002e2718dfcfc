"""Makes a user's model train on long sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from alst_impl.config import Spec
from alst_impl.library.guard import Guard, Reduction, guard, own_forwards, part_names
from alst_impl.library.sequence import LongSequence
from alst_impl.library.setting import check_attention, device_of, settle
from alst_impl.placement import Placement


def enable(
    model: torch.nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    method: str = "alst",
    reduction: Reduction = "mean",
    attention: str | dict[str, Any] = "sdpa",
    checkpoint: bool = True,
    host: str = "cpu",
    **options: Any,
) -> LongSequence:
    """Make `model` train on long sequences, in place. Call it before the model is wrapped in an engine.

    `model` is a causal model of transformers, or peft's wrapper of one. `options` are the fields of the
    `method`: `enable(model, sp=2)` shares each sample between two ranks, `enable(model, method="ring", cp=2)`
    too. Methods are `alst`, `chunked`, `layerwise`, `ring` and `usp`, the files in `alst_impl/methods/`; a sample that
    `chunked` cuts takes several calls of the model, see `LongSequence.chunks`. With a `mesh` of
    all ranks the sizes of its axes `dp`, `cp` and `sp` decide; without one, `enable` makes it, which is
    collective.

    With `reduction` "mean", gradients are right once they are averaged over all ranks, as DDP, fully_shard,
    DeepSpeed, accelerate and Trainer do; with "sum", once they are summed. `attention` names a file in
    `alst_impl/ops/attention/cores/`, or has its `name` and options, such as a `pattern`. `checkpoint` recomputes decoder layers in backward; `host` is the device
    that keeps what is offloaded.

    Dropout of layers and adapters is drawn for each token alone, whatever seeds the ranks have; `alst_impl.ops.draws`
    says in which sense it is the same training.

    The saved model is a stock model, and other models of the process are untouched. Raises `ValueError` for a
    model or a setting that cannot be exact, naming the part.
    """
    inner = _plain(model, reduction)
    spec = Spec(name=method, options=options)
    setting, mesh = settle(inner, mesh, spec, {"attention": attention, "checkpoint": checkpoint})
    if setting.shards > 1:
        _refuse_dropped_weights(inner)
    placement = Placement(device_of(inner, mesh), torch.device(host))
    check_attention(setting.config.attention, placement.device)
    before = set(own_forwards(inner))
    setting.method.apply(inner, setting.config, mesh, placement)
    if checkpoint:
        setting.method.checkpoint(inner, placement)
    inner.train()
    made = guard(
        inner,
        lambda forward: Guard(
            inner=forward,
            shards=setting.shards,
            scale=mesh.size() if reduction == "mean" else 1,
            whole_loss=not getattr(setting.method, "tile_loss", True),
            changed=[module for module in own_forwards(inner) if module not in before],
            parts=part_names(inner) if method == "layerwise" else None,
        ),
    )
    alst = LongSequence(inner, mesh, placement.device, reduction, placement.evidence, setting, made)
    vars(inner)["long_sequence"] = alst
    return alst


def enabled(model: torch.nn.Module) -> LongSequence:
    """What `enable` returned for `model`. Raises `ValueError` for a model that is not enabled."""
    inner = _inside(model)
    found: LongSequence | None = vars(inner).get("long_sequence")
    if found is None or found.model is not inner:
        raise ValueError(
            f"{type(inner).__name__} is not enabled; call enable(model, sp=...) before the trainer is made"
        )
    return found


def _refuse_dropped_weights(model: PreTrainedModel) -> None:
    """Raise `ValueError` for adapters of peft that drop parts of weights, which is for all tokens of a sample at once."""
    for adapters in getattr(model, "peft_config", {}).values():
        for name in ("boft_dropout", "module_dropout", "rank_dropout"):
            if value := getattr(adapters, name, 0):
                raise ValueError(
                    f"peft's {type(adapters).__name__} drops parts of weights ({name}={value}) for all tokens at once, but "
                    f"each rank would drop others; set {name} to 0"
                )


def _plain(model: torch.nn.Module, reduction: str) -> PreTrainedModel:
    """The model inside peft's wrapper. Raises `ValueError` for what `enable` does not take."""
    inner = _inside(model)
    adapters = getattr(model, "active_peft_config", None)
    if getattr(adapters, "is_prompt_learning", False):
        raise ValueError(
            f"peft's {type(adapters).__name__} puts tokens of its own before each input, so each shard would begin with "
            "them; use LoRA or another method that changes layers"
        )
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model; call enable(model) before DDP, fully_shard, "
            "DeepSpeed or torch.compile wraps it"
        )
    if "guard" in vars(inner):
        raise ValueError(f"{type(inner).__name__} is enabled already; build another model")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction ({reduction!r}) must be 'mean' or 'sum'")
    return inner


def _inside(model: torch.nn.Module) -> torch.nn.Module:
    """The model that methods change: the one inside peft's wrapper, if there is one."""
    inner: torch.nn.Module = getattr(model, "get_base_model", lambda: model)()
    return inner
