"""Paged attention for a device: our kernels on NVIDIA GPUs, plain tensor operations elsewhere."""

from __future__ import annotations

import logging

import torch

from inlay.backends.gathered_attention import GatheredAttention
from inlay.backends.model import AttentionOp

_logger = logging.getLogger(__name__)


def attention_for(device: torch.device) -> AttentionOp:
    """triton is imported here, for CUDA devices alone; where it is missing the log says so."""
    if device.type != "cuda":
        return GatheredAttention(device)
    try:
        from inlay.backends.kernels.triton.paged_attention import TritonAttention
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        _logger.warning(
            "attention on %s runs as plain tensor operations, which is slow: triton is not "
            "installed; `pip install triton` (CUDA builds of torch bring it)",
            device,
        )
        return GatheredAttention(device)
    return TritonAttention(device)
