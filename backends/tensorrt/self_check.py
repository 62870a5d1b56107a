"""Each step's engine, or its ONNX, compared with the eager reference on the same inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import ModelLimits
from inlay.backends.eager.backend import ReferenceAttention, interpret
from inlay.backends.graph_json import graph_from_json
from inlay.backends.kv_caches import LayerCache
from inlay.backends.model import SegmentCall
from inlay.backends.program import AttentionStep, SegmentStep
from inlay.backends.step import StepRequest, build_step
from inlay.backends.tensorrt import kept
from inlay.backends.tensorrt.wide import wide, widen_graph
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
    if kept.read(verdict) is not None:
        return
    errors = step_errors(artifact, calls.get, device)
    if told := disagreement(artifact, errors, tolerance(getattr(torch, artifact.program.dtype))):
        raise ArtifactError(
            f"engines of {artifact.path} are wrong on this device: {told}. Rebuild it "
            f"({artifact.manifest['rebuild']}), or run its graphs with backend='eager'"
        )
    said = {"errors": {str(index): error for index, error in errors.items()}}
    kept.write(verdict, json.dumps(said).encode())


def disagreement(artifact: Artifact, errors: Mapping[int, float], allowed: float) -> str:
    """Which steps are off by more than is allowed, in words; "" where none is."""
    wrong = {index: error for index, error in errors.items() if error > allowed}
    if not wrong:
        return ""
    index, error = next(iter(wrong.items()))
    step = artifact.program.steps[index]
    assert isinstance(step, SegmentStep)
    return (
        f"{len(wrong)} of {len(errors)} steps do not compute what the reference computes; the "
        f"first is step {index}, segment {step.segment}: off by {error:.1e} of the RMS, allowed is "
        f"{allowed:.1e}"
    )


@torch.inference_mode()
def step_errors(
    artifact: Artifact,
    call_of: Callable[[int], Call | None],
    device: torch.device,
    in_float32: bool = False,
) -> dict[int, float]:
    """By step the error of its worst output, on requests of SIZES tokens. Later steps go on with
    the reference's values; weights are on the device one step at a time.

    call_of: by index what is to be compared, let go of before the next is asked for; None where
    nothing is. in_float32: narrow floats are read as float32, see wide.py.
    """
    reader = WeightReader(artifact)
    runs = [_Run(artifact, size, device) for size in SIZES]
    errors: dict[int, float] = {}

    def weight(name: str) -> torch.Tensor:
        stored = reader.get(name)
        return (wide(stored) if in_float32 else stored).to(device)

    for index, step in enumerate(artifact.program.steps):
        if isinstance(step, SegmentStep):
            graph = graph_from_json(artifact.json(f"segments/{step.segment}/graph.json"))
            if in_float32:
                widen_graph(graph)
            weights, call = [weight(name) for name in step.weights], call_of(index)
            found = [run.segment(step, interpret(graph), weights, call) for run in runs]
            if call is not None:
                errors[index] = max(found)
            continue
        own = {name: weight(name) for name in step.weights}
        for run in runs:
            run.attend(step, own)
    return errors


class _Run:
    """The values of one request's prefill, as far as it has come."""

    def __init__(self, artifact: Artifact, size: int, device: torch.device) -> None:
        limits = ModelLimits(**artifact.manifest["limits"])
        generator = torch.Generator().manual_seed(size)
        size = min(size, limits.max_seq_len, limits.max_num_tokens)
        ids = torch.randint(0, limits.vocab_size, (size,), generator=generator).tolist()
        self._table = range(-(-size // limits.block_size))
        tables = [self._table] * _num_groups(artifact)
        step = build_step([StepRequest(ids, 0, tables)], limits.block_size).to(device)
        self._step, self._block_size, self._device = step, limits.block_size, device
        self._attention = ReferenceAttention()
        self._caches: dict[int, LayerCache] = {}
        self._values: dict[str, Any] = {
            "input_ids": step.input_ids[None],
            "position_ids": step.position_ids[None],
            "logits_indices": step.logits_indices,
        }

    def segment(
        self, step: SegmentStep, reference: SegmentCall, weights: list[torch.Tensor], call: Any
    ) -> float:
        """The error of call, 0 of None."""
        inputs = [self._values[name].contiguous() for name in step.inputs]
        right = reference([*weights, *inputs])
        self._values.update(zip(step.outputs, right, strict=True))
        if call is None:
            return 0.0
        return max(_error(*pair) for pair in zip(right, call(inputs), strict=True))

    def attend(self, one: AttentionStep, own: Mapping[str, torch.Tensor]) -> None:
        values, step = self._values, self._step
        if one.cache not in self._caches:
            dtype = values[one.key].dtype
            cache = self._attention.allocate(one, len(self._table), self._block_size, dtype)
            on_device = (t if t is None else t.to(self._device) for t in cache)
            self._caches[one.cache] = type(cache)(*on_device)
        values[one.output] = self._attention(
            one, values[one.query], values[one.key], values[one.value], self._caches[one.cache],
            step.slot_mapping[one.group], step.block_tables[one.group], step.seq_lens,
            step.query_start_loc, own.get(one.sinks or ""), own.get(one.slopes or ""),
        )  # fmt: skip


def _num_groups(artifact: Artifact) -> int:
    return 1 + max((step.group for step in artifact.program.attention_steps), default=0)


def _error(right: torch.Tensor, got: torch.Tensor) -> float:
    if not right.is_floating_point():
        return 0.0 if torch.equal(right, got) else math.inf
    error = relative_rms(right.float(), got.float())
    return math.inf if math.isnan(error) else error
