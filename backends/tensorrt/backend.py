"""TensorRT: an engine for each segment step, which holds its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from inlay.backends.artifact import SELF, Artifact
from inlay.backends.base import (
    Backend,
    BackendOptions,
    BuildSettings,
    Checkable,
    Known,
    ModelLimits,
)
from inlay.backends.cache import cache_dir
from inlay.backends.graph_json import graph_from_json
from inlay.backends.model import ProgramModel
from inlay.backends.onnx.packages import require
from inlay.backends.program import Program, SegmentStep
from inlay.backends.step import ladder_up_to
from inlay.backends.tensorrt.engines import MODEL, Look, build_plans, look, plan_name
from inlay.backends.tensorrt.execution import EngineCall, Session
from inlay.backends.tensorrt.fallback import compiled
from inlay.backends.tensorrt.here import check_here, check_target
from inlay.backends.tensorrt.library import find
from inlay.backends.tensorrt.self_check import check_engines
from inlay.backends.tensorrt.stand_in import stand_in
from inlay.backends.tensorrt.steps import model_of_steps, segment_steps
from inlay.backends.tensorrt.supported import WAYS_OUT, scheme_refusal
from inlay.errors import BuildError, UnsupportedModelError

CACHE = "tensorrt"
"""The folder of the user's cache where kernels and verdicts of this machine's devices lie."""


class TensorRTBackend(Backend):
    name = "tensorrt"

    def __init__(self) -> None:
        self._looked: dict[str, Look] = {}

    def check_early(self, known: Known) -> None:
        library = find(known.library)
        check_target(library, known.target)
        require("onnx", "onnxscript", extra=library.name.replace("_", "-"))
        if known.target == "sm75" and known.dtype == "bfloat16":
            raise UnsupportedModelError(
                "target 'sm75' (Turing) has no bfloat16, which the model is in; give "
                "dtype='float16', or a target from sm80 on"
            )
        reasons = [scheme_refusal(scheme, known) for scheme in known.schemes]
        if known.fallback != "inductor" and (found := "; ".join(filter(None, reasons))):
            raise UnsupportedModelError(f"quantization is not possible so: {found}; {WAYS_OUT}")

    def check_runs(self) -> None:
        if not torch.cuda.is_available():
            raise BuildError(
                f"TensorRT engines need a GPU to run, and torch {torch.__version__} sees none "
                "here: `inlay build` builds them all the same, and checks what they are made of"
            )

    def prepare(self, options: BackendOptions) -> None:
        """Nothing takes long enough."""

    def check(
        self, program: Program, segments: Mapping[str, GraphModule], settings: BuildSettings
    ) -> None:
        """Every segment is converted and parsed: what TensorRT refuses is said before a build."""
        library = find(settings.library)
        self._looked = {key: look(key, gm, library, settings) for key, gm in segments.items()}
        refused = self._refused()
        for key, reasons in refused.items():
            settings.progress(f"segment {key} runs on Inductor: {'; '.join(reasons)}")
        if refused and settings.fallback != "inductor":
            reasons = [reason for found in refused.values() for reason in found]
            raise UnsupportedModelError(
                f"TensorRT cannot take {len(reasons)} nodes of this model, in {len(refused)} of "
                f"its {len(segments)} segments: {'; '.join(reasons)}; {WAYS_OUT}"
            )

    def _refused(self) -> dict[str, list[str]]:
        return {key: list(one.refusals) for key, one in self._looked.items() if one.refusals}

    def build(
        self,
        program: Program,
        segments: Mapping[str, GraphModule],
        directory: Path,
        settings: BuildSettings,
    ) -> dict[str, Any]:
        """Plans of what `check` found good; the ONNX stays beside them, for `refit`."""
        library, refused = find(settings.library), self._refused()
        good = {key: one for key, one in self._looked.items() if key not in refused}
        for key, one in good.items():
            (directory / key / MODEL).write_bytes(one.model)
        summary = build_plans(program, directory, library, settings, set(good))
        return {
            "device": "cuda",
            "library": library.name,
            "version": library.version,
            "target": settings.target,
            **summary,
            "on_inductor": refused,
        }

    def weight_files(self, directory: Path) -> list[Path]:
        return sorted((directory / "segments").glob(f"*/{plan_name('*')}"))

    def check_refit(self, settings: BuildSettings) -> None:
        require("onnx", extra="tensorrt-rtx")
        check_target(find(settings.library), settings.target)

    def refit(self, directory: Path, program: Program, settings: BuildSettings) -> dict[str, Any]:
        """Plans anew, of the ONNX that the artifact keeps, by the library that is here now."""
        library = find(settings.library)
        folder = directory / "segments"
        keys = {path.parent.name for path in folder.glob(f"*/{MODEL}")}
        summary = build_plans(program, folder, library, settings, keys)
        return {"library": library.name, "version": library.version, **summary}

    def load(self, artifact: Artifact) -> ProgramModel:
        """Engines on the first CUDA device; compared with the reference where they are new to it.

        Raises ArtifactError without a GPU, or where target, library or version do not fit.
        """
        library = check_here(artifact)
        device = torch.device("cuda", torch.cuda.current_device())
        place = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
        folder = cache_dir() / CACHE
        kernels = folder / f"{place}-{library.version}.kernels"
        session = Session(library, device, kernels)
        calls = engine_calls(artifact, session)
        verdict = folder / f"{place}-{library.version}-{artifact.manifest[SELF][:24]}.checked"
        check_engines(artifact, calls, device, verdict)
        model = program_model(artifact, calls, device)
        warm_up(artifact, calls, device)
        session.keep_kernels()
        return model

    def load_to_check(self, artifact: Artifact) -> Checkable:
        if torch.cuda.is_available():
            return Checkable(self.load(artifact), "the tensorrt engine")
        return stand_in(artifact)


def engine_calls(artifact: Artifact, session: Session) -> dict[int, EngineCall]:
    """The engines of a program's steps, by index, ready to be called."""
    calls = {}
    for index, step in segment_steps(artifact.program):
        if step.segment not in _on_inductor(artifact):
            plan = artifact.segment_file(step.segment, plan_name(index))
            calls[index] = session.load(plan, _input_names(artifact, step))
    session.share_scratch()
    return calls


