"""RoPE whose frequencies depend on the batch, fixed for the engine.

Dynamic NTK and LongRoPE choose their frequencies by the longest request of a batch, so that one
request would change the others and keys in a cache would no longer fit. An engine serves requests
up to its max_seq_len: it takes the frequencies that transformers takes at that length, for all
requests, as other engines do. Up to the length that the model was first trained for, that is what
transformers takes for every request.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DATA_DEPENDENT = ("dynamic", "longrope")
FIXED = "fixed"
"""A rope_type that transformers does nothing for in forward."""


def fix_rope(model: torch.nn.Module, max_seq_len: int) -> None:
    """Give the model's rotary embeddings the frequencies for max_seq_len tokens, and no others.

    model: a shell (see capture.build_shell): its buffers are replaced, not written to.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in DATA_DEPENDENT:
            _fix(module, kinds, None, max_seq_len)
            module.rope_type = FIXED
        elif isinstance(kinds, dict) and set(kinds.values()) & set(DATA_DEPENDENT):
            for layer_type, kind in kinds.items():
                if kind in DATA_DEPENDENT:
                    _fix(module, kind, layer_type, max_seq_len)
            module.rope_type = {t: FIXED if k in DATA_DEPENDENT else k for t, k in kinds.items()}


def _fix(module: Any, kind: str, layer_type: str | None, max_seq_len: int) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    options = {} if layer_type is None else {"layer_type": layer_type}
    inverse, scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, torch.device("cpu"), seq_len=max_seq_len, **options
    )
    module._buffers[f"{prefix}inv_freq"] = inverse
    setattr(module, f"{prefix}attention_scaling", scaling)


def data_dependent(model: torch.nn.Module) -> list[str]:
    """The RoPE kinds of a model that `fix_rope` changes."""
    found = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        found |= {kinds} if isinstance(kinds, str) else set((kinds or {}).values())
    return sorted(found & set(DATA_DEPENDENT))
