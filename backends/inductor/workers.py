"""Worker processes that compile segments, one for each core."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.backends.cache import building, keep
from inlay.backends.device import CUDA
from inlay.backends.host_memory import available_memory
from inlay.backends.inductor.cuda import link_environment
from inlay.backends.worker_pool import Worker, run_jobs
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


@dataclass(frozen=True)
class Settings:
    """What all jobs share. device: "cpu" or "cuda"; ops: the C++ ops, for the CPU alone."""

    device: str
    ops: Path | None
    optimization_level: int


def compile_jobs(jobs: Sequence[Job], settings: Settings, progress: Callable[[str], None]) -> None:
    """Compile every job; packages appear at their places one by one, each whole.

    Raises:
        BuildError: a segment could not be compiled, or the cache not be written. On any error, an
            interrupt included, the workers are killed and what they wrote is removed.
    """
    # The largest file system user is the compiler: beside the packages, so that a move is atomic.
    cache = jobs[0].package.parent
    try:
        with building(cache) as scratch:
            _compile_in(scratch, jobs, settings, progress)
    except OSError as error:
        raise BuildError(
            f"cannot compile segments in the cache {cache}: {error}; make room there, or set "
            "INLAY_CACHE_DIR to a directory that can be written"
        ) from error


def _compile_in(
    scratch: Path, jobs: Sequence[Job], settings: Settings, progress: Callable[[str], None]
) -> None:
    def compile_one(worker: _Compiler, job: Job) -> None:
        begin = time.perf_counter()
        worker.compile(job, settings)
        progress(f"segment {job.key} compiled in {time.perf_counter() - begin:.1f} s")

    def start(number: int) -> _Compiler:
        return _Compiler(scratch / str(number), settings.device)

    run_jobs(jobs, _num_workers(len(jobs)), start, compile_one)


def _num_workers(num_jobs: int) -> int:
    affordable = available_memory() // BYTES_PER_WORKER
    return max(1, min(num_jobs, len(os.sched_getaffinity(0)), affordable))


class _Compiler(Worker):
    """A process with Inductor loaded."""

    def __init__(self, folder: Path, device: str) -> None:
        folder.mkdir()
        self._folder = folder
        # Inductor gives the compiler paths without quotes: none of them may hold a space.
        self._inductor = folder / "inductor"
        if len(str(folder).split()) > 1:
            self._inductor = Path(tempfile.mkdtemp(prefix="inlay-inductor-"))
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(self._inductor),
            # The instruction sets that cpuinfo names are compiled for without test compiles: a
            # compiler that knows C++20 knows them.
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        if device == CUDA:
            environment |= link_environment(folder / "cuda")
        super().__init__("inlay.backends.inductor.compile", env=environment)

    def compile(self, job: Job, settings: Settings) -> None:
        graph, package = self._folder / "graph.json", self._folder / "package.pt2"
        graph.write_text(json.dumps(job.graph))
        request = {
            "graph": str(graph),
            "package": str(package),
            "ops": None if settings.ops is None else str(settings.ops),
            "device": settings.device,
            "optimization_level": settings.optimization_level,
        }
        if error := self.ask(request, f"compiled segment {job.key}").get("error"):
            raise BuildError(
                f"Inductor could not compile segment {job.key}: {error[-2000:]}; "
                "backend='eager' runs the model uncompiled"
            )
        if job.copy is not None:
            shutil.copyfile(package, job.copy)
        keep(package, job.package, job.facts)

    def kill(self) -> None:
        super().kill()
        shutil.rmtree(self._inductor, ignore_errors=True)
