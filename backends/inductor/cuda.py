"""Inductor's packages on an NVIDIA GPU: what they were compiled for, and how they are run.

A package holds Inductor's Triton kernels and calls cuBLAS for plain products; narrow products and
mixtures of experts it finds through torch's dispatcher, as Triton kernels of ours. Attention runs
between packages. Nothing here waits for the device, so that CUDA graphs can hold all of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import ModelLimits
from inlay.backends.device import CUDA, choose_device, load_weights
from inlay.backends.device_attention import attention_for
from inlay.backends.model import ProgramModel, SegmentCall
from inlay.errors import ArtifactError, BuildError, OptionError


def target() -> dict[str, Any]:
    """What the code is compiled for here."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": CUDA,
        "torch": torch.__version__,
        "machine": os.uname().machine,
        "cuda": torch.version.cuda,
        "compute_capability": f"{major}.{minor}",
        "triton": _triton_version(),
    }


def check_tools() -> None:
    """Raises BuildError where what compiles packages is missing."""
    if _triton_version() is None:
        raise BuildError(
            "device='cuda' compiles with Triton, which is not installed; install it (CUDA builds "
            "of torch bring it along)"
        )
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise BuildError(
            "device='cuda' compiles code that includes CUDA's headers, and there is no CUDA "
            f"toolkit; install that of CUDA {torch.version.cuda}, and name its directory in "
            "CUDA_HOME if it is not /usr/local/cuda"
        )
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if not any(shutil.which(one) for one in compilers):
        raise BuildError(
            f"no C++ compiler for the host's part of the code: none of {', '.join(compilers)} is "
            "on the PATH; install g++, or name one in CXX"
        )


def link_environment(folder: Path) -> dict[str, str]:
    """What a worker's compiler needs to find CUDA, with what lies in a folder of its own: of the
    driver's library most systems have only `libcuda.so.1`, and linkers look for `libcuda.so`."""
    from torch.utils.cpp_extension import CUDA_HOME

    found = {} if CUDA_HOME is None else {"CUDA_HOME": CUDA_HOME}
    if driver := driver_library(Path("/proc/self/maps").read_text()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libcuda.so").symlink_to(driver)
        others = os.environ.get("LIBRARY_PATH")
        found["LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), others)))
    return found


def driver_library(maps: str) -> str | None:
    """The file of CUDA's driver that a process has loaded, by its /proc/PID/maps."""
    found = re.search(r"\s(/.*/libcuda\.so[.\d]*)$", maps, re.MULTILINE)
    return found and found[1]


def load_package(path: Path, device: torch.device) -> SegmentCall:
    """A compiled package as a call; on CUDA in the order of the current stream."""
    index = -1 if device.index is None else device.index
    # Single-threaded: the only way to run that a CUDA graph can hold.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index).boxed_run


def load(artifact: Artifact, package: str) -> ProgramModel:
    """A model that is ready to run on the current GPU."""
    device = _check_target(artifact)
    from inlay.backends.kernels.triton.register import register_cuda_kernels

    register_cuda_kernels()
    program = artifact.program
    weights, attention_weights = load_weights(program, WeightReader(artifact), device)
    segments = {
        key: load_package(artifact.segment_file(key, package), device)
        for key in program.segment_keys
    }
    return ProgramModel(
        program,
        ModelLimits(**artifact.manifest["limits"]),
        segments,
        weights,
        attention_weights,
        attention_for(device),
        device,
        refuse_batch_invariance,
    )


def refuse_batch_invariance() -> None:
    raise OptionError(
        "batch_invariant=True is not possible with device='cuda': cuBLAS and split attention sum "
        "in an order that depends on the batch; leave it out"
    )


def _check_target(artifact: Artifact) -> torch.device:
    """Raises ArtifactError where the code cannot run here."""
    rebuild = (
        f"rebuild it here ({artifact.manifest['rebuild']}), or run its graphs uncompiled with "
        "backend='eager'"
    )
    try:
        device = choose_device(CUDA, CUDA)
    except BuildError as error:
        raise ArtifactError(
            f"artifact {artifact.path} was compiled for CUDA: {error}; {rebuild}"
        ) from error
    built = artifact.manifest["target"]
    for key, here in target().items():
        if built.get(key) != here:
            raise ArtifactError(
                f"artifact {artifact.path} was compiled for {key} {built.get(key)!r}, here it is "
                f"{here!r}; {rebuild}"
            )
    return device


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)
