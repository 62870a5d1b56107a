"""Inductor: each distinct segment as an AOTInductor package.

On a CPU large ops are C++ ones on packed weights, and a C++ loop runs the whole program. On CUDA
(`cuda.py`) they are Triton kernels, and CUDA graphs replay the program.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.fx import GraphModule

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import Backend, BackendOptions, BuildSettings, Known, ModelLimits
from inlay.backends.cache import cache_dir, content_key, fetch
from inlay.backends.device import CPU, CUDA, choose_device, fastest_device
from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.backends.inductor import cuda
from inlay.backends.inductor.compile import Packing, inductor_config, packed_weights
from inlay.backends.inductor.invariance import make_batch_invariant
from inlay.backends.inductor.native import NativeLoop
from inlay.backends.inductor.workers import Job, Settings, compile_jobs
from inlay.backends.kernels.cpu_attention import OPS, CpuAttention, OpsBuild
from inlay.backends.kernels.cpu_ops import INTERFACE, load_ops
from inlay.backends.model import ProgramModel
from inlay.backends.program import Program
from inlay.backends.segment_arguments import example_arguments
from inlay.errors import ArtifactError
from inlay.passes.ops import REFERENCES

PACKAGE = "inductor.pt2"
INSTRUCTION_SETS = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "bmi",
    "fma",
    "f16c",
    "vaes",
    "gfni",
    "asimd",
    "sve",
)
"""Prefixes of the CPU flags that decide whether code compiled for this very CPU runs elsewhere."""


class InductorBackend(Backend):
    name = "inductor"

    def __init__(self) -> None:
        self._ops = OpsBuild()

    def check_early(self, known: Known) -> None:
        """Raises BuildError where there is no device as was asked for."""
        choose_device(known.device, fastest_device())

    def prepare(self, options: BackendOptions) -> None:
        """The C++ ops: without a compiler nothing else can be built either."""
        if choose_device(options.device, fastest_device()).type != CUDA:
            self._ops.start()

    def check(
        self, program: Program, segments: Mapping[str, GraphModule], settings: BuildSettings
    ) -> None:
        if choose_device(settings.device, fastest_device()).type == CUDA:
            cuda.check_tools()
        else:
            load_ops(self._ops.result())

    def build(
        self,
        program: Program,
        segments: Mapping[str, GraphModule],
        directory: Path,
        settings: BuildSettings,
    ) -> dict[str, Any]:
        """Compile what the cache does not hold, one worker for each core."""
        device, ops = choose_device(settings.device, fastest_device()).type, None
        if device != CUDA:
            ops = self._ops.result()
            shutil.copyfile(ops, directory / Path(OPS).name)
        toolchain = _toolchain(settings.optimization_level, device)
        cached = {key: _cached_package(gm, toolchain) for key, gm in segments.items()}
        missing = [key for key in cached if not fetch(cached[key], directory / key / PACKAGE)]
        if missing:
            jobs = [
                Job(
                    key,
                    graph_to_json(segments[key]),
                    cached[key],
                    directory / key / PACKAGE,
                    {"origin": settings.origin, "segment": key, "torch": torch.__version__},
                )
                for key in missing
            ]
            common = Settings(device, ops, settings.optimization_level)
            compile_jobs(jobs, common, settings.progress)
        settings.progress(f"{len(missing)} compiled, {len(cached) - len(missing)} from the cache")
        target = cuda.target() if device == CUDA else _target()
        return {**target, "num_compiled": len(missing)}

    def load(self, artifact: Artifact) -> ProgramModel:
        """Load packages and pack weights, shard by shard; needs no compiler."""
        if artifact.manifest["target"].get("device") == CUDA:
            return cuda.load(artifact, PACKAGE)
        _check_target(artifact)
        load_ops(artifact.path / OPS)
        program = artifact.program
        graphs = {
            key: graph_from_json(artifact.json(f"segments/{key}/graph.json"))
            for key in program.segment_keys
        }
        packed = {key: packed_weights(gm) for key, gm in graphs.items()}
        reader = WeightReader(artifact)
        weights = [
            [
                _resident(reader.get(name), packed[step.segment].get(index))
                for index, name in enumerate(step.weights)
            ]
            for step in program.segment_steps
        ]
        attention_weights = {
            name: reader.get(name).clone() for name in program.attention_weight_names
        }
        packages = {key: artifact.segment_file(key, PACKAGE) for key in graphs}
        loop = NativeLoop(program, packages, weights, attention_weights)
        return ProgramModel(
            program,
            ModelLimits(**artifact.manifest["limits"]),
            loop.segments,
            weights,
            attention_weights,
            CpuAttention(),
            torch.device("cpu"),
            lambda: make_batch_invariant(program, graphs, weights, _cpu_flags()),
            loop,
        )


def _resident(tensor: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """A weight that lives on when its shard is unmapped."""
    return tensor.clone() if packing is None else packing(tensor)


def _target() -> dict[str, Any]:
    return {
        "device": "cpu",
        "torch": torch.__version__,
        "machine": os.uname().machine,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
    }


def _cpu_flags() -> list[str]:
    """Instruction sets that compilers may use here, as Linux names them; [] elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    named = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    flags = set(named.partition(":")[2].split())
    return sorted(flag for flag in flags if flag.startswith(INSTRUCTION_SETS))


def _check_target(artifact: Artifact) -> None:
    """Compiled code runs only on what it was compiled for; say what differs."""
    built, here = dict(artifact.manifest["target"]), _target()
    missing = sorted(set(built.pop("cpu_flags", [])) - set(here.pop("cpu_flags")))
    differing = [key for key, value in here.items() if built.get(key) != value]
    if differing:
        key = differing[0]
        what = f"was compiled for {key} {built.get(key)!r}, here it is {here[key]!r}"
    elif missing:
        what = f"was compiled for a CPU with {', '.join(missing)}, which this one lacks"
    else:
        return
    raise ArtifactError(
        f"artifact {artifact.path} {what}; rebuild it here ({artifact.manifest['rebuild']}), or "
        "run its graphs uncompiled with backend='eager'"
    )


def _cached_package(gm: GraphModule, toolchain: dict[str, Any]) -> Path:
    """Where the package of this graph, made by these tools, is cached."""
    key = content_key({"graph": graph_to_json(gm), **toolchain})
    return cache_dir() / "segments" / f"{key}.pt2"


def _toolchain(optimization_level: int, device: str = CPU) -> dict[str, Any]:
    """All that the code of a graph depends on: our sources, torch with its settings, the compiler,
    and the CPU or GPU that it is for."""
    sources = {inspect.getsourcefile(reference) for reference in REFERENCES.values()}
    sources |= {inspect.getsourcefile(packed_weights), inspect.getsourcefile(example_arguments)}
    digest = hashlib.sha256()
    for source in sorted(filter(None, sources)):
        digest.update(Path(source).read_bytes())
    settings = torch._inductor.config.save_config_portable()
    said = {name: value for name, value in settings.items() if not name.endswith("_dir")}
    compiler = shlex.split(get_cpp_compiler())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    return {
        **(cuda.target() if device == CUDA else _target()),
        "config": inductor_config(optimization_level, device),
        "ops": INTERFACE,
        "sources": digest.hexdigest(),
        "torch_git": torch.version.git_version,
        "settings": repr(sorted(said.items())),
        "compiler": [*compiler, version.decode(errors="replace")],
    }
