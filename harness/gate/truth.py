"""The truth: gradients of a stock transformers model, run in one process in fp64.

    python truth.py (MODEL_FOLDER SAMPLES.safetensors GRADIENTS.safetensors DTYPE WHAT)...

DTYPE is `float64` for the truth. With another DTYPE the result shows the loss of accuracy of that dtype alone.
WHAT is `gradients`, or `doubts`: all that rounding to DTYPE can do to them, see `doubts`. This file shares no code with the code that it judges, because an error in shared code would not show.

`save_pretrained` writes MODEL_FOLDER. With adapters it holds `config.json`, `lora.json` (arguments of peft's
`LoraConfig`) and `adapted.safetensors` (all weights by name), and for attention with a pattern `pattern.json`, its
name and all its options: the truth then has the same mask, see `masks`. SAMPLES hold `input_ids`, `labels` (not shifted, -100
is ignored) and `position_ids`, int64 [N, S], of every micro-batch of one optimizer step on all ranks.

GRADIENTS get the gradient of each parameter, tied ones once, and `loss`: the sum of all token losses divided by the
number of labels, and a router loss if the configuration asks for it (`output_router_logits`). A model whose step draws
random numbers has no truth: exit code `REFUSED` and one line on stderr; one that fails in DTYPE: exit code `UNABLE`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

REFUSED = 3
"""Exit code for a model without a truth."""
UNABLE = 5
"""Exit code for a model that does not run in the dtype."""
NEIGHBOURS, TIES = 8, 4
"""Weights beside the given ones, and choices that can go the other way, that `doubts` looks at."""
PROBED = 4
"""Number of tokens that suffices to see whether a model draws random numbers."""
ADAPTED, LORA = "adapted.safetensors", "lora.json"
"""Weights of a model with adapters, and arguments of peft's `LoraConfig`."""
PATTERN = "pattern.json"
"""Name and options of a pattern of attention."""


class Refused(ValueError):
    """The model has no truth."""


class Unable(ValueError):
    """The stock model does not run in the dtype, so no run in that dtype can be compared with it."""


