"""What a container's limit leaves of the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlay.backends import host_memory

NAMES = {1: host_memory.VERSION_1, 2: host_memory.VERSION_2}
LINES = {1: "4:memory:{}\n3:cpuset:/other\n", 2: "0::{}\n"}


def write(group: Path, version: int, limit: str) -> None:
    """A group that uses 700 bytes, 100 of them for cached files."""
    group.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (group / names[0]).write_text(f"{limit}\n")
    (group / names[1]).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 600\n{names[2]} 100\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({".": "1000"}, 400),
        ({".": "max"}, 1 << 62),
        ({"one/two": "900"}, 300),
        ({".": "5000", "one": "800", "one/two": "900"}, 200),
        ({".": "650", "one": "800", "one/two": "max"}, 50),
        ({"one/two": "500"}, 0),
        ({"elsewhere": "800"}, 1 << 62),
    ],
    ids=str,
)
def test_the_tightest_group_limits_the_memory(
    version: int, limits: dict[str, str], free: int, tmp_path: Path
) -> None:
    top = tmp_path / "memory" if version == 1 else tmp_path
    for group, limit in limits.items():
        write(top / group, version, limit)
    own = tmp_path / "own"
    own.write_text(LINES[version].format("/one/two"))
    assert host_memory._free_in_control_groups(tmp_path, own) == free


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path, 2, "1000")
    own = tmp_path / "own"
    own.write_text("0::/outside/docker-1234\n")
    assert host_memory._free_in_control_groups(tmp_path, own) == 400
    assert host_memory._free_in_control_groups(tmp_path, tmp_path / "missing") == 400


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert host_memory._free_in_control_groups(tmp_path, tmp_path / "missing") > 2**50
