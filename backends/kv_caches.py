"""The paged caches of a program's layers: their tensors, groups and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from inlay.backends.base import KVGroup
from inlay.backends.program import AttentionStep, Program
from inlay.passes.kv_formats import has_token_scales, vector_nbytes


class LayerCache(NamedTuple):
    """One layer's keys and values, blocks first, in a layout of its attention op's; the scales
    are those of `passes/kv_formats.py`."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    @property
    def block_tensors(self) -> list[torch.Tensor]:
        """What a block's content is: all that has blocks as its first dimension."""
        scales = [self.k_scales, self.v_scales] if has_token_scales(self.k.dtype) else []
        return [self.k, self.v, *(tensor for tensor in scales if tensor is not None)]


def cached_layers(program: Program) -> list[AttentionStep]:
    """One attention step for each cache: layers that share keys and values share theirs."""
    return list({step.cache: step for step in program.attention_steps}.values())


def kv_groups(program: Program, block_size: int, dtype: torch.dtype) -> tuple[KVGroup, ...]:
    """The program's groups, in order, with the bytes of their blocks in this cache dtype."""
    groups: dict[int, list[AttentionStep]] = {}
    for step in cached_layers(program):
        groups.setdefault(step.group, []).append(step)
    return tuple(
        KVGroup(
            window=steps[0].window,
            num_layers=len(steps),
            bytes_per_block=block_size
            * sum(
                step.num_kv_heads * vector_nbytes(dtype, size)
                for step in steps
                for size in (step.head_dim, step.v_head_dim)
            ),
        )
        for _, steps in sorted(groups.items())
    )


def blocks_of_groups(num_blocks: int | Sequence[int], num_groups: int) -> list[int]:
    """A number of blocks for each group, from one for all of them or one for each."""
    sizes = [num_blocks] * num_groups if isinstance(num_blocks, int) else list(num_blocks)
    assert len(sizes) == num_groups, f"{len(sizes)} numbers of blocks for {num_groups} KV groups"
    return sizes