def gradients(
    folder: str, samples: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Gradients in `dtype` by parameter name, and `loss` in fp64, of the model in `folder`."""
    return gradients_of(_model(folder, dtype), samples)


def doubts(
    folder: str, samples: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What rounding to `dtype` can do to the gradients of the model in `folder`, in two kinds of entries, in fp32.

    `error|i|NAME` is the gradient in `dtype` less that in fp64, with the same choices by top-k; for i = 0 at the
    weights, else at weights beside them: each weight has moved to the next number of its dtype, up or down. The
    problem hardly changes, but everything is rounded anew, so the errors show how far rounding moves a gradient.

    `truth|CHOICE|NAME` is the gradient in fp64 if a choice by top-k, such as that of a token's experts, goes the
    other way between scores that are closer than `dtype` tells apart. CHOICE says which.
    """
    model, exact = _model(folder, dtype), _model(folder, torch.float64)
    found: dict[str, torch.Tensor] = {}
    for index in range(NEIGHBOURS + 1):
        if index:
            _move(model, exact, torch.Generator().manual_seed(index))
        truth, free = _chosen(exact, samples)
        rounded, forced = _chosen(model, samples, free.taken)
        found |= {f"error|{index}|{name}": rounded[name].double() - truth[name] for name in truth}
        if not index:
            for said, other in _others(exact, samples, truth, free, forced).items():
                found |= {f"truth|{said}|{name}": other[name] for name in other}
    return {name: tensor.float() for name, tensor in found.items()}


class _Choices(TorchDispatchMode):
    """Records choices by top-k along the last axis. With `made`, a run makes these instead of its own."""

    def __init__(self, made: list[torch.Tensor] | None) -> None:
        TorchDispatchMode.__init__(self)
        self.made = made
        self.at = ""
        """The module that was entered last."""
        self.taken: list[torch.Tensor] = []
        """What each call took, int64 [rows, k]."""
        self.scores: list[torch.Tensor] = []
        """What each call chose from, fp64 [rows, n]."""
        self.where: list[str] = []
        """The module of each call."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.topk.default:
            return out
        named = dict(zip(("scores", "k", "dim", "largest"), args, strict=False))
        scores, taken = named["scores"], out[1]
        if named.get("dim", -1) not in (-1, scores.dim() - 1) or not named.get("largest", True):
            return out
        if self.made is not None:
            taken = self.made[len(self.taken)].view_as(taken)
        self.taken.append(taken.reshape(-1, taken.shape[-1]))
        self.scores.append(scores.detach().double().reshape(-1, scores.shape[-1]))
        self.where.append(self.at)
        return scores.gather(-1, taken), taken


def _chosen(
    model: Any, samples: dict[str, torch.Tensor], made: list[torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], _Choices]:
    """Gradients of `model`, with the choices `made` or its own, and these choices."""
    model.zero_grad()
    choices = _Choices(made)
    names = {module: name for name, module in model.named_modules()}

    def enter(module: Any, _: Any) -> None:
        choices.at = names[module]

    hook = register_module_forward_pre_hook(enter)
    try:
        with choices:
            return gradients_of(model, samples), choices
    finally:
        hook.remove()


def _move(model: Any, exact: Any, generator: torch.Generator) -> None:
    """Move each weight of `model` to the next number up or down, and those of `exact` to the same place."""
    with torch.no_grad():
        for p, held in zip(model.parameters(), exact.parameters(), strict=True):
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            held.copy_(p.copy_(torch.nextafter(p, (signs * torch.inf).to(p.dtype))))


class _Tie(NamedTuple):
    """A choice that rounding can turn: one call takes `other` in place of `taken` for one row."""

    call: int
    row: int
    taken: int
    other: int
    share: float
    """Distance of their scores, divided by the largest that rounding can change."""
    said: str


def _ties(free: _Choices, forced: _Choices) -> list[_Tie]:
    """Choices of the exact run `free` that rounding can turn, closest first. `forced` is the rounded run."""
    found = []
    for call, (scores, taken) in enumerate(zip(free.scores, free.taken, strict=True)):
        last = scores.gather(-1, taken).min(-1)
        rest = scores.scatter(-1, taken, -torch.inf).max(-1)
        off = (forced.scores[call] - scores).abs().nan_to_num(0, posinf=0).max()  # masked: infinite
        apart = last.values - rest.values
        for row in (apart <= 2 * off).nonzero().flatten().tolist():
            one, other = int(taken[row, last.indices[row]]), int(rest.indices[row])
            said = (
                f"{free.where[call]} takes {other} in place of {one} for row {row} "
                f"(scores {apart[row]:.1e} apart, each rounded by up to {off:.1e})"
            )
            found.append(_Tie(call, row, one, other, float(apart[row] / (2 * off)), said))
    return sorted(found, key=lambda tie: tie.share)


def _others(
    exact: Any,
    samples: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    free: _Choices,
    forced: _Choices,
) -> dict[str, dict[str, torch.Tensor]]:
    """Exact gradients with every combination of turned ties, of the first `TIES` that change the loss."""
    sets = {"": (free.taken, truth)}
    for tie in _ties(free, forced)[: 4 * TIES]:
        more = {}
        for said, (made, _) in sets.items():
            turned = [taken.clone() for taken in made]
            row = turned[tie.call][tie.row]
            row[row == tie.taken] = tie.other
            found, _ = _chosen(exact, samples, turned)
            if not said and torch.isclose(found["loss"], truth["loss"], rtol=2**-23, atol=0):
                break  # nothing hangs on it: the row has no label, or the call only ranks groups
            more[" and ".join(filter(None, (said, tie.said)))] = turned, found
        sets |= more
        if len(sets) == 2**TIES:
            break
    return {said: found for said, (_, found) in sets.items() if said}


def gradients_of(model: Any, samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `gradients`, of a loaded model in its own dtype."""
    dtype = model.dtype
    model.train()
    drawn = refusal(model, samples["input_ids"][:1, :PROBED])
    if drawn:
        raise Refused(drawn)
    count = max(int((samples["labels"][:, 1:] != -100).sum()), 1)
    seen = samples.get("masks", [None] * len(samples["labels"]))
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, positions, mask in zip(
        samples["input_ids"], samples["labels"], samples["position_ids"], seen, strict=True
    ):
        # Without an attention mask, transformers separates packed documents by their positions.
        output = model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=None if mask is None else mask.to(dtype).log()[None, None],
            use_cache=False,
        )
        logits = output.logits
        # Some models round their logits to fp32, for a soft-cap: their truth is then as exact as fp32.
        if logits.dtype not in (dtype, torch.float32):
            raise Refused(
                f"{type(model).__name__} computes logits in {logits.dtype}, although its weights are {dtype}: "
                "there is no truth to compare with"
            )
        # Transformers computes a loss in fp32 or wider.
        wide = logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(
            wide, labels[1:], ignore_index=-100, reduction="sum"
        )
        loss = losses / count
        router_loss = getattr(output, "aux_loss", None)
        if router_loss is not None:  # the mean over samples, by label
            share = (labels[1:] != -100).sum() / count
            loss = loss + model.router_aux_loss_coef * router_loss * share
        loss.backward()
        total += loss.detach()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {**found, "loss": total}


