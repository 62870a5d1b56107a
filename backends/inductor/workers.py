"""Worker processes that compile segments, one for each core."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.backends.cache import building, keep
from inlay.backends.python_process import module_command
from inlay.errors import BuildError

BYTES_PER_WORKER = 2 << 30
"""Inductor and the C++ compiler together stay below this; fewer workers start with less memory."""


@dataclass(frozen=True)
class Job:
    """A segment's key, its graph as JSON, and the place in the cache where its package is kept.

    copy: where to put it besides, for a caller who must not depend on the cache. facts: see `keep`.
    """

    key: str
    graph: dict[str, Any]
    package: Path
    copy: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def compile_jobs(
    jobs: Sequence[Job], ops: Path, optimization_level: int, progress: Callable[[str], None]
) -> None:
    """Compile every job; packages appear at their places one by one, each whole.

    Raises:
        BuildError: a segment could not be compiled, or the cache not be written. On any error, an
            interrupt included, the workers are killed and what they wrote is removed.
    """
    # The largest file system user is the compiler: beside the packages, so that a move is atomic.
    cache = jobs[0].package.parent
    try:
        with building(cache) as scratch:
            _compile_in(scratch, jobs, ops, optimization_level, progress)
    except OSError as error:
        raise BuildError(
            f"cannot compile segments in the cache {cache}: {error}; make room there, or set "
            "INLAY_CACHE_DIR to a directory that can be written"
        ) from error


def _compile_in(
    scratch: Path,
    jobs: Sequence[Job],
    ops: Path,
    optimization_level: int,
    progress: Callable[[str], None],
) -> None:
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    num_workers = _num_workers(len(jobs))
    workers: list[_Worker] = []
    threads = ThreadPoolExecutor(num_workers)
    try:
        for index in range(num_workers):
            workers.append(_Worker(scratch / str(index)))
        drains = [
            threads.submit(_drain, worker, todo, ops, optimization_level, progress)
            for worker in workers
        ]
        for drain in wait(drains, return_when=FIRST_EXCEPTION).done:
            drain.result()
    finally:
        for worker in workers:
            worker.kill()  # which wakes the threads that wait for a reply
        threads.shutdown()


def _num_workers(num_jobs: int) -> int:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(num_jobs, len(os.sched_getaffinity(0)), memory // BYTES_PER_WORKER))


def _drain(
    worker: _Worker,
    todo: queue.SimpleQueue[Job],
    ops: Path,
    optimization_level: int,
    progress: Callable[[str], None],
) -> None:
    """Give a worker jobs until there are none left."""
    while True:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        begin = time.perf_counter()
        worker.compile(job, ops, optimization_level)
        progress(f"segment {job.key} compiled in {time.perf_counter() - begin:.1f} s")


class _Worker:
    """A process with Inductor loaded, in a process group of its own with the compilers it runs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        # Inductor gives the compiler paths without quotes: none of them may hold a space.
        self._inductor = folder / "inductor"
        if len(str(folder).split()) > 1:
            self._inductor = Path(tempfile.mkdtemp(prefix="inlay-inductor-"))
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(self._inductor),
            # The instruction sets that cpuinfo names are compiled for without test compiles: a
            # compiler that knows C++20 knows them.
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        with (folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                module_command("inlay.backends.inductor.compile"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def compile(self, job: Job, ops: Path, optimization_level: int) -> None:
        graph, package = self._folder / "graph.json", self._folder / "package.pt2"
        graph.write_text(json.dumps(job.graph))
        request = {
            "graph": str(graph),
            "package": str(package),
            "ops": str(ops),
            "optimization_level": optimization_level,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.kill()  # compilers that it ran may have outlived it
            raise BuildError(
                f"the process that compiled segment {job.key} died (status "
                f"{self._process.returncode}; -9 often means out of memory); its last lines: "
                f"{self._last_lines()}"
            )
        if error := json.loads(reply).get("error"):
            raise BuildError(
                f"Inductor could not compile segment {job.key}: {error[-2000:]}; "
                "backend='eager' runs the model uncompiled"
            )
        if job.copy is not None:
            shutil.copyfile(package, job.copy)
        keep(package, job.package, job.facts)

    def _last_lines(self) -> str:
        log = (self._folder / "log.txt").read_text(errors="replace")
        return " | ".join(log.strip().splitlines()[-5:])

    def kill(self) -> None:
        """End the process and its compilers, and wait for it; again does nothing."""
        if self._process.returncode is None:  # until it is waited for, its group's id is its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._inductor, ignore_errors=True)
