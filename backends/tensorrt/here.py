"""Whether engines can be built, or run, on this machine."""

from __future__ import annotations

import torch

from inlay.backends.artifact import Artifact
from inlay.backends.tensorrt.library import AUTO, INSTALL, TARGETS, Library, find, is_installed
from inlay.errors import ArtifactError, BuildError


def capability() -> str:
    """The GPU's compute capability as targets are called."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def is_for(target: str, device: str) -> bool:
    """Whether engines of a target run on a device of this compute capability."""
    return int(device[2:]) >= 80 if target == AUTO else device == target


def check_target(library: Library, target: str) -> None:
    """Raises BuildError where this library cannot build for a target here."""
    if library.is_rtx:
        return
    if not torch.cuda.is_available():
        raise BuildError(
            "TensorRT builds on the GPU that is to run the engines, and there is none here; "
            f"TensorRT-RTX builds without: {INSTALL['tensorrt_rtx']} and library='tensorrt_rtx'"
        )
    if not is_for(target, capability()):
        raise BuildError(
            f"TensorRT builds for the GPU at hand, which is {capability()}, not for {target}: "
            "leave target out, or choose library='tensorrt_rtx'"
        )


def check_here(artifact: Artifact) -> Library:
    """The library that built an artifact's engines, where they can run.

    Raises ArtifactError where they cannot, with the reason and the way out.
    """
    built = artifact.manifest["target"]
    name, version, target = built["library"], built["version"], built["target"]
    eager = "or run its graphs uncompiled with backend='eager'"
    rebuild = f"rebuild it ({artifact.manifest['rebuild']}), {eager}"
    # Asked first: without a driver the library's runtime is a null object, which crashes.
    if not torch.cuda.is_available():
        raise ArtifactError(
            f"artifact {artifact.path} holds TensorRT engines, which need a GPU "
            f"({TARGETS[target]}); torch {torch.__version__} sees none here: run it on a machine "
            f"with one, {eager}"
        )
    if not is_installed(name):
        raise ArtifactError(
            f"artifact {artifact.path} was built with {name} {version}, which is not installed: "
            f"{INSTALL[name]}, {eager}"
        )
    library = find(name)
    if library.version != version:
        raise ArtifactError(
            f"artifact {artifact.path} was built with {name} {version}, here it is "
            f"{library.version}: install that version, {rebuild}"
        )
    if not is_for(target, capability()):
        raise ArtifactError(
            f"artifact {artifact.path} was built for {TARGETS[target]}, this GPU is "
            f"{capability()}: {rebuild}"
        )
    return library
