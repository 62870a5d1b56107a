"""Before engines are first used on a device, each is compared with the eager reference there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import ModelLimits
from inlay.backends.eager.backend import ReferenceAttention, interpret
from inlay.backends.graph_json import graph_from_json
from inlay.backends.program import SegmentStep
from inlay.backends.step import StepRequest, build_step
from inlay.errors import ArtifactError
from inlay.passes.check import relative_rms

Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

SIZES = (2, 11)
"""Tokens of the two steps: one of the decode profile's, one of most prefill profiles'."""


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative RMS difference of one engine's outputs.

    A segment rounds some ten times to its dtype, each time half a unit at most, where an engine may
    round elsewhere: 8 units are beyond what that adds up to, and far below what a wrong weight,
    scale or layout costs. In float32 sums are taken in another order: as for other backends.
    """
    return max(8 * torch.finfo(dtype).eps, 5e-5)


def check_engines(
    artifact: Artifact, calls: Mapping[int, Call], device: torch.device, verdict: Path
) -> None:
    """Compare each step's engine with the reference on the same inputs; the verdict file, whose
    name must say all that the result depends on, remembers that they agreed.

    calls: by index in the program's steps, outputs of inputs.
    Raises ArtifactError, naming the step and the segment, where an engine is wrong.
    """
    if verdict.is_file():
        return
    errors: dict[int, float] = {}
    for size in SIZES:
        for index, error in _errors(artifact, calls, device, size).items():
            errors[index] = max(errors.get(index, 0.0), error)
    allowed = tolerance(getattr(torch, artifact.program.dtype))
    wrong = {index: error for index, error in errors.items() if not error <= allowed}
    if wrong:
        index, error = next(iter(wrong.items()))
        step = artifact.program.steps[index]
        assert isinstance(step, SegmentStep)
        raise ArtifactError(
            f"{len(wrong)} of {len(errors)} engines of {artifact.path} do not compute what the "
            f"reference computes on this device; the first is that of step {index}, segment "
            f"{step.segment}: off by {error:.1e} of the RMS, allowed is {allowed:.1e}. Rebuild it "
            f"({artifact.manifest['rebuild']}), or run its graphs with backend='eager'"
        )
    _write(verdict, {"errors": {str(index): error for index, error in errors.items()}})


@torch.inference_mode()
def _errors(
    artifact: Artifact, calls: Mapping[int, Call], device: torch.device, size: int
) -> dict[int, float]:
    """By step the error of its engine's worst output, on a request of so many tokens. Later steps
    go on with the reference's values; weights are on the device one step at a time."""
    program, reader = artifact.program, WeightReader(artifact)
    limits = ModelLimits(**artifact.manifest["limits"])
    generator = torch.Generator().manual_seed(size)
    size = min(size, limits.max_seq_len, limits.max_num_tokens)
    ids = torch.randint(0, limits.vocab_size, (size,), generator=generator).tolist()
    table = [range(-(-size // limits.block_size))] * _num_groups(artifact)
    step = build_step([StepRequest(ids, 0, table)], limits.block_size).to(device)
    values: dict[str, Any] = {
        "input_ids": step.input_ids[None],
        "position_ids": step.position_ids[None],
        "logits_indices": step.logits_indices,
    }
    attention, caches = ReferenceAttention(), {}
    errors: dict[int, float] = {}
    for index, one in enumerate(program.steps):
        if isinstance(one, SegmentStep):
            graph = graph_from_json(artifact.json(f"segments/{one.segment}/graph.json"))
            weights = [reader.get(name).to(device) for name in one.weights]
            inputs = [values[name].contiguous() for name in one.inputs]
            right = interpret(graph)([*weights, *inputs])
            values.update(zip(one.outputs, right, strict=True))
            if index in calls:
                got = calls[index](inputs)
                errors[index] = max(_error(*pair) for pair in zip(right, got, strict=True))
            continue
        if one.cache not in caches:
            cache = attention.allocate(one, len(table[0]), limits.block_size, values[one.key].dtype)
            caches[one.cache] = type(cache)(*(t if t is None else t.to(device) for t in cache))
        own = {name: reader.get(name).to(device) for name in one.weights}
        values[one.output] = attention(
            one, values[one.query], values[one.key], values[one.value], caches[one.cache],
            step.slot_mapping[one.group], step.block_tables[one.group], step.seq_lens,
            step.query_start_loc, own.get(one.sinks or ""), own.get(one.slopes or ""),
        )  # fmt: skip
    return errors


def _num_groups(artifact: Artifact) -> int:
    return 1 + max((step.group for step in artifact.program.attention_steps), default=0)


def _error(right: torch.Tensor, got: torch.Tensor) -> float:
    if not right.is_floating_point():
        return 0.0 if torch.equal(right, got) else float("inf")
    return relative_rms(right.float(), got.float())


def _write(file: Path, data: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as opened:
        json.dump(data, opened)
    os.replace(name, file)
