"""The model that every backend loads: it interprets a program, step by step.

A backend supplies two things: a callable for each distinct segment, and the attention op with the
cache layout that it wants. All else is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.backends.kv_caches import LayerCache, blocks_of_groups, cached_layers, kv_groups
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.backends.static_call import StaticCall, graph_pool
from inlay.backends.step import StepInputs
from inlay.errors import RequestError
from inlay.passes.kv_formats import kv_dtype

SegmentCall = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Weights then inputs, in the segment's own order, to its outputs."""

Observer = Callable[[int, Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""Sees the outputs of the program's step of this index, and says what to go on with instead."""


class AttentionOp(Protocol):
    """Paged attention with a cache layout of its own."""

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> LayerCache:
        """One layer's empty cache, of any dtype in `passes/kv_formats.py`."""

    def __call__(
        self,
        step: AttentionStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write k and v, attend: [T, Hq, Dv]; see inlay::paged_attention."""


class StepLoop(Protocol):
    """A backend's own loop over all of a program's steps."""

    def unbind(self) -> None:
        """Let go of the caches."""

    def bind(self, caches: Mapping[int, LayerCache]) -> None:
        """Run with these caches from now on."""

    def run(self, step: StepInputs, names: Sequence[str]) -> list[torch.Tensor]:
        """The values of these names after a step."""


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
        make_batch_invariant: Callable[[], None],
        loop: StepLoop | None = None,
    ) -> None:
        """weights: for each segment step its weights; attention_weights: those that attention
        takes (sinks, ALiBi slopes) by name; loop: runs steps that nobody observes."""
        self.make_batch_invariant = make_batch_invariant
        self.program = program
        self.limits = limits
        self.is_encoder = program.is_encoder
        self.device = device
        self.observer: Observer | None = None
        self.dtype: torch.dtype = getattr(torch, program.dtype)
        self.kv_groups = self.kv_groups_for(None)
        self._attention = attention
        self._loop = loop
        self._attention_weights = attention_weights
        self._caches: dict[int, LayerCache] = {}
        self._pool = graph_pool(device)
        self._pieces: dict[
            tuple[int, tuple[torch.Size, ...]], StaticCall[Sequence[torch.Tensor]]
        ] = {}
        self._num_pieces = next(
            (
                index
                for index, step in enumerate(program.steps)
                if isinstance(step, SegmentStep) and "logits_indices" in step.inputs
            ),
            0,
        )
        weight_lists = iter(weights)
        dead = last_uses(program)
        self._plan: list[tuple[SegmentStep | AttentionStep, Any, Any, tuple[str, ...]]] = [
            (step, segments[step.segment], next(weight_lists), dead[index])
            if isinstance(step, SegmentStep)
            else (step, None, None, dead[index])
            for index, step in enumerate(program.steps)
        ]

    def kv_groups_for(self, dtype: str | None) -> tuple[KVGroup, ...]:
        return kv_groups(self.program, self.limits.block_size, kv_dtype(dtype, self.dtype))

    def allocate_kv_cache(self, num_blocks: int | Sequence[int], dtype: str | None = None) -> None:
        wanted = kv_dtype(dtype, self.dtype)
        sizes = blocks_of_groups(num_blocks, len(self.kv_groups))
        self._caches = {}  # freed before the new ones are made
        if self._loop is not None:
            self._loop.unbind()
        for step in cached_layers(self.program):
            self._caches[step.cache] = self._attention.allocate(
                step, sizes[step.group], self.limits.block_size, wanted
            )
        if self._loop is not None:
            self._loop.bind(self._caches)

    def kv_tensors(self, group: int) -> list[torch.Tensor]:
        layers = [step for step in cached_layers(self.program) if step.group == group]
        return [tensor for step in layers for tensor in self._caches[step.cache].block_tensors]

    @torch.inference_mode()
    def forward(self, step: StepInputs) -> torch.Tensor:
        return self._run(step)[self.program.logits][0]

    @torch.inference_mode()
    def forward_hidden(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        values = self._run(step, keep=self.program.hidden)
        return values[self.program.logits][0], values[self.program.hidden][0]

    @torch.inference_mode()
    def forward_pieces(self, step: StepInputs) -> torch.Tensor:
        return self._run(step, in_pieces=True)[self.program.logits][0]

    def _piece(self, index: int, inputs: list[torch.Tensor]) -> SegmentCall | None:
        """The segment step at this index as a graph for these sizes; None behind the gathering of
        logits rows, whose number differs from step to step."""
        if index >= self._num_pieces:
            return None
        key = index, tuple(value.shape for value in inputs)
        if key not in self._pieces:
            _, segment, weights, _ = self._plan[index]
            # What earlier pieces gave lies where it always will.
            fixed = {id(one) for piece in self._pieces.values() for one in piece.fixed}
            own = [value if id(value) in fixed else value.clone() for value in inputs]
            self._pieces[key] = StaticCall(
                lambda given: segment([*weights, *given]), own, self._pool
            )
        return self._pieces[key]

    def _run(
        self, step: StepInputs, keep: str | None = None, in_pieces: bool = False
    ) -> dict[str, torch.Tensor]:
        """What is left at the end: the logits, and the value to keep."""
        assert self._caches, "allocate_kv_cache was not called"
        step = step.to(self.device)
        if self.is_encoder:
            self._check_requests(step)
        if self._loop is not None and self.observer is None and not in_pieces:
            wanted = [self.program.logits, *([keep] if keep else [])]
            return dict(zip(wanted, self._loop.run(step, wanted), strict=True))
        values = {
            "input_ids": step.input_ids[None],
            "position_ids": step.position_ids[None],
            "logits_indices": step.logits_indices,
        }
        slots, tables = step.slot_mapping.unbind(0), step.block_tables.unbind(0)
        for index, (call, segment, weights, dead) in enumerate(self._plan):
            if isinstance(call, SegmentStep):
                inputs = [values[name] for name in call.inputs]
                piece = self._piece(index, inputs) if in_pieces else None
                results = piece(inputs) if piece else segment([*weights, *inputs])
                values.update(zip(call.outputs, results, strict=True))
            else:
                values[call.output] = self._attention(
                    call,
                    values[call.query],
                    values[call.key],
                    values[call.value],
                    self._caches[call.cache],
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
                dense = [value.to(self.device).contiguous() for value in seen]
                values.update(zip(names, dense, strict=True))
            for name in dead:
                if name != keep:
                    del values[name]
        return values

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


def last_uses(program: Program) -> list[tuple[str, ...]]:
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
