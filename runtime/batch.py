"""From scheduled sequences to the tensors of a step, and to the rows that are sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.backends.base import ModelLimits
from inlay.backends.step import StepInputs, StepRequest, build_step, ladder_up_to, round_up
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import UNKNOWN_TOKEN
from inlay.runtime.scheduler import ScheduledRequest

MAX_PROMPT_LOGITS = 256
"""Rows of logits for prompt tokens in a step: of large vocabularies each takes a megabyte."""


@dataclass(frozen=True)
class StepSizes:
    """The padded sizes a step may have; few of them, because each costs set-up or a CUDA graph."""

    tokens: Sequence[int]
    requests: Sequence[int]
    logits: Sequence[int]

    @classmethod
    def within(cls, limits: ModelLimits) -> StepSizes:
        """The ladders up to an executor's limits."""
        return cls(
            tokens=ladder_up_to(limits.max_num_tokens),
            requests=ladder_up_to(limits.max_num_seqs, smallest=1),
            logits=sorted({*ladder_up_to(limits.max_num_seqs), *ladder_up_to(MAX_PROMPT_LOGITS)}),
        )


@dataclass(frozen=True)
class Batch:
    """A step, ready to run.

    rows: for each scheduled sequence its last row of logits, -1 where it has none.
    newest: places in input_ids whose token only the device knows yet, and the slots that it is in.
    """

    step: StepInputs
    rows: list[int]
    newest: tuple[np.ndarray, np.ndarray]

    def fill_in(self, step: StepInputs, last_tokens: torch.Tensor) -> None:
        """Put tokens sampled last, int64 [slots], into the inputs that wait for them."""
        places, slots = (torch.from_numpy(part).to(last_tokens.device) for part in self.newest)
        if len(places):
            step.input_ids[places] = last_tokens[slots]


def prepare(items: Sequence[ScheduledRequest], kv_cache: KVCache, sizes: StepSizes) -> Batch:
    """Build a step's tensors on the host.

    The input of a sequence whose newest token is still being sampled is taken on the device, so
    that the host need not have seen a token before the next step is launched.
    """
    requests = [_step_request(item, kv_cache) for item in items]
    counts = np.array([request.num_logits for request in requests])
    rows = np.where(counts > 0, np.cumsum(counts) - 1, -1).tolist()
    step = build_step(
        requests,
        kv_cache.block_size,
        num_tokens=round_up(sum(item.num_tokens for item in items), sizes.tokens),
        num_requests=round_up(len(items), sizes.requests),
        num_logits=round_up(int(counts.sum()), sizes.logits),
    )
    waiting = [row for row, item in enumerate(items) if _newest(item) == UNKNOWN_TOKEN]
    places = step.query_start_loc.numpy()[1:][waiting].astype(np.int64) - 1
    slots = np.array([items[row].request.slot for row in waiting], dtype=np.int64)
    return Batch(step, rows, (places, slots))


def _newest(item: ScheduledRequest) -> int:
    return item.request.token_ids[item.end - 1]


def _step_request(item: ScheduledRequest, kv_cache: KVCache) -> StepRequest:
    request = item.request
    tokens = request.token_ids[item.start : item.end]
    if tokens[-1] == UNKNOWN_TOKEN:
        tokens[-1] = 0
    return StepRequest(
        token_ids=tokens,
        num_computed_tokens=item.start,
        block_tables=kv_cache.table(request.slot, item.end),
        needs_logits=item.needs_logits,
        all_logits=item.all_logits,
    )
