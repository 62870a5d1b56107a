"""A worker process: `python -m inlay.backends.tensorrt.compile LIBRARY`, see workers.py."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from inlay.backends.tensorrt.library import Library, find
from inlay.backends.tensorrt.network import Weights, build_plan
from inlay.backends.worker_pool import serve


def compile_job(library: Library, job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine that a job of workers.py names, write its plan; facts for the report."""
    weights = Weights()
    plan = build_plan(
        library,
        Path(job["model"]).read_bytes(),
        {
            name: weights.bytes_at(file, begin, end, name in job["int4"])
            for name, (file, begin, end) in job["weights"].items()
        },
        job["profiles"],
        job["target"],
    )
    with open(job["plan"], "wb") as file:
        file.write(plan.data)
    return {
        "plan_bytes": Path(job["plan"]).stat().st_size,
        "layers": plan.layers,
        "num_nodes": plan.num_nodes,
        "activation_bytes": plan.activation_bytes,
        "seconds": round(plan.seconds, 3),
    }


def peak_bytes() -> int:
    """Of this process since it began: it never falls. (`getrusage` knows that of the process that
    started it, too, before it became this program.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    library = find(sys.argv[1])
    serve(lambda job: {**compile_job(library, job), "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
