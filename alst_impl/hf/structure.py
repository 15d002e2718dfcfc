"""Finds the parts of a Hugging Face model by module type and attributes, not by the model's name."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The repeated decoder layers, in order."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers can checkpoint, by whose class methods find them; "
            "use method 'baseline' with checkpoint: false"
        )
    return layers


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, without decorators."""
    forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
    return forward


def names_in_forward(module: nn.Module) -> set[str]:
    """Global names and attributes that the forward of the module's class uses."""
    return set(_forward_of(module).__code__.co_names)


def names_in_methods(module: nn.Module) -> set[str]:
    """As `names_in_forward`, of all methods of the class and of its parts' classes."""
    classes = {type(part) for part in module.modules()}
    methods = (f for cls in classes for f in vars(cls).values() if inspect.isfunction(f))
    return {name for f in methods for name in _names(inspect.unwrap(f).__code__)}


def _names(code: CodeType) -> Iterator[str]:
    """Names that `code` and the functions defined in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _calls_interface(module: nn.Module) -> bool:
    """Whether the module calls transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in_forward(module)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv1d) for part in module.modules())


MIXING = {
    "attention_mask",
    "cache",
    "cache_params",
    "layer_past",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "state",
}
"""Arguments of modules that let a token depend on others: attention, state-space layers, convolutions."""


def _mixes(module: nn.Module) -> bool:
    """Whether a token's output may depend on other tokens, by the module's arguments and parts."""
    return bool(MIXING & set(inspect.signature(_forward_of(module)).parameters)) or _convolves(
        module
    )


def _shards_itself(module: nn.Module) -> bool:
    """Whether the module mixes tokens in transformers' attention interface alone, which we replace."""
    others = (part for part in module.modules() if part is not module)
    return (
        _calls_interface(module)
        and not _convolves(module)
        and not any(_mixes(part) for part in others)
    )


def _found(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """(attention modules, mixers) of the decoder layers, in order, each once."""
    attention: dict[nn.Module, None] = {}
    mixers: dict[nn.Module, None] = {}

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, GradientCheckpointingLayer):
                search(child)
            elif _shards_itself(child):
                attention[child] = None
            elif _mixes(child) and not any(_shards_itself(part) for part in child.modules()):
                mixers[child] = None
            else:
                search(child)

    for layer in decoder_layers(model):
        search(layer)
    if not attention and not mixers:
        raise ValueError(
            f"{type(model).__name__} has no module that uses transformers' attention interface, where methods put their "
            "attention; use method 'baseline'"
        )
    return list(attention), list(mixers)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call transformers' attention interface, and mix tokens in no other way."""
    return _found(model)[0]


def mixers(model: PreTrainedModel) -> list[nn.Module]:
    """The other modules that mix tokens: state-space layers, linear attention, attention with convolutions."""
    return _found(model)[1]


def _tree(module: nn.Module) -> ast.AST:
    """The source of the module's forward, parsed; empty for code that has no file."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(_forward_of(module))))
    except (OSError, TypeError):
        return ast.Module([], [])


def returned_values(module: nn.Module) -> int:
    """Number of values that the source of the module's forward returns."""
    values = [n.value for n in ast.walk(_tree(module)) if isinstance(n, ast.Return)]
    return max((len(v.elts) if isinstance(v, ast.Tuple) else 1 for v in values), default=1)


def _uses_one(layer: nn.Module, name: str) -> bool:
    """Whether the forward of `layer` drops all but the first value of its child `name`: `x, _ = self.name(x)`."""
    found = []
    for node in ast.walk(_tree(layer)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called, (target, *_) = node.value.func, node.targets
            if isinstance(called, ast.Attribute) and called.attr == name:
                rest = target.elts[1:] if isinstance(target, ast.Tuple) else [target]
                found += [isinstance(each, ast.Name) and each.id == "_" for each in rest]
    return bool(found) and all(found)


def token_wise_modules(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """(MLPs, norms): modules that work on one token at a time, with query, key and final norms.

    Modules whose layer uses several of their values are left out. Raises `ValueError` if all MLPs are such.
    """
    attention, others = _found(model)
    mlps, norms = [], []
    left_out = set()
    for layer in decoder_layers(model):
        named = {
            name: m
            for name, m in layer.named_children()
            if not any(part in attention or part in others for part in m.modules())
            and next(m.parameters(), None) is not None
        }
        children = [
            m for name, m in named.items() if returned_values(m) == 1 or _uses_one(layer, name)
        ]
        left_out |= {type(m).__name__ for m in named.values() if m not in children}
        mlps += [m for m in children if "Norm" not in type(m).__name__]
        of_heads = [m for part in layer.children() if part in attention for m in part.children()]
        norms += [m for m in children + of_heads if "Norm" in type(m).__name__]
    if attention and not mlps:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in decoder_layers(model)}))
        left = f", because layers use several values of {', '.join(sorted(left_out))}"
        raise ValueError(
            f"{kinds} has no MLP beside its attention that can run in tiles{left if left_out else ''}; set tile_mlp: "
            "false and tile_norm: false, or use method 'layerwise' or 'baseline'"
        )
    return mlps, norms + final_norms(model)


def decoder_name(model: PreTrainedModel) -> str:
    """Attribute of `model` that holds the decoder: the child with the decoder layers."""
    layer = decoder_layers(model)[0]
    for name, child in model.named_children():
        if any(module is layer for module in child.modules()):
            return name
    raise ValueError(
        f"{type(model).__name__} has no decoder among its children, whose output the tiled loss takes; use method 'baseline'"
    )


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder: embedding, layers and final norm."""
    decoder: nn.Module = getattr(model, decoder_name(model))
    return decoder


def final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norm between the decoder layers and the head, if there is one."""
    return [m for m in decoder_of(model).children() if "Norm" in type(m).__name__]


def refuse_positions_of_shards(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that counts positions itself, or computes its loss itself, from a shard's tokens."""
    for module in model.modules():
        for child in module.children():
            own = isinstance(child, nn.Embedding) and "Position" in type(child).__name__
            if own and "position_ids" not in inspect.signature(_forward_of(module)).parameters:
                raise ValueError(
                    f"{type(module).__name__} takes no position_ids, so {type(child).__name__} would count positions "
                    "from the start of each shard; use method 'baseline'"
                )
    if "loss_function" not in names_in_forward(model):
        raise ValueError(
            f"{type(model).__name__} computes its loss by itself, not with transformers' loss_function, so the losses "
            "of shards do not add up; use method 'baseline'"
        )


def head_name(model: PreTrainedModel) -> str:
    """Attribute of `model` that holds the projection to the vocabulary."""
    head = model.get_output_embeddings()
    for name, child in model.named_children():
        if child is head:
            return name
    raise ValueError(
        f"{type(model).__name__} has no output embedding among its children: no loss to tile; use method 'baseline'"
    )


def without_logits(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a forward without labels that make the head compute logits of one token alone, if it can."""
    takes = inspect.signature(_forward_of(model)).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the routed experts: of all modules that are named `experts`, as transformers does."""
    experts = (module for name, module in model.named_modules() if name.endswith(".experts"))
    return [parameter for module in experts for parameter in module.parameters()]
