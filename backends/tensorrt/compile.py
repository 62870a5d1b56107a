"""A worker process: `python -m inlay.backends.tensorrt.compile LIBRARY`, see workers.py."""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
from pathlib import Path
from typing import Any

from inlay.backends.tensorrt.library import Library, find
from inlay.backends.tensorrt.network import Weights, build_plan


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
    """A job a line on standard input; a line back for each: facts, or {"error": ...}."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the library prints is no reply
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    library = find(sys.argv[1])
    while True:
        job = json.loads(lines.get())
        try:
            reply = compile_job(library, job)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        reply["peak_bytes"] = peak_bytes()
        print(json.dumps(reply), file=replies, flush=True)


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Input ends when the builder is done, or was killed: end at once."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
