"""Under which conditions a figure was measured, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import inlay
from inlay.errors import OptionError


def conditions() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load_average": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "inlay": inlay.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@cache
def cpu_name() -> str:
    """The processor's name and the instruction set that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    )


@cache
def commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(inlay.__file__).resolve().parent)]
    try:
        head, changed = (
            subprocess.run(git + more, capture_output=True, text=True, check=True).stdout.strip()
            for more in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def without_directories(value: Any) -> Any:
    """Results name files (calibration texts, logs), not where this machine keeps them."""
    return re.sub(r"[^=,]*/", "", value) if isinstance(value, str) else value


def check_output(path: str | None) -> None:
    """Raises OptionError where a line cannot be appended, before anything is measured."""
    if path is None:
        return
    is_new = not Path(path).exists()
    try:
        Path(path).open("a").close()
    except OSError as error:
        raise OptionError(f"--output {path} cannot be written: {error}") from error
    if is_new:
        Path(path).unlink()


def append(path: str | None, facts: dict[str, Any]) -> None:
    """One line of JSON more."""
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
