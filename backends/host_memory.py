"""How much of the host's memory can be taken."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes that can be allocated now, within this process's control group; cached files count as
    free."""
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