def masks(pattern: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees under `pattern`, bool [N, S, S], for `position_ids` [N, S] of packed documents.

    Places are those of a token in its document. `window`: the last keys, every `dilation`-th, and the first
    `global_tokens`. `block_sparse`: blocks see the last `window_blocks`, the first `global_blocks` and some others.
    """
    document = (positions == 0).cumsum(1)
    query, key = positions[:, :, None], positions[:, None, :]
    before = (document[:, :, None] == document[:, None, :]) & (key <= query)
    if pattern["name"] == "window":
        steps, rest = (query - key) // pattern["dilation"], (query - key) % pattern["dilation"]
        near = (rest == 0) & (steps < pattern["window"])
        return torch.logical_and(before, near | (key < pattern["global_tokens"]))
    if pattern["name"] != "block_sparse":
        raise Refused(f"pattern '{pattern['name']}' has no dense mask in {Path(__file__).name}")
    query, key = query // pattern["block"], key // pattern["block"]
    found = (query - key < pattern["window_blocks"]) | (key < pattern["global_blocks"])
    for block in range(int(query.max()) + 1):
        others = np.arange(pattern["global_blocks"], block - pattern["window_blocks"] + 1)
        count = min(pattern["random_blocks"], len(others))
        if count:
            random_blocks = np.random.default_rng([pattern["seed"], block]).choice(
                others, count, replace=False
            )
            found |= (query == block) & torch.isin(key, torch.from_numpy(random_blocks))
    return torch.logical_and(before, found)


class _Lowest(TorchDispatchMode):
    """Sets random draws to their lowest value, so that dropout drops everything and noise is at its limit."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]  # without its overload
        if name == "aten::uniform_":
            return out.fill_(args[1] if len(args) > 1 else 0.0)
        return out.zero_() if name in ("aten::rand", "aten::bernoulli_") else out


def refusal(model: Any, ids: torch.Tensor) -> str | None:
    """Why `model` has no truth: random draws change its logits in training. None if none does.

    `ids` are int64 [1, S]. A draw that changes nothing is allowed: some models draw whether to skip a layer even
    if the probability is 0. The states of the random generators are restored.
    """
    found: list[str] = []
    before: dict[Any, Any] = {}

    def enter(module: Any, *_: Any) -> None:
        before[module] = len(found), _states()

    def leave(module: Any, *_: Any) -> None:
        count, states = before.pop(module)
        if count == len(found) and not _same(states, _states()):  # no inner module was added
            found.append(f"'{names[module]}' ({type(module).__name__})")

    names = {module: name for name, module in model.named_modules()}
    hooks = [m.register_forward_pre_hook(enter) for m in names]
    hooks += [m.register_forward_hook(leave) for m in names]
    states = _states()
    try:
        with torch.no_grad():
            first = model(input_ids=ids, use_cache=False).logits
            if _same(states, _states()):
                return None
            for hook in hooks:
                hook.remove()
            with _Lowest():
                second = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if torch.equal(first, second):
        return None
    return (
        f"model_type '{model.config.model_type}' draws random numbers in training, in {found[0]}"
        f"{f' and {len(found) - 1} other modules' if len(found) > 1 else ''}: no two steps are the same, so "
        f"there is no truth to compare with; {_way_out(model.config)}"
    )


def _states() -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _same(a: tuple[torch.Tensor, Any], b: tuple[torch.Tensor, Any]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1]


def _way_out(config: Any) -> str:
    """What to change: the config fields that, by their names, ask for random numbers."""
    asking = [
        f"{key} ({value})"
        for key, value in sorted(config.to_dict().items())
        if any(word in key for word in ("drop", "jitter"))
        and isinstance(value, float)
        and value > 0
    ]
    fields = ", ".join(asking) or "what asks for them"
    return f"set {fields} to 0 in its config.json"


def _model(folder: str, dtype: torch.dtype) -> Any:
    """The model in `folder`, with adapters if the folder has weights of adapters."""
    # Grouped matrix products of experts do not support fp64.
    kinds = {"experts_implementation": "eager"}
    adapted = Path(folder, ADAPTED)
    if not adapted.exists():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **kinds
        )
    import peft

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kinds)
    arguments = json.loads(Path(folder, LORA).read_text())
    peft.inject_adapter_in_model(peft.LoraConfig(**arguments), model)
    model.load_state_dict(load_file(adapted), strict=False)
    return model.to(dtype)


def main(folder: str, samples: str, output: str, dtype: str, what: str) -> None:
    """Compute `what` and write `output` atomically."""
    compute = {"gradients": gradients, "doubts": doubts}[what]
    given, pattern = load_file(samples), Path(folder, PATTERN)
    if pattern.exists():
        given["masks"] = masks(json.loads(pattern.read_text()), given["position_ids"])
    try:
        found = compute(folder, given, getattr(torch, dtype))
    except RuntimeError as error:
        if dtype == "float64":
            raise
        said = " ".join(str(error).split())
        raise Unable(f"the stock model does not run in {dtype}: {said}") from error
    partial = f"{output}.{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
    os.replace(partial, output)


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 5):
        try:
            main(*sys.argv[first : first + 5])
        except (Refused, Unable) as error:
            print(error, file=sys.stderr)
            sys.exit(REFUSED if isinstance(error, Refused) else UNABLE)
