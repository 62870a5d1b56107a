"""How many threads an engine's process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.runtime.threads import available_cores, thread_settings


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each: CPUs 0 and 4, 1 and 5, and so on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for cpu in range(8):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % 4},{cpu % 4 + 4}",
        )
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_a_core_counts_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5})
    assert available_cores(machine) == 2


def test_without_topology_every_cpu_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5}, raising=False)
    assert available_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)]
)
@pytest.mark.parametrize("folder", ["", "a/", "a/b/"])
def test_the_quota_of_any_group_above_counts(
    machine: Path, quota: str, cores: int, folder: str
) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b")
    write(machine / "sys/fs/cgroup/cpu.max", "max 100000")
    write(machine / f"sys/fs/cgroup/{folder}cpu.max", quota)
    assert available_cores(machine) == cores


def test_the_quota_of_the_first_version(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:memory:/x\n3:cpu,cpuacct:/x")
    write(machine / "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000")
    write(machine / "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1")
    assert available_cores(machine) == 4
    write(machine / "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "300000")
    assert available_cores(machine) == 3


def test_the_knob_then_the_environment_then_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inlay.runtime.threads.available_cores", lambda: 3)
    every = {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "5"}
    assert thread_settings(5, {"OMP_NUM_THREADS": "2"}) == every
    assert thread_settings(None, {"OMP_NUM_THREADS": "2"}) == {}
    assert set(thread_settings(None, {}).values()) == {"3"}


def test_torch_goes_by_the_settings() -> None:
    """One number for torch's OpenMP, which Inductor's code and our ops share."""
    code = "import torch; print(torch.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **thread_settings(1, os.environ)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"
