"""What a container's limit leaves of the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlay.backends import host_memory


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_the_memory(version: int, tmp_path: Path) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    limit, usage, cached = names[version]
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 600\n{cached} 100\n")
    assert host_memory._free_in_control_group(tmp_path) == 400
    if version == 2:
        (folder / limit).write_text("max\n")
        assert host_memory._free_in_control_group(tmp_path) > 2**50


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert host_memory._free_in_control_group(tmp_path) > 2**50
