"""Makes the tiny configurations in this folder: one per causal language model type of the installed transformers.

    python tests/families/make.py

Each starts from the defaults of its configuration class. Sizes shrink, dropout is off, windows are shorter than the
tests' sequences, and every kind of layer of the default model occurs. Types that are not causal, or that transformers
itself cannot build or run so small or in fp64, are left out, with the reason printed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HERE = Path(__file__).parent
LENGTH = 43
"""Tokens of the check that a model is causal; windows of 13 and chunks of 16 are shorter."""
LARGEST = 3_000_000
"""Most parameters of a tiny model."""
SIZES = {
    64: "hidden_size n_embd d_model embedding_size embedding_dim emb_dim word_embed_proj_dim lru_width "
    "attention_hidden_size ple_embed_dim",
    96: "intermediate_size ffn_dim d_ff dim_ff dff ffn_hidden_size n_inner d_inner decoder_ffn_dim encoder_ffn_dim "
    "feed_forward_size shared_intermediate_size",
    48: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_experts_per_tok "
    "moe_topk num_experts_per_token hc_mult hc_count mamba_n_groups",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_shared_experts n_shared_experts o_groups "
    "n_input_layers n_recurrent_layers n_output_layers n_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_query_groups linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts heads_per_ngram",
    16: "head_dim attention_head_dim kv_channels dim_head d_head attention_head_size linear_key_head_dim "
    "linear_value_head_dim linear_head_dim v_head_dim index_head_dim mamba_d_state state_size ssm_state_size "
    "index_topk hidden_size_per_layer_input o_lora_rank block_size laurel_rank mamba_d_head mamba_head_dim",
    8: "qk_nope_head_dim qk_rope_head_dim rotary_dim hc_lowrank mamba_num_heads mamba_n_heads",
    24: "q_lora_rank",
    12: "kv_lora_rank",
    260: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length",
    509: "ngram_vocab_size_base encoder_hash_byte_group_vocab",
}
SIZE = {field: size for size, fields in SIZES.items() for field in fields.split()}
LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types")
"""Lists with the kind of each layer."""
NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "falcon": {"alibi": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 16},
    "minimax": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "zamba": {"mamba_dt_rank": 4, "n_mamba_heads": 2, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
              "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "n_mamba_heads": 8,
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
               "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16,
               "hybrid_layer_ids": [1, 3], "adapter_rank": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_groups": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "longcat_flash": {"zero_expert_num": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8},
    "phimoe": {"sliding_window": 13},
    "nemotron_h": {"mamba_num_heads": 8},
    "xlstm": {"num_heads": 4, "chunk_size": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [96, 96],
                     "activation_sparsity_pattern": [0.95, 0.0]},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_end_index": 1},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
             "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]},
    "gemma4_text": {"per_layer_config": {}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"], "compress_rates":
                    {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "inkling_text": {"unpadded_vocab_size": 260, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "sliding_window_size": 13, "rel_extent": 16},
    "inkling2_text": {"unpadded_vocab_size": 260, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "sliding_window_size": 13, "rel_extent": 16},
    "inkling2_loop_text": {"unpadded_vocab_size": 260, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "sliding_window_size": 13, "rel_extent": 16},
    "kimi_linear": {"mlp_layer_types": ["dense", "sparse"]},
    "bailing_hybrid": {"layer_group_size": 2},
}  # fmt: skip
"""Fields whose defaults do not work in a tiny model, or would leave out a kind of layer."""


def tiny(model_type: str) -> dict[str, Any]:
    """Fields of the tiny configuration of `model_type` that differ from its defaults."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    fields = {}
    for name, value in defaults.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            fields |= _smaller(name, value)
        elif isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name):
            fields[name] = 0.0
    kv_heads, heads = defaults.get("num_key_value_heads"), defaults.get("num_attention_heads")
    if isinstance(kv_heads, int) and isinstance(heads, int):
        fields["num_key_value_heads"] = 4 if kv_heads == heads else max(4 * kv_heads // heads, 1)
    if "qk_rope_head_dim" in fields:
        fields.pop("head_dim", None)  # derived from it
    fields |= _layers(defaults)
    return {**fields, **SPECIAL.get(model_type, {})}


def _smaller(name: str, value: int) -> dict[str, int]:
    if name in SIZE:
        return {name: SIZE[name]}
    if name.endswith("_token_id") and value >= 260:
        return {name: 1}
    if "window" in name and value > 13:
        return {name: 13}
    return {name: 16} if "chunk" in name and value > 16 else {}


def _layers(defaults: dict[str, Any]) -> dict[str, Any]:
    """Two layers, or one of each kind."""
    kinds = {
        name: list(dict.fromkeys(defaults[name]))
        for name in LAYERS
        if isinstance(defaults.get(name), list) and defaults[name]
    }
    number = max([2, *(len(kind) for kind in kinds.values())])
    cut = {name: (kind * number)[:number] for name, kind in kinds.items()}
    return cut | {name: number for name in NUM_LAYERS if name in defaults}


def why_not(model_type: str, fields: dict[str, Any]) -> str | None:
    """Why the tiny model cannot be in the table; None if it can."""
    try:
        config = AutoConfig.for_model(model_type, **copy.deepcopy(fields))
        if getattr(config, "text_config", None) is not None:
            return "wraps a text model that has a type of its own"
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > LARGEST:
            return f"{size} parameters"
        kinds = {"experts_implementation": "eager"}  # grouped matrix products have no fp64
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **kinds)
        ids = torch.arange(LENGTH)[None] % 200 + 20
        other = ids.clone()
        other[0, -1] += 1
        with torch.no_grad():
            logits, changed = (
                model.train()(input_ids=x, use_cache=False).logits for x in (ids, other)
            )
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if not torch.allclose(logits[:, :-1], changed[:, :-1], atol=1e-5):
        return "is not causal"
    return None


def made() -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(type, fields, reason to leave it out)."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            fields = tiny(model_type)
        except Exception as error:
            yield model_type, {}, f"has no defaults: {type(error).__name__}: {str(error)[:80]}"
            continue
        yield model_type, fields, why_not(model_type, fields)


if __name__ == "__main__":
    for model_type, fields, reason in made():
        if reason is None:
            text = json.dumps({"model_type": model_type, **fields}, indent=2)
            (HERE / f"{model_type}.json").write_text(text + "\n")
        print(f"{model_type}: {reason or 'made'}", flush=True)
