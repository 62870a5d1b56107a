"""How many threads a step is worth: the physical cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

OPENMP_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What torch, compiled segments and our ops go by: all run on one OpenMP runtime, torch's."""


def available_cores(root: Path = Path("/")) -> int:
    """Cores of the affinity mask, each once however many threads it runs, within the CPU quota of
    the control group. root: where /sys and /proc are.

    A quota of one and a half cores counts as two: threads that wait for one another at a barrier
    lose more by a core too many than by a share of one, but one alone would leave a third idle.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(root, cpu) for cpu in cpus}
    quota = _quota(root)
    return max(1, min(len(cores), len(cores) if quota is None else math.ceil(quota)))


def thread_settings(num_threads: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a worker that is to run this many threads.

    None leaves the choice to OMP_NUM_THREADS where it is set, else takes `available_cores`.
    """
    if num_threads is None:
        if "OMP_NUM_THREADS" in environment:
            return {}
        num_threads = available_cores()
    return dict.fromkeys(OPENMP_THREADS, str(num_threads))


def _siblings(root: Path, cpu: int) -> str:
    """A name of the core that this CPU is a thread of."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(topology) or str(cpu)


def _quota(root: Path) -> float | None:
    """CPUs that the process's control groups allow it, v2 or v1; None where they do not say."""
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # In a container its own group is often mounted as the root.
        inner = base / path.lstrip("/")
        for group in {base, inner, *(p for p in inner.parents if p.is_relative_to(base))}:
            if controllers:
                parts = [_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
            else:
                parts = (_read(group / "cpu.max") or "").split()
            if len(parts) == 2 and all(part.isdigit() and int(part) for part in parts):
                found.append(int(parts[0]) / int(parts[1]))
    return min(found, default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
