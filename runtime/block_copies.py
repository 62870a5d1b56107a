"""Copies blocks: shared ones that are about to be written, and to and from the host's tier."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inlay.backends.base import LoadedModel
from inlay.runtime.block_tables import BlockCopy


class BlockCopier:
    """The tensors that blocks lie in, of the device and of the host."""

    def __init__(self, model: LoadedModel, num_host_blocks: Sequence[int]) -> None:
        """num_host_blocks: for each KV group; none allocates nothing."""
        groups = range(len(num_host_blocks))
        self._device = [model.kv_tensors(group) for group in groups]
        self._host = [
            [_host_like(tensor, num_host_blocks[group]) for tensor in self._device[group]]
            if num_host_blocks[group]
            else []
            for group in groups
        ]

    def run(self, copies: Sequence[BlockCopy]) -> None:
        """Copy, in order: a block may be read by one copy and written by the next."""
        for copy in copies:
            device, host = self._device[copy.group], self._host[copy.group]
            sources = host if copy.kind == "onboard" else device
            targets = host if copy.kind == "offload" else device
            for source, target in zip(sources, targets, strict=True):
                target[copy.target].copy_(source[copy.source], non_blocking=True)


def _host_like(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    shape = (num_blocks, *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
