"""From scheduled sequences to the tensors of a step, and to the rows that are sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.backends.base import ModelLimits
from inlay.backends.step import FlatRequests, StepInputs, build_step, ladder_up_to, round_up
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import UNKNOWN_TOKEN
from inlay.runtime.sampler import to_device
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
    def within(cls, limits: ModelLimits, fewest: int = 1) -> StepSizes:
        """The ladders up to an executor's limits; fewest: requests that a step is padded to."""
        return cls(
            tokens=ladder_up_to(limits.max_num_tokens),
            requests=ladder_up_to(limits.max_num_seqs, smallest=fewest),
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
        if len(self.newest[0]):
            places, slots = (to_device(part, last_tokens.device) for part in self.newest)
            step.input_ids[places] = last_tokens[slots]
            step.input_ids[step.num_tokens :] = step.input_ids[step.num_tokens - 1]


def prepare(items: Sequence[ScheduledRequest], kv_cache: KVCache, sizes: StepSizes) -> Batch:
    """Build a step's tensors on the host.

    The input of a sequence whose newest token is still being sampled is taken on the device, so
    that the host need not have seen a token before the next step is launched.
    """
    slots = np.array([item.request.slot for item in items], dtype=np.int64)
    requests = _flatten(items, slots, kv_cache)
    lasts, last_rows = np.cumsum(requests.counts) - 1, np.cumsum(requests.num_logits) - 1
    waiting = requests.token_ids[lasts] == UNKNOWN_TOKEN
    places = lasts[waiting]
    requests.token_ids[places] = 0
    step = build_step(
        requests,
        kv_cache.block_size,
        num_tokens=round_up(int(lasts[-1]) + 1, sizes.tokens),
        num_requests=round_up(len(items), sizes.requests),
        num_logits=round_up(int(last_rows[-1]) + 1, sizes.logits),
    )
    rows = np.where(requests.num_logits > 0, last_rows, -1).tolist()
    return Batch(step, rows, (places, slots[waiting]))


def _flatten(
    items: Sequence[ScheduledRequest], slots: np.ndarray, kv_cache: KVCache
) -> FlatRequests:
    tokens: list[int] = []
    for item in items:
        tokens += item.request.token_ids[item.start : item.end]
    numbers = [(item.num_tokens, item.start, item.num_logits) for item in items]
    counts, computed, num_logits = np.array(numbers, dtype=np.int64).T
    return FlatRequests(
        token_ids=np.array(tokens, dtype=np.int64),
        counts=counts,
        computed=computed,
        block_tables=kv_cache.tables(slots, computed + counts),
        num_logits=num_logits,
    )
