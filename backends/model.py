"""The model that every backend loads: it interprets a program, step by step.

A backend supplies two things: a callable for each distinct segment, and the attention op with the
cache layout that it wants. All else is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.backends.step import StepInputs
from inlay.errors import RequestError

SegmentCall = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Weights then inputs, in the segment's own order, to its outputs."""

Observer = Callable[[int, Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""Sees the outputs of the program's step of this index, and says what to go on with instead."""


class AttentionOp(Protocol):
    """Paged attention with a cache layout of its own."""

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Empty key and value caches of one layer."""

    def __call__(
        self,
        step: AttentionStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write k and v, attend: [T, Hq, Dv]; see inlay::paged_attention."""


class ProgramModel:
    """A `LoadedModel` over any backend's segments."""

    def __init__(
        self,
        program: Program,
        limits: ModelLimits,
        segments: Mapping[str, SegmentCall],
        weights: Sequence[list[torch.Tensor]],
        attention_weights: Mapping[str, torch.Tensor],
        attention: AttentionOp,
        device: torch.device,
    ) -> None:
        """weights: for each segment step its weights; attention_weights: those that attention
        takes (sinks, ALiBi slopes) by name."""
        self.program = program
        self.limits = limits
        self.is_encoder = program.is_encoder
        self.device = device
        self.observer: Observer | None = None
        self.dtype: torch.dtype = getattr(torch, program.dtype)
        self.kv_groups = _kv_groups(program, limits.block_size, self.dtype)
        self._attention = attention
        self._attention_weights = attention_weights
        self._caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        weight_lists = iter(weights)
        dead = _last_uses(program)
        self._plan: list[tuple[SegmentStep | AttentionStep, Any, Any, tuple[str, ...]]] = [
            (step, segments[step.segment], next(weight_lists), dead[index])
            if isinstance(step, SegmentStep)
            else (step, None, None, dead[index])
            for index, step in enumerate(program.steps)
        ]

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._caches = {}  # freed before the new ones are made
        for step in self.program.attention_steps:
            if step.cache not in self._caches:
                self._caches[step.cache] = self._attention.allocate(
                    step, num_blocks, self.limits.block_size, self.dtype
                )

    @torch.inference_mode()
    def forward(self, step: StepInputs) -> torch.Tensor:
        assert self._caches, "allocate_kv_cache was not called"
        if self.is_encoder:
            self._check_requests(step)
        values = {
            "input_ids": step.input_ids[None],
            "position_ids": step.position_ids[None],
            "logits_indices": step.logits_indices,
        }
        slots, tables = step.slot_mapping.unbind(0), step.block_tables.unbind(0)
        for index, (call, segment, weights, dead) in enumerate(self._plan):
            if isinstance(call, SegmentStep):
                results = segment([*weights, *[values[name] for name in call.inputs]])
                values.update(zip(call.outputs, results, strict=True))
            else:
                k_cache, v_cache = self._caches[call.cache]
                values[call.output] = self._attention(
                    call,
                    values[call.query],
                    values[call.key],
                    values[call.value],
                    k_cache,
                    v_cache,
                    slots[call.group],
                    tables[call.group],
                    step.seq_lens,
                    step.query_start_loc,
                    self._attention_weights.get(call.sinks or ""),
                    self._attention_weights.get(call.slopes or ""),
                )
            if self.observer is not None:
                names = call.outputs if isinstance(call, SegmentStep) else (call.output,)
                seen = self.observer(index, [values[name] for name in names])
                # Segments are compiled for dense inputs, and do not look at strides.
                values.update(zip(names, (value.contiguous() for value in seen), strict=True))
            for name in dead:
                del values[name]
        return values[self.program.logits][0]

    def _check_requests(self, step: StepInputs) -> None:
        """An encoder's steps are its users' own: no executor has checked them."""
        whole = torch.equal(step.seq_lens, step.query_start_loc.diff())
        assert whole, "an encoder's tokens see those after them: its requests come whole"
        longest = int(step.seq_lens.max())
        if longest > self.limits.max_seq_len:
            raise RequestError(
                f"a request has {longest} tokens; the engine's max_seq_len is "
                f"{self.limits.max_seq_len}: shorten it, or build the engine with a larger "
                "max_seq_len"
            )
        self.limits.refuse_padding(step.input_ids[: step.num_tokens].tolist())


def _kv_groups(program: Program, block_size: int, dtype: torch.dtype) -> tuple[KVGroup, ...]:
    groups: dict[int, list[AttentionStep]] = {}
    for step in {step.cache: step for step in program.attention_steps}.values():
        groups.setdefault(step.group, []).append(step)
    return tuple(
        KVGroup(
            window=steps[0].window,
            num_layers=len(steps),
            bytes_per_block=sum(
                step.num_kv_heads * (step.head_dim + step.v_head_dim) for step in steps
            )
            * block_size
            * dtype.itemsize,
        )
        for _, steps in sorted(groups.items())
    )


def _last_uses(program: Program) -> list[tuple[str, ...]]:
    """For each step the values that no later step reads, so that activations are freed early."""
    dead: list[tuple[str, ...]] = []
    seen = {program.logits}
    for step in reversed(program.steps):
        if isinstance(step, SegmentStep):
            names = {*step.inputs, *step.outputs}
        else:
            names = {step.query, step.key, step.value, step.output}
        dead.append(tuple(sorted(names - seen)))
        seen |= names
    return dead[::-1]
