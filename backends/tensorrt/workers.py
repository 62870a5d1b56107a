"""Worker processes that build engines, as many as cores and memory allow."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inlay.backends.python_process import module_command
from inlay.errors import BuildError

PROCESS_BYTES = 200 << 20
"""A worker before its first job: Python, numpy and the library."""
COPIES = 3.5
"""Bytes of a worker for each of its engine's weights: the mapped file, the builder's two copies
and the plan. 3.3 was measured for a matrix of 272 MB in bfloat16."""
LAST_WORDS = 2.0
"""Seconds that a dying process has to end and be heard."""
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


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: -job.weight_bytes):  # the longest first
        todo.put(job)
    facts: dict[str, dict[str, Any]] = {}
    workers: list[_Worker] = []
    threads = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            workers.append(_Worker(library))
        drains = [threads.submit(_drain, one, todo, facts, len(jobs), progress) for one in workers]
        for drain in wait(drains, return_when=FIRST_EXCEPTION).done:
            drain.result()
    finally:
        for worker in workers:
            worker.kill()  # which wakes the threads that wait for a reply
        threads.shutdown()
    peaks = [worker.peak_bytes for worker in workers]
    # Each worker's own peak: they need not have come at one time, so it is an upper bound.
    return facts, {"processes": count, "estimated_bytes": estimate, "peak_bytes": sum(peaks)}


def _drain(
    worker: _Worker,
    todo: queue.SimpleQueue[Job],
    facts: dict[str, dict[str, Any]],
    total: int,
    progress: Callable[[str], None],
) -> None:
    """Give a worker jobs until there are none left."""
    while True:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        reply = worker.compile(job)
        facts[job.name] = reply
        progress(
            f"engine {job.name} built in {reply['seconds']:.1f} s, {reply['plan_bytes'] / 1e6:.1f} "
            f"MB ({len(facts)} of {total})"
        )


class _Worker:
    def __init__(self, library: str) -> None:
        self.peak_bytes = 0
        self._process = subprocess.Popen(
            module_command("inlay.backends.tensorrt.compile", library),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said = [*self._said[-4:], line.strip()]

    def compile(self, job: Job) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS)  # so that the status is its own
            self.kill()
            self._listener.join(LAST_WORDS)
            raise BuildError(
                f"the process that built engine {job.name} died (status "
                f"{self._process.returncode}; -9 often means out of memory: the estimate was "
                f"{job.memory >> 20} MiB); its last lines: {' | '.join(self._said)}"
            )
        reply = json.loads(line)
        self.peak_bytes = reply["peak_bytes"]
        if error := reply.get("error"):
            raise BuildError(f"engine {job.name} cannot be built: {error[-2000:]}")
        return reply

    def kill(self) -> None:
        """End the process and wait for it; again does nothing."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()


def place_of(file: Path, tensor: str) -> tuple[str, int, int]:
    """Where a safetensors file holds the bytes of a tensor: the file, the first byte, the end."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(length))[tensor]["data_offsets"]
    return str(file), 8 + length + begin, 8 + length + end
