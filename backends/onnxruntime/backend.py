"""ONNX Runtime: each distinct segment as one ONNX file, a session for each layer over its weights.

Attention and the writing of keys and values stay our ops, between the sessions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import Backend, BackendOptions, BuildSettings, Known, ModelLimits
from inlay.backends.device_attention import attention_for
from inlay.backends.graph_json import graph_from_json
from inlay.backends.kernels.cpu_attention import OPS, CpuAttention, OpsBuild
from inlay.backends.kernels.cpu_ops import load_ops
from inlay.backends.model import AttentionOp, ProgramModel
from inlay.backends.onnx.cached import MODEL, convert_segments
from inlay.backends.onnx.packages import require
from inlay.backends.onnx.whole import check_whole, write_whole
from inlay.backends.onnxruntime.sessions import (
    CPU,
    CUDA,
    EXTRAS,
    SegmentSession,
    check_version,
    offered_providers,
    unresolved_outputs,
)
from inlay.backends.program import Program, SegmentStep
from inlay.errors import ArtifactError, BuildError, OptionError, UnsupportedModelError


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"

    def __init__(self) -> None:
        self._ops = OpsBuild()
        self._models: dict[str, bytes] = {}
        self._num_converted = 0

    def check_early(self, known: Known) -> None:
        require("onnx", "onnxscript", extra=self.name)
        if offered_providers(BuildError)[0] == CPU and known.dtype == "bfloat16":
            raise OptionError(
                "dtype 'bfloat16' is not possible with backend 'onnxruntime' on a CPU: its CPU "
                "provider has no bfloat16 matrix product; give dtype='float32' or 'float16', or "
                "choose backend='inductor'"
            )

    def prepare(self, options: BackendOptions) -> None:
        """The C++ attention."""
        self._ops.start()

    def check(
        self, program: Program, segments: Mapping[str, GraphModule], settings: BuildSettings
    ) -> None:
        """Convert every segment: what cannot be said in ONNX is found before anything is built."""
        if settings.whole:
            check_whole(program)
        self._models, self._num_converted = convert_segments(segments, self.name, settings.origin)
        (onnx,) = require("onnx", extra=self.name)
        for key, data in self._models.items():
            if strange := unresolved_outputs(onnx.load_from_string(data)):
                raise UnsupportedModelError(
                    f"segment {key} gives {', '.join(strange)} of a size that is none of its "
                    "inputs', so that memory cannot be planned; choose backend='inductor'"
                )
        load_ops(self._ops.result())

    def build(
        self,
        program: Program,
        segments: Mapping[str, GraphModule],
        directory: Path,
        settings: BuildSettings,
    ) -> dict[str, Any]:
        """Write what `check` made, and of it the whole model where it is asked for."""
        import onnxruntime

        for key in segments:
            (directory / key / MODEL).write_bytes(self._models[key])
        provider = offered_providers(BuildError)[0]
        if provider == CPU:
            shutil.copyfile(self._ops.result(), directory / Path(OPS).name)
        settings.progress(
            f"{self._num_converted} converted, {len(segments) - self._num_converted} from the cache"
        )
        if settings.whole:
            write_whole(program, self._models, directory.parent)
        here = {"provider": provider, "onnxruntime": onnxruntime.__version__, **_platform(provider)}
        return {**here, "num_converted": self._num_converted}

    def check_refit(self, settings: BuildSettings) -> None:
        if settings.whole:
            require("onnx", extra=self.name)

    def refit(self, directory: Path, program: Program, settings: BuildSettings) -> dict[str, Any]:
        """The whole model says where in the weights' files each one lies."""
        if settings.whole:
            places = {key: directory / "segments" / key / MODEL for key in program.segment_keys}
            write_whole(program, {k: path.read_bytes() for k, path in places.items()}, directory)
        return {}

    def load(self, artifact: Artifact) -> ProgramModel:
        """A session for each segment step; weights come from the mapped shards, one by one."""
        provider = _check_target(artifact)
        device, attention = _attention(artifact, provider)
        reader = WeightReader(artifact)
        steps, segments = list(artifact.program.steps), {}
        names = {key: _weight_names(artifact, key) for key in artifact.program.segment_keys}
        for index, step in enumerate(artifact.program.steps):
            if isinstance(step, SegmentStep):
                model = artifact.segment_file(step.segment, MODEL).read_bytes()
                weights = zip(names[step.segment], step.weights, strict=True)
                tensors = {name: reader.get(weight) for name, weight in weights}
                key = f"{step.segment}/{index}"
                segments[key] = SegmentSession(model, tensors, provider, device)
                steps[index] = replace(step, segment=key, weights=())
        program = replace(artifact.program, steps=tuple(steps))
        return ProgramModel(
            program,
            ModelLimits(**artifact.manifest["limits"]),
            segments,
            [[] for _ in program.segment_steps],
            {
                name: reader.get(name).to(device, copy=True)
                for name in program.attention_weight_names
            },
            attention,
            device,
            refuse_batch_invariance,
        )


def _weight_names(artifact: Artifact, key: str) -> list[str]:
    nodes = graph_from_json(artifact.json(f"segments/{key}/graph.json")).graph.nodes
    return [node.name for node in nodes if node.meta.get("kind") == "weight"]


def _platform(provider: str) -> dict[str, str]:
    """What the artifact's library of ops was built for, where attention is in it."""
    return {"torch": torch.__version__, "machine": os.uname().machine} if provider == CPU else {}


def _attention(artifact: Artifact, provider: str) -> tuple[torch.device, AttentionOp]:
    if provider == CUDA:
        device = torch.device("cuda", torch.cuda.current_device())
        return device, attention_for(device)
    load_ops(artifact.path / OPS)
    return torch.device("cpu"), CpuAttention()


def _check_target(artifact: Artifact) -> str:
    """The provider that the artifact was built for; raises ArtifactError where it cannot run."""
    target, rebuild = artifact.manifest["target"], artifact.manifest["rebuild"]
    provider = str(target["provider"])
    offered = offered_providers(ArtifactError)
    check_version(target["onnxruntime"])
    if provider not in offered:
        raise ArtifactError(
            f"artifact {artifact.path} was built for ONNX Runtime's {provider}; here are "
            f"{', '.join(offered)}; run `pip install 'inlay[{EXTRAS.get(provider, '?')}]'` on a "
            f"machine that has such a device, or rebuild it here ({rebuild})"
        )
    for key, value in _platform(provider).items():
        if target.get(key) != value:
            raise ArtifactError(
                f"artifact {artifact.path} holds attention compiled for {key} {target.get(key)!r}, "
                f"here it is {value!r}; rebuild it here ({rebuild}), or run its graphs uncompiled "
                "with backend='eager'"
            )
    return provider


def refuse_batch_invariance() -> None:
    """Its products choose the order of a sum by the number of rows."""
    raise OptionError(
        "batch_invariant=True is not possible with backend 'onnxruntime', whose matrix products "
        "sum in an order that depends on how many tokens a step has; build the engine with "
        "backend='inductor', or leave it out"
    )
