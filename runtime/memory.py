"""How large the KV cache is to be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.backends.host_memory import available_memory
from inlay.errors import OptionError
from inlay.runtime.config import ExecutorConfig

logger = logging.getLogger(__name__)

FREE_MEMORY_FRACTION = (0.25, 0.9)
"""Share of the free memory that the KV cache takes at most when no size is given: host, device."""


def num_kv_blocks(
    config: ExecutorConfig,
    limits: ModelLimits,
    groups: Sequence[KVGroup],
    device: torch.device,
    taken: int = 0,
) -> list[int]:
    """Blocks of each KV group's pool, logged once; OptionError where not even one fits.

    A group whose window no request can fill the pool with gets no more than requests can use.
    taken: bytes of the free memory that are spoken for (CUDA graphs, activations of a step).
    """
    reaches = [group.window or limits.max_seq_len for group in groups]
    most = [
        _most_blocks(group, limits) if reach < max(reaches) else 0
        for group, reach in zip(groups, reaches, strict=True)
    ]

    def split(count: int) -> list[int]:
        return [min(count, each) if each else count for each in most]

    def num_bytes(count: int) -> int:
        pairs = zip(split(count), groups, strict=True)
        return sum(blocks * group.bytes_per_block for blocks, group in pairs)

    if config.kv_cache_tokens is not None:
        count, source = -(-config.kv_cache_tokens // limits.block_size), "kv_cache_tokens"
    elif config.kv_cache_memory is not None:
        count, source = _largest(config.kv_cache_memory, num_bytes), "kv_cache_memory"
    else:
        wanted = limits.max_num_seqs * -(-limits.max_seq_len // limits.block_size)
        fraction = config.kv_cache_free_fraction or FREE_MEMORY_FRACTION[device.type == "cuda"]
        affordable = _largest(int((free_memory(device) - taken) * fraction), num_bytes)
        # A share that was asked for is taken; blocks beyond what can run at once are for prefixes.
        count = affordable if config.kv_cache_free_fraction else min(wanted, affordable)
        source = f"{fraction:.0%} of the free memory"
        if count < affordable:
            source = f"{limits.max_num_seqs} requests of {limits.max_seq_len} tokens"
    if count < 1:
        raise OptionError(
            f"{source} has no room for a block of the KV cache, {limits.block_size} tokens in"
            f" {num_bytes(1)} bytes: set kv_cache_tokens, or a larger kv_cache_memory"
        )
    logger.info(
        "KV cache: %d tokens in %s blocks, %.1f MiB (%s)",
        count * limits.block_size,
        " + ".join(map(str, split(count))),
        num_bytes(count) / 2**20,
        source,
    )
    return split(count)


def num_host_blocks(config: ExecutorConfig, groups: Sequence[KVGroup]) -> list[int]:
    """Blocks of each KV group in the host's tier, which share its bytes as the device's do."""
    total = sum(group.bytes_per_block for group in groups)
    return [config.host_cache_memory // total for _ in groups]


def _most_blocks(group: KVGroup, limits: ModelLimits) -> int:
    """Blocks of a group with a window that all requests together can hold."""
    reach = group.window - 1 + 2 * min(limits.max_num_tokens, limits.max_seq_len)
    return limits.max_num_seqs * (-(-reach // limits.block_size) + 1)


def _largest(budget: int, num_bytes: Callable[[int], int]) -> int:
    """The largest count of blocks that takes no more than budget bytes."""
    low, high = 0, max(budget, 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if num_bytes(middle) <= budget else (low, middle)
    return low


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: of the device, or of the host within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
