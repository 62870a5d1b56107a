"""How large the KV cache is to be."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.errors import OptionError
from inlay.runtime.config import ExecutorConfig

logger = logging.getLogger(__name__)

FREE_MEMORY_FRACTION = 0.25
"""Share of the free memory that the KV cache takes at most when no size is given."""


def num_kv_blocks(
    config: ExecutorConfig, limits: ModelLimits, groups: Sequence[KVGroup], device: torch.device
) -> int:
    """Blocks of each KV group's pool, logged once; OptionError where not even one fits."""
    bytes_per_block = sum(group.bytes_per_block for group in groups)
    if config.kv_cache_tokens is not None:
        count, source = -(-config.kv_cache_tokens // limits.block_size), "kv_cache_tokens"
    elif config.kv_cache_memory is not None:
        count, source = config.kv_cache_memory // bytes_per_block, "kv_cache_memory"
    else:
        wanted = limits.max_num_seqs * -(-limits.max_seq_len // limits.block_size)
        affordable = int(free_memory(device) * FREE_MEMORY_FRACTION) // bytes_per_block
        count = min(wanted, affordable)
        source = (
            f"{limits.max_num_seqs} requests of {limits.max_seq_len} tokens"
            if wanted <= affordable
            else f"{FREE_MEMORY_FRACTION:.0%} of the free memory"
        )
    if count < 1:
        raise OptionError(
            f"{source} has no room for a block of the KV cache, {limits.block_size} tokens in"
            f" {bytes_per_block} bytes: set kv_cache_tokens, or a larger kv_cache_memory"
        )
    logger.info(
        "KV cache: %d tokens in %d blocks, %.1f MiB (%s)",
        count * limits.block_size,
        count,
        count * bytes_per_block / 2**20,
        source,
    )
    return count


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now: of the device, or of the host within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _free_in_control_group())


def _free_in_control_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves, version 2 or 1; cached files count as free."""
    for limit, usage, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        if all((root / name).exists() for name in (limit, usage, stat)):
            most = (root / limit).read_text().strip()
            stats = dict(line.split() for line in (root / stat).read_text().splitlines())
            used = int((root / usage).read_text()) - int(stats.get(cached, 0))
            return 2**62 if most == "max" else max(int(most) - used, 0)
    return 2**62