def _on_inductor(artifact: Artifact) -> dict[str, list[str]]:
    return artifact.manifest["target"]["on_inductor"]


def _input_names(artifact: Artifact, step: SegmentStep) -> list[str]:
    """As the segment's ONNX model calls its inputs."""
    nodes = graph_from_json(artifact.json(f"segments/{step.segment}/graph.json")).graph.nodes
    return [node.name for node in nodes if node.meta.get("kind") == "input"]


def program_model(
    artifact: Artifact, calls: Mapping[int, EngineCall], device: torch.device
) -> ProgramModel:
    """The program over its engines, and what Inductor runs."""
    shared = {
        key: compiled(graph_from_json(artifact.json(f"segments/{key}/graph.json")))
        for key in _on_inductor(artifact)
    }
    return model_of_steps(artifact, calls, shared, device)


def warm_up(artifact: Artifact, calls: Mapping[int, EngineCall], device: torch.device) -> None:
    """Run every engine with each size of a decode step, so that kernels are compiled before any
    step is captured, and can be kept."""
    limits = ModelLimits(**artifact.manifest["limits"])
    steps = dict(segment_steps(artifact.program))
    for index, call in calls.items():
        graph = graph_from_json(artifact.json(f"segments/{steps[index].segment}/graph.json"))
        specs = [n.meta["spec"] for n in graph.graph.nodes if n.meta.get("kind") == "input"]
        for size in ladder_up_to(limits.max_num_seqs):
            call(
                [
                    torch.zeros(
                        [size if isinstance(s, str) else s for s in shape],
                        dtype=dtype,
                        device=device,
                    )
                    for shape, dtype in specs
                ]
            )
