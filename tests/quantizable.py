"""Toys whose layers can be quantized: all sizes multiples of 32, so that groups fit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests.toys import build_toy

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96},
    "qwen2": {"intermediate_size": 96, "tie_word_embeddings": True},
    "gemma2": {"intermediate_size": 96, "head_dim": 16},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"intermediate_size": 96, "head_dim": 16},
    "gpt_oss": {"intermediate_size": 32, "head_dim": 16},
}


def build_quantizable(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build_toy(name, dtype, **SIZES[name])
