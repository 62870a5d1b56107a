"""A program whose every segment step has a callable of its own, which holds the step's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import ModelLimits
from inlay.backends.device_attention import attention_for
from inlay.backends.model import ProgramModel, SegmentCall
from inlay.backends.program import Program, SegmentStep
from inlay.errors import OptionError


def segment_steps(program: Program) -> Iterator[tuple[int, SegmentStep]]:
    """The segment steps with their places among all steps."""
    for index, step in enumerate(program.steps):
        if isinstance(step, SegmentStep):
            yield index, step


def model_of_steps(
    artifact: Artifact,
    calls: Mapping[int, SegmentCall],
    shared: Mapping[str, SegmentCall],
    device: torch.device,
) -> ProgramModel:
    """calls: by place, outputs of inputs. shared: by key, segments that take their weights, which
    are then on the device."""
    program, reader = artifact.program, WeightReader(artifact)
    steps, segments, weights = list(program.steps), dict(shared), []
    for index, step in segment_steps(program):
        if index in calls:
            step = replace(step, segment=f"{step.segment}/{index}", weights=())
            segments[step.segment] = calls[index]
            steps[index] = step
        weights.append([reader.get(name).to(device) for name in step.weights])
    return ProgramModel(
        replace(program, steps=tuple(steps)),
        ModelLimits(**artifact.manifest["limits"]),
        segments,
        weights,
        {name: reader.get(name).to(device) for name in program.attention_weight_names},
        attention_for(device),
        device,
        refuse_batch_invariance,
    )


def refuse_batch_invariance() -> None:
    """Kernels are chosen by size, and sum in orders of their own."""
    raise OptionError(
        "batch_invariant=True is not possible with backend 'tensorrt', whose kernels sum in "
        "another order for another number of tokens; build the engine with backend='inductor', or "
        "leave it out"
    )
