"""Embeddings: hidden states of a whole prompt, pooled to one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.backends.step import StepInputs
from inlay.runtime.scheduler import ScheduledRequest


@dataclass(frozen=True)
class Pooler:
    """A step's share of it: rows [begin, end) of the hidden states for each sequence."""

    pieces: list[tuple[ScheduledRequest, int, int]]

    @classmethod
    def of(cls, items: Sequence[ScheduledRequest], step: StepInputs) -> Pooler:
        """Those of a step's sequences that want an embedding."""
        starts = step.query_start_loc.tolist()
        return cls(
            [
                (item, starts[index], starts[index + 1])
                for index, item in enumerate(items)
                if item.request.options.pooling is not None
            ]
        )

    def __bool__(self) -> bool:
        return bool(self.pieces)

    def run(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """hidden [T, H]; each sequence's part of its vector, float32 [H], on the host."""
        parts = []
        for item, begin, end in self.pieces:
            rows = hidden[begin:end].float()
            pooling = item.request.options.pooling
            part = rows.sum(0) if pooling == "mean" else rows[0 if pooling == "cls" else -1]
            parts.append(part.to("cpu", non_blocking=True))
        return parts

    def read(
        self, parts: list[torch.Tensor] | None
    ) -> list[tuple[ScheduledRequest, tuple[float, ...]]]:
        """The embeddings of the sequences whose prompt is complete now."""
        done = []
        for (item, _, _), part in zip(self.pieces, parts or (), strict=True):
            request, options = item.request, item.request.options
            if not item.is_current:
                continue
            if item.start == 0 or options.pooling == "last":
                request.pooled = part
            elif options.pooling == "mean":
                assert request.pooled is not None
                request.pooled = request.pooled + part
            if item.end < request.num_prompt_tokens:
                continue
            assert request.pooled is not None
            whole = request.pooled
            if options.pooling == "mean":
                whole = whole / request.num_prompt_tokens
            if options.normalize:
                whole = torch.nn.functional.normalize(whole, dim=0)
            done.append((item, tuple(whole.tolist())))
        return done
