"""Random weights that can tell a right model from a wrong one.

With Hugging Face's own initialisation a small model repeats one token and keeps doing so without
RoPE, with doubled attention scale or with norms ignored, so equal tokens prove nothing. These
weights make outputs depend on every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

MATRIX_GAIN = 2.0
SCALED_EMBEDDING_STD = 0.03
"""For tied embeddings whose inputs are scaled up (gemma): else they repeat one token."""


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """For making a model that `randomise` then fills: what it adds to, Hugging Face may have drawn
    (gpt_oss's sinks and router biases), from the process's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0, device: str = "cpu") -> PreTrainedModel:
    """Fill the model's parameters in place, float32 draws cast to its dtype; returns the model.

    Matrices N(0, (2 / sqrt(fan_in))^2) with rows of mean 0, embeddings N(0, 1), one-dimensional
    parameters their initial value + 0.3 N(0, 1). Without the zero means, what an activation adds
    to every token alike (GELU, ReLU) grows to a direction in which all tokens agree. device: draws
    them, with numbers of its own.
    """
    generator = torch.Generator(device).manual_seed(seed)
    embedding = model.get_input_embeddings()
    scaled = model.config.tie_word_embeddings and hasattr(embedding, "embed_scale")
    embedding_std = SCALED_EMBEDDING_STD if scaled else 1.0
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() < 2:
            parameter.add_(0.3 * noise.to(parameter))
        elif id(parameter) in tables:
            parameter.copy_((embedding_std * noise).to(parameter.dtype))
        else:
            dim = 0 if id(parameter) in transposed else -1
            noise -= noise.mean(dim, keepdim=True)
            noise *= MATRIX_GAIN / parameter.shape[dim] ** 0.5
            parameter.copy_(noise.to(parameter.dtype))
    return model
