"""The only package that knows the inside of a Hugging Face model.

It changes instances, never classes or modelling code, so other models of the process are untouched. It finds
parts by module type and attributes, not by the model's name.
"""

from alst_impl.hf.attention import (
    ATTENTION,
    Attention,
    noting_layout,
    stock_attention,
    use_attention,
    use_attentions,
)
from alst_impl.hf.checkpointing import checkpoint_layers, stock_checkpointing
from alst_impl.hf.gathered import gather_mixers
from alst_impl.hf.instances import bound, set_forward
from alst_impl.hf.router import use_router_loss, wants_router_loss
from alst_impl.hf.stages import keep_stage
from alst_impl.hf.structure import (
    attention_modules,
    decoder_layers,
    expert_parameters,
    final_norms,
    head_name,
    mixers,
    refuse_positions_of_shards,
    token_wise_modules,
    without_logits,
)
from alst_impl.hf.tiling import tile_loss, tile_module

__all__ = [
    "ATTENTION",
    "Attention",
    "attention_modules",
    "bound",
    "checkpoint_layers",
    "decoder_layers",
    "expert_parameters",
    "final_norms",
    "gather_mixers",
    "head_name",
    "keep_stage",
    "mixers",
    "noting_layout",
    "refuse_positions_of_shards",
    "set_forward",
    "stock_attention",
    "stock_checkpointing",
    "tile_loss",
    "tile_module",
    "token_wise_modules",
    "use_attention",
    "use_attentions",
    "use_router_loss",
    "wants_router_loss",
    "without_logits",
]
