"""What transformers calls instead of its own attention while a model is captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

import inlay.passes.ops  # noqa: F401  (defines torch.ops.inlay)
from inlay.lowering.support import NEEDED, NotCapturableError

ATTENTION = "inlay"
"""The name under which transformers knows our attention function."""

CHUNKED = "chunked_attention"
"""What transformers' configs call a layer whose queries see only their own chunk of positions."""

HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that models hand on to attention, and that say what the op knows by itself."""

_context = threading.local()


def register_attention() -> None:
    """Make ATTENTION an `attn_implementation`.

    No mask function is registered under that name, so that transformers builds no masks:
    causality, windows and chunks are arguments of the op.
    """
    if ATTENTION not in AttentionInterface().valid_keys():
        AttentionInterface.register(ATTENTION, _attention_forward)


@contextmanager
def recording(position_ids: torch.Tensor) -> Iterator[None]:
    """The positions [1, T] of the tokens that attention is called with from here on."""
    _context.position_ids, _context.num_calls = position_ids, 0
    try:
        yield
    finally:
        _context.__dict__.clear()


def num_tokens() -> torch.SymInt | int | None:
    """The size of the row that is traced, None outside of a capture."""
    positions = getattr(_context, "position_ids", None)
    return None if positions is None else positions.shape[1]


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registry's signature: query [1, Hq, T, D], key and value [1, Hk, T, D or Dv]."""
    if attention_mask is not None:
        raise ValueError("the attention mask is made by the model itself")
    if unknown := [n for n, v in kwargs.items() if torch.is_tensor(v) and n not in HARMLESS]:
        raise NotCapturableError(
            f"module {type(module).__name__} calls attention with a tensor {unknown[0]}, which may "
            f"decide what is seen (sparse attention, position biases); {NEEDED}"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    out = torch.ops.inlay.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        _context.position_ids[0],
        _context.num_calls,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        int(sliding_window or 0),
        float(softcap or 0.0),
        s_aux,
        causal,
        _chunk(module),
    )
    _context.num_calls += 1
    return out[None], None


def _chunk(module: torch.nn.Module) -> int:
    """Chunked attention is in transformers' mask alone: a layer's type in the config tells."""
    config: Any = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or index is None or index >= len(kinds) or kinds[index] != CHUNKED:
        return 0
    return int(config.attention_chunk_size)
