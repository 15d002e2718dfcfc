"""One stage of a pipeline: some decoder layers, with the embedding on the first stage and the head on the last."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from alst_impl.hf.structure import decoder_layers, decoder_of, final_norms


class _Elsewhere(nn.Module):
    """Stand-in for a module of another stage: returns the hidden states unchanged."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Border(nn.Module):
    """Stand-in for the first or last layer on a stage without it. Hidden states enter or leave the stage here."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        """Output to return instead of the input; None returns the input."""
        self.seen: Tensor | None = None
        """The last input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.given is None else self.given

    def clear(self) -> None:
        """Drop both tensors."""
        self.given = self.seen = None


def keep_stage(model: PreTrainedModel, kept: range) -> None:
    """Keep only the decoder layers in `kept`, the embedding with the first layer, and the head with the last.

    Parameter names stay the same. Without the first layer, `model(hidden=, ...)` takes hidden states [B, S,
    E] in place of token ids. Without the last layer, it returns hidden states. What the model does to
    embeddings before its layers takes effect on the first stage only. What it does after its layers takes
    effect on the last stage only. Raises `ValueError` for tied embeddings, which two stages would have to
    share.
    """
    layers = list(decoder_layers(model))
    first, last = kept.start == 0, kept.stop == len(layers)
    if not (first and last):
        _refuse_tied(model)
    stack = _stack(model, layers)
    for index in set(range(len(layers))) - set(kept):
        stack[index] = _Border() if index in (0, len(layers) - 1) else _Elsewhere()
    if not first:
        _replace(model, model.get_input_embeddings())
    if not last:
        for module in [*final_norms(model), model.get_output_embeddings()]:
            _replace(model, module)
    whole = model.forward

    def forward(hidden: Tensor | None = None, **kwargs: Any) -> Tensor | CausalLMOutputWithPast:
        ends = [end for end in (stack[0], stack[-1]) if isinstance(end, _Border)]
        try:
            if hidden is not None:
                ends[0].given = hidden
                kwargs["inputs_embeds"] = hidden
            if last:
                output: CausalLMOutputWithPast = whole(**kwargs)
                return output
            decoder_of(model)(**kwargs)
            out = ends[-1].seen
            assert out is not None, "the last layer is another stage's"
            return out
        finally:
            for end in ends:
                end.clear()

    if not (first and last):
        vars(model)["forward"] = forward


def _refuse_tied(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ValueError(
            f"{type(model).__name__} shares one weight between embedding and head, which stages of a "
            "pipeline would each have; use a model without tied embeddings"
        )


def _stack(model: PreTrainedModel, layers: list[nn.Module]) -> nn.ModuleList:
    """The `nn.ModuleList` that holds all decoder layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and list(module) == layers:
            return module
    raise ValueError(f"the decoder layers of {type(model).__name__} are not one list")


def _replace(model: PreTrainedModel, part: nn.Module) -> None:
    """Replace `part` by a stand-in."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is part:
                setattr(module, name, _Elsewhere())
