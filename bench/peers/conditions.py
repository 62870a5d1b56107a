"""Under what conditions a comparison was made, for people to read."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def conditions_of(line: dict[str, Any]) -> list[str]:
    """Lines below the picture."""
    versions: dict[str, str] = {}
    for result in line["results"]:
        for system in result["systems"].values():
            versions |= system.get("versions", {})
    speeds = [speed for result in line["results"] for speed in result["read_gb_s"]]
    memory = f", memory read at {min(speeds)}-{max(speeds)} GB/s" if speeds else ""
    return [
        f"{line['model']}, {line['cpu']}, {line['threads']} threads{memory}",
        f"Medians of {line['repeats']} interleaved repeats; outputs checked with Hugging Face in "
        "float32.",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    ]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                flags = torch.backends.cpu.get_cpu_capability()
                return f"{line.partition(':')[2].strip()} ({flags})"
    return platform.processor()
