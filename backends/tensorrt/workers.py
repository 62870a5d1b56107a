"""Worker processes that build engines, as many as cores and memory allow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inlay.backends.host_memory import available_memory
from inlay.backends.worker_pool import Worker, run_jobs
from inlay.errors import BuildError

COMPILE = "inlay.backends.tensorrt.compile"
PROCESS_BYTES = 200 << 20
"""A worker before its first job: Python, numpy and the library."""
COPIES = 3.5
"""Bytes of a worker for each of its engine's weights: the mapped file, the builder's two copies
and the plan. 3.3 was measured for a matrix of 272 MB in bfloat16."""
SMALL = 64 << 20
"""What an engine takes at least, of whatever weights."""


@dataclass(frozen=True)
class Job:
    """An engine to build. name: for people. model: the ONNX file. weights: initializer -> (file,
    first byte, end); int4: those that are 4-bit numbers. profiles: see network.Profile. plan:
    where it goes."""

    name: str
    model: str
    weights: dict[str, tuple[str, int, int]]
    profiles: Sequence[Any]
    target: str
    plan: str
    int4: Sequence[str] = ()

    @property
    def weight_bytes(self) -> int:
        return sum(end - begin for _, begin, end in self.weights.values())

    @property
    def memory(self) -> int:
        """An estimate of the bytes that a worker takes for it."""
        return PROCESS_BYTES + max(SMALL, int(COPIES * self.weight_bytes))


def num_workers(jobs: Sequence[Job], memory: int) -> int:
    """As many as there are cores and jobs, and as the largest jobs fit into the memory at once."""
    sizes = sorted((job.memory for job in jobs), reverse=True)
    count = min(len(jobs), len(os.sched_getaffinity(0)))
    while count > 1 and sum(sizes[:count]) > memory:
        count -= 1
    return count


def build_engines(
    jobs: Sequence[Job], library: str, progress: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Facts of each engine by its job's name, and of the build: workers, estimated and true peak.

    Raises BuildError where an engine cannot be built; on any error workers are killed.
    """
    free = available_memory()
    count = num_workers(jobs, free)
    estimate = sum(sorted((job.memory for job in jobs), reverse=True)[:count])
    beyond = "" if estimate <= free else ", which may not suffice"
    progress(
        f"{len(jobs)} engines in {count} processes: about {estimate >> 20} MiB of memory at most, "
        f"{free >> 20} MiB are free{beyond}"
    )
    facts: dict[str, dict[str, Any]] = {}
    peaks: dict[Worker, int] = {}

    def build_one(worker: Worker, job: Job) -> None:
        hint = f": the estimate was {job.memory >> 20} MiB"
        reply = worker.ask(asdict(job), f"built engine {job.name}", hint)
        if error := reply.get("error"):
            raise BuildError(f"engine {job.name} cannot be built: {error[-2000:]}")
        peaks[worker] = reply.pop("peak_bytes")
        facts[job.name] = reply
        progress(
            f"engine {job.name} built in {reply['seconds']:.1f} s, {reply['plan_bytes'] / 1e6:.1f} "
            f"MB ({len(facts)} of {len(jobs)})"
        )

    longest_first = sorted(jobs, key=lambda job: -job.weight_bytes)
    run_jobs(longest_first, count, lambda index: Worker(COMPILE, library), build_one)
    # Each worker's own peak: they need not have come at one time, so it is an upper bound.
    peak = sum(peaks.values())
    return facts, {"processes": count, "estimated_bytes": estimate, "peak_bytes": peak}


def place_of(file: Path, tensor: str) -> tuple[str, int, int]:
    """Where a safetensors file holds the bytes of a tensor: the file, the first byte, the end."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(length))[tensor]["data_offsets"]
    return str(file), 8 + length + begin, 8 + length + end
