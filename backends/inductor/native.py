"""A program's steps in one call of C++: `kernels/cpu/program.h`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from inlay.backends.kv_caches import LayerCache
from inlay.backends.model import SegmentCall, last_uses
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.backends.step import StepInputs

INPUTS = ("input_ids", "position_ids", "logits_indices")


def load_package(path: Path) -> SegmentCall:
    """One package alone."""
    op = torch.classes.inlay_cpu.Program()
    return partial(op.run_package, op.add_package(str(path)))


class NativeLoop:
    """Holds the packages of a program's segments; runs the whole once `bind` was called."""

    def __init__(
        self,
        program: Program,
        packages: Mapping[str, Path],
        weights: Sequence[list[torch.Tensor]],
        attention_weights: Mapping[str, torch.Tensor],
    ) -> None:
        """weights: for each segment step; the rest as in ProgramModel."""
        self._op = torch.classes.inlay_cpu.Program()
        self._packages = {key: self._op.add_package(str(path)) for key, path in packages.items()}
        self._program = program
        self._weights, self._attention_weights = weights, attention_weights
        names = [*INPUTS]
        for step in program.steps:
            names += step.outputs if isinstance(step, SegmentStep) else [step.output]
        self._numbers = {name: number for number, name in enumerate(names)}

    @property
    def segments(self) -> dict[str, SegmentCall]:
        """Each distinct segment alone."""
        return {
            key: partial(self._op.run_package, number) for key, number in self._packages.items()
        }

    def unbind(self) -> None:
        """Let go of the caches."""
        self._op.clear()

    def bind(self, caches: Mapping[int, LayerCache]) -> None:
        """Run with these caches from now on."""
        self._op.clear()
        weights, dead = iter(self._weights), last_uses(self._program)
        for step, names in zip(self._program.steps, dead, strict=True):
            unused = self._find(names)
            if isinstance(step, AttentionStep):
                self._add_attention(step, caches[step.cache], unused)
                continue
            inputs, outputs = self._find(step.inputs), self._find(step.outputs)
            package = self._packages[step.segment]
            self._op.add_segment(package, next(weights), inputs, outputs, unused)

    def _add_attention(self, step: AttentionStep, cache: LayerCache, unused: list[int]) -> None:
        values = self._find((step.query, step.key, step.value, step.output))
        sinks = self._attention_weights.get(step.sinks or "")
        slopes = self._attention_weights.get(step.slopes or "")
        tensors = [tensor for tensor in cache if tensor is not None]
        options = step.scale, step.window, step.softcap, sinks, step.causal, step.chunk, slopes
        self._op.add_attention(values, unused, tensors, step.group, *options)

    def _find(self, names: Sequence[str]) -> list[int]:
        return [self._numbers[name] for name in names]

    def run(self, step: StepInputs, names: Sequence[str]) -> list[torch.Tensor]:
        """The values of these names after a step."""
        given = [step.input_ids[None], step.position_ids[None], step.logits_indices]
        batch = step.slot_mapping, step.block_tables, step.seq_lens, step.query_start_loc
        found: list[torch.Tensor] = self._op.run(
            given, len(self._numbers), *batch, self._find(names)
        )
        return found
