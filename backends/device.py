"""On which device an engine of torch code runs, and what it has room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from inlay.backends.artifact import WeightReader
from inlay.backends.program import Program
from inlay.errors import BuildError, OptionError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)


def choose_device(word: str, auto: str) -> torch.device:
    """The device of an option; auto: what its "auto" is. CUDA's is the process's current one.

    Raises BuildError where it is CUDA and torch sees no GPU.
    """
    name = auto if word == AUTO else word
    if name == CPU:
        return torch.device(CPU)
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no NVIDIA GPU"
        raise BuildError(
            f"device='cuda' cannot be served: torch {torch.__version__} {why} here; give "
            "device='cpu', or go where there is a GPU with its driver"
        )
    return torch.device(CUDA, torch.cuda.current_device())


def fastest_device() -> str:
    """The "auto" of compiled code."""
    return CUDA if torch.cuda.is_available() else CPU


@contextmanager
def needing_memory(part: str, fix: str) -> Iterator[None]:
    """Whoever finds no room on a GPU is told for which part of an engine, and what lowers that.

    Raises OptionError in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")[:3]  # what was asked for, and what is free
        raise OptionError(f"the GPU has no room for {part}: {'. '.join(said)}; {fix}") from error


def load_weights(
    program: Program, reader: WeightReader, device: torch.device
) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """Each segment step's weights, and attention's by name: one copy of each on a GPU, on a CPU as
    they are in their files. Raises OptionError where a GPU has no room."""
    attention = set(program.attention_weight_names)
    names = {*attention, *(name for step in program.segment_steps for name in step.weights)}
    with needing_memory(
        f"{len(names)} weights", "quantize them (quantization='fp8'), or take a larger GPU"
    ):
        found = {name: reader.get(name).to(device) for name in sorted(names)}
    weights = [[found[name] for name in step.weights] for step in program.segment_steps]
    return weights, {name: found[name] for name in attention}
