"""What a build costs, and that depth is nearly free: 24 layers beside a 2-layer twin.

    python -m inlay.bench.build_cost [--shape 0.5b]

Each build runs cold: in a process of its own with empty caches. Prints one JSON line: seconds,
compiles, load time with no compiler on PATH, and peak proportional set size of the process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from inlay.bench.shapes import SHAPES, save_shape

LOAD = """
import sys, time, json
import torch
from inlay import Engine
begin = time.perf_counter()
model = Engine.load(sys.argv[1]).load_model()
print(json.dumps(time.perf_counter() - begin))
"""


def tree_pss(process: psutil.Process) -> int:
    """Proportional set size of a process and its descendants, in bytes: shared pages once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def run_watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
    """Seconds, peak PSS in bytes and standard output of a command."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    root = psutil.Process(process.pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            try:
                peak = max(peak, tree_pss(root))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} failed with status {process.returncode}")
    return time.perf_counter() - begin, peak, output


def cold_build(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Build with empty caches and load once more without a compiler."""
    environment = {
        **os.environ,
        "INLAY_CACHE_DIR": str(folder / "cache"),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    engine = folder / "engine"
    command = [sys.executable, "-m", "inlay.cli", "build", str(checkpoint), "-o", str(engine)]
    seconds, peak, output = run_watched([*command, "--json"], environment)
    facts = json.loads(output)
    bare = {**environment, "PATH": "", "INLAY_CACHE_DIR": str(folder / "empty")}
    bare.pop("CXX", None)
    loads = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", LOAD, str(engine)],
                env=bare,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(3)
    ]
    return {
        "seconds": round(seconds, 1),
        "phases": facts["phases"],
        "num_compiled": facts["target"]["num_compiled"],
        "peak_pss_mb": round(peak / 1e6),
        "checkpoint_mb": round(sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e6),
        "load_s": round(min(loads), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="0.5b")
    shape = parser.parse_args().shape
    depth = SHAPES[shape]["num_hidden_layers"]
    rows = {}
    for layers in (2, depth):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "build").mkdir()
            checkpoint = save_shape(shape, Path(folder) / "checkpoint", layers)
            rows[layers] = cold_build(checkpoint, Path(folder) / "build")
    deep, shallow = rows[depth], rows[2]
    growth = deep["peak_pss_mb"] - shallow["peak_pss_mb"]
    ratio = growth / (deep["checkpoint_mb"] - shallow["checkpoint_mb"])
    facts = {
        "bench": "build_cost",
        "shape": shape,
        "dtype": "bfloat16",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "layers": {str(layers): row for layers, row in rows.items()},
        "same_number_of_compiles": deep["num_compiled"] == shallow["num_compiled"],
        "extra_compile_s": round(deep["phases"]["compile"] - shallow["phases"]["compile"], 1),
        "pss_growth_over_checkpoint_growth": round(ratio, 2),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
