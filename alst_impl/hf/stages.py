"""One stage of a pipeline: some decoder layers, with the model's first or last part."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from alst_impl.hf.structure import decoder_layers, final_norms


class _Elsewhere(nn.Module):
    """Stands for what another stage has: passes hidden states on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Border(nn.Module):
    """Stands for the first or last layer where another stage has it: hidden states come in or leave here."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        """What to pass on in place of what comes."""
        self.seen: Tensor | None = None
        """What came."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen = hidden_states
        return hidden_states if self.given is None else self.given

    def clear(self) -> None:
        """Hold nothing."""
        self.given = self.seen = None


def keep_stage(model: PreTrainedModel, kept: range) -> None:
    """Leave `model` the decoder layers in `kept`, with the embedding before the first and the head after the last.

    Names of parameters stay. Without the first layer, `model(hidden=, ...)` takes hidden states
    [B, S, E] in place of token ids; without the last it returns hidden states. Whatever the model does
    to embeddings before its layers is done on the first stage alone, whatever it does after them on the
    last. Raises `ValueError` for tied embeddings, which two stages would have to share.
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
                return whole(**kwargs)  # type: ignore[no-any-return]
            model.base_model(**kwargs)
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
    """The list that holds all decoder layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and list(module) == layers:
            return module
    raise ValueError(f"the decoder layers of {type(model).__name__} are not one list")


def _replace(model: PreTrainedModel, part: nn.Module) -> None:
    """Put a stand-in where `part` is."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is part:
                setattr(module, name, _Elsewhere())
