"""Tiny configurations of the architectures that are tested, shared by all tests.

Sizes are odd where an architecture allows it, so that a wrong dimension shows. Windows and chunks
are shorter than the prompts of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from inlay.lowering.random_weights import randomise, seeded

Config = dict[str, Any]

_NO_TOKENS: Config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_COMMON: Config = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 112,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    **_NO_TOKENS,
}
_HEADS: Config = {**_COMMON, "head_dim": 24}
_FULL_HEADS: Config = {**_COMMON, "num_key_value_heads": 4}
_MIXED: Config = {
    **_HEADS,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GPT: Config = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_inner": 48,
    "tie_word_embeddings": False,
    "n_positions": 256,
    "vocab_size": 128,
    **_NO_TOKENS,
}
# As GPT-2 below: MLPs that are not gated repeat one token unless they are narrow.
_PLAIN: Config = {
    **_FULL_HEADS,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "tie_word_embeddings": False,
}
_MOE: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Config = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT: Config = {
    **_FULL_HEADS,
    **_ROUTED,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
_SEQ2SEQ: Config = {
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 112,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    **_NO_TOKENS,
    "pad_token_id": 1,
}
_BERT: Config = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 112,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}


def _rope(kind: str, **options: Any) -> Config:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **options}}


TOYS: dict[str, Config] = {
    "llama": {**_COMMON},
    "qwen2": {**_COMMON},
    "qwen3": {**_HEADS},
    "mistral": {**_COMMON, "sliding_window": 8},
    "gemma2": {
        **_HEADS,
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
    },
    "phi3": {**_COMMON},
    # Three layers, a narrow MLP and an LM head of its own: the mean of GELU's output, the same for
    # every token, otherwise makes it repeat one.
    "gpt2": {**_GPT},
}
"""What most tests run on: model type -> keyword arguments of its config."""

ARCHITECTURES: dict[str, Config] = {
    **TOYS,
    # Dense, RMSNorm and SwiGLU or near it.
    "llama-yarn": {
        "model_type": "llama",
        **_COMMON,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=64),
    },
    "llama-llama3": {
        "model_type": "llama",
        **_COMMON,
        **_rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    },
    "llama-dynamic": {"model_type": "llama", **_COMMON, **_rope("dynamic", factor=4.0)},
    "llama-linear": {"model_type": "llama", **_COMMON, **_rope("linear", factor=2.0)},
    "llama-biased": {
        "model_type": "llama",
        **_COMMON,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "vocab_size": 512,
    },
    "qwen2-sliding": {
        "model_type": "qwen2",
        **_COMMON,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "phi3-longrope": {
        "model_type": "phi3",
        **_COMMON,
        "original_max_position_embeddings": 256,
        **_rope(
            "longrope",
            short_factor=[1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.3, 2.7],
            long_factor=[2.0, 2.1, 2.3, 2.5, 2.8, 3.0, 3.3, 3.7],
            original_max_position_embeddings=256,
        ),
    },
    "ministral": {**_MIXED},
    "ministral3": {**_HEADS},
    "gemma": {**_HEADS},
    "gemma3_text": {
        **_MIXED,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": False,
        "vocab_size": 512,
    },
    "gemma3n_text": {
        **_HEADS,
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [112] * 4,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
    "gemma4_text": {
        **_MIXED,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 0,
        "vocab_size": 512,
    },
    "vaultgemma": {**_MIXED, "query_pre_attn_scalar": 24},
    "phi": {**_COMMON, "vocab_size": 1000},
    "stablelm": {**_COMMON},
    "persimmon": {**_PLAIN, "vocab_size": 512, "num_hidden_layers": 2},
    "starcoder2": {**_PLAIN, "num_key_value_heads": 2, "sliding_window": 8, "vocab_size": 1000},
    "olmo": {**_COMMON},
    "olmo2": {**_COMMON},
    "olmo3": {**_MIXED},
    "granite": {**_COMMON, "attention_multiplier": 0.3},
    "cohere": {**_COMMON},
    "cohere2": {**_MIXED, "tie_word_embeddings": False, "vocab_size": 512},
    "smollm3": {**_COMMON, "pad_token_id": 0},
    "glm": {**_HEADS, "pad_token_id": 0},
    "glm4": {**_HEADS, "pad_token_id": 0},
    "exaone4": {**_MIXED},
    "nemotron": {**_PLAIN, "head_dim": 24, "vocab_size": 512, "intermediate_size": 112},
    "helium": {**_COMMON, "head_dim": 16},
    "arcee": {**_COMMON},
    "apertus": {**_HEADS},
    "seed_oss": {**_HEADS},
    "hunyuan_v1_dense": {**_HEADS},
    "ernie4_5": {**_HEADS, "vocab_size": 512},
    "bitnet": {**_COMMON},
    "nanochat": {**_PLAIN, "head_dim": 24, "vocab_size": 512, "intermediate_size": 112},
    "diffllama": {**_COMMON},
    "jais2": {**_PLAIN, "vocab_size": 512, "intermediate_size": 64},
    "cwm": {**_MIXED, "bos_token_id": 0},
    # Mixture of experts.
    "mixtral": {**_COMMON, **_LOCAL, "sliding_window": None},
    "qwen2_moe": {**_COMMON, **_MOE, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_HEADS, **_MOE},
    "olmoe": {**_COMMON, **_MOE},
    "flex_olmo": {**_COMMON, **_MOE, "vocab_size": 512},
    "granitemoe": {**_COMMON, **_LOCAL, "attention_multiplier": 0.3},
    "granitemoeshared": {
        **_COMMON,
        **_LOCAL,
        "shared_intermediate_size": 48,
        "attention_multiplier": 0.3,
    },
    "phimoe": {**_COMMON, **_LOCAL, "sliding_window": None},
    "gpt_oss": {**_MIXED, **_LOCAL},
    "glm4_moe": {**_HEADS, **_ROUTED},
    "dots1": {**_HEADS, **_ROUTED},
    "ernie4_5_moe": {
        **_HEADS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 1,
    },
    "minimax_m2": {**_HEADS, **_LOCAL},
    "afmoe": {**_MIXED, **_MOE, "num_dense_layers": 1},
    "cohere2_moe": {**_MIXED, **_MOE},
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "exaone_moe": {**_MIXED, **_MOE, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "llama4_text": {
        **_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 7,
        "moe_layers": [1],
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "pad_token_id": 0,
    },
    # Latent attention: K and V heads of unequal sizes.
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT},
    # GPT and its time: LayerNorm, learned positions, ALiBi, attention of their own.
    "gpt_neox": {**_PLAIN, "vocab_size": 512, "num_hidden_layers": 2},
    "gpt_neox_japanese": {**_PLAIN, "intermediate_multiple_size": 2, "vocab_size": 512},
    "gpt_bigcode": {**_GPT, "vocab_size": 512},
    "gptj": {**_GPT, "rotary_dim": 8, "vocab_size": 512},
    "codegen": {**_GPT, "rotary_dim": 8, "n_ctx": 256, "vocab_size": 512},
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "intermediate_size": 48,
        "tie_word_embeddings": False,
        **_NO_TOKENS,
    },
    "falcon": {
        **_COMMON,
        "multi_query": True,
        "alibi": False,
        "new_decoder_architecture": False,
        "vocab_size": 512,
        "ffn_hidden_size": 112,
        "tie_word_embeddings": False,
    },
    "falcon-new": {
        "model_type": "falcon",
        **_COMMON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "vocab_size": 512,
        "ffn_hidden_size": 32,
        "tie_word_embeddings": False,
    },
    "falcon-alibi": {
        "model_type": "falcon",
        **_COMMON,
        "multi_query": False,
        "alibi": True,
        "new_decoder_architecture": False,
        "vocab_size": 512,
        "ffn_hidden_size": 64,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
    },
    "bloom": {
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "tie_word_embeddings": False,
        **_NO_TOKENS,
        "vocab_size": 1500,
    },
    "mpt": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 128,
        "max_seq_len": 256,
        "expansion_ratio": 2,
        "tie_word_embeddings": False,
        **_NO_TOKENS,
    },
    "opt": {
        **_FULL_HEADS,
        "ffn_dim": 112,
        "word_embed_proj_dim": 64,
        "tie_word_embeddings": False,
        "vocab_size": 512,
    },
    "biogpt": {
        **_FULL_HEADS,
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "vocab_size": 512,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
    },
    "xglm": {
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 112,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **_NO_TOKENS,
        "pad_token_id": 1,
        "vocab_size": 512,
    },
    "bart": {**_SEQ2SEQ, "vocab_size": 512},
}
"""Every decoder configuration that must work; a name of its own where `model_type` is given."""

ENCODERS: dict[str, Config] = {
    "bert": {**_BERT},
    "roberta": {**_BERT},
    "xlm-roberta": {**_BERT},
    "distilbert": {
        "dim": 64,
        "n_heads": 4,
        "n_layers": 2,
        "hidden_dim": 112,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
    },
    "modernbert": {
        **_BERT,
        "local_attention": 10,
        "global_attn_every_n_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
    },
}
"""Models whose tokens see those after them: hidden states are compared."""

REFUSED: dict[str, Config] = {
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
    },
    "jamba": {
        **_COMMON,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "bamba": {
        **_COMMON,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "qwen3_next": {
        **_HEADS,
        **_MOE,
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    "glm_moe_dsa": {
        **_LATENT,
        "index_topk": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "head_dim": 8,
    },
    "doge": {**_COMMON},
    "jetmoe": {**_COMMON, "kv_channels": 24, **_LOCAL},
    "big_bird": {**_BERT, "is_decoder": True, "block_size": 4, "num_random_blocks": 3},
}
"""What mixes tokens in a way that is not attention: refused by name, with the reason."""

_VISION: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SECTIONS = _rope("default", mrope_section=[2, 2, 4])
MULTIMODAL: dict[str, Config] = {
    "gemma3": {
        "text_config": {**ARCHITECTURES["gemma3_text"], "vocab_size": 1000},
        "tie_word_embeddings": False,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TOYS["mistral"], "head_dim": 16},
        "vision_config": {"model_type": "pixtral", **_VISION},
    },
    "qwen2_5_vl": {
        "text_config": {**_COMMON, **_SECTIONS},
        "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2},
        **_NO_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_COMMON, "head_dim": 16, **_SECTIONS},
        "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2},
    },
}
"""Models for text and images, of which the text tower is run."""


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call their number of layers."""


def config_of(name: str, layers: int | None = None, **overrides: Any) -> Any:
    """The config of a name in one of the tables above."""
    tables = {**ENCODERS, **MULTIMODAL, **REFUSED, **ARCHITECTURES}
    options = {"model_type": name, **tables[name], **overrides}
    if layers is not None:
        options |= {key: layers for key in LAYERS if key in options}
        if "layer_types" in options:
            options["layer_types"] = (options["layer_types"] * layers)[:layers]
    return AutoConfig.for_model(options.pop("model_type"), **options)


def build_toy(
    name: str, dtype: torch.dtype = torch.float32, layers: int | None = None, **overrides: Any
) -> PreTrainedModel:
    """A random model of this name, in evaluation mode; layers and overrides change its config."""
    config = config_of(name, layers, **overrides)
    kind: Any = AutoModelForCausalLM
    if name in ENCODERS:
        kind = AutoModel
    elif name in MULTIMODAL:
        kind = AutoModelForImageTextToText
    with seeded():
        model = kind.from_config(config, dtype=dtype)
    return randomise(model.eval())
