"""Our processes run nothing that lies in the directory they begin in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inlay.backends.python_process import SET_PATH, module_command, path_argument

IMPORTS_QUEUE = "concurrent.futures.thread"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    for name in ("queue", "json", "signal", "runpy"):
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w').close()")
    return tmp_path


def run(command: list[str], folder: Path) -> list[str]:
    subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    return sorted(path.name for path in folder.glob("ran-*"))


def test_a_module_of_the_current_directory_is_not_run(trap: Path) -> None:
    assert run(module_command(IMPORTS_QUEUE), trap) == []
    program = SET_PATH + "import queue, json, signal; open('ran-this', 'w').close()"
    assert run([sys.executable, "-c", program, path_argument()], trap) == ["ran-this"]


def test_python_alone_would_run_it(trap: Path) -> None:
    assert "ran-queue" in run([sys.executable, "-m", IMPORTS_QUEUE], trap)


def test_arguments_reach_the_module(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text('{"a":1}')
    command = module_command("json.tool", "given.json", "out.json")
    assert subprocess.run(command, cwd=tmp_path, timeout=60, check=False).returncode == 0
    assert (tmp_path / "out.json").read_text() == '{\n    "a": 1\n}\n'
