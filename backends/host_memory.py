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
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _free_in_control_groups())


UNLIMITED = 1 << 62
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""The files of a limit and of what is used, and where memory.stat counts cached files."""


def _free_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """What the limits of this process's groups leave, those around them included. A container may
    see its own group as the root, whatever its name outside."""
    lines = own.read_text().splitlines() if own.exists() else []
    free = [UNLIMITED]
    for line in lines or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", VERSION_1) if controllers else (root, VERSION_2)
        group = top / path.strip("/")
        while group != top:
            free.append(_free_in(group, *names))
            group = group.parent
        free.append(_free_in(top, *names))
    return min(free)


def _free_in(group: Path, limit: str, usage: str, cached: str) -> int:
    stat = group / "memory.stat"
    if not all(file.exists() for file in (group / limit, group / usage, stat)):
        return UNLIMITED
    most = (group / limit).read_text().strip()
    stats = dict(line.split() for line in stat.read_text().splitlines())
    used = int((group / usage).read_text()) - int(stats.get(cached, 0))
    return UNLIMITED if most == "max" else max(int(most) - used, 0)
