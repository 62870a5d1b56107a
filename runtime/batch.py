"""From scheduled requests to the tensors of a step, and to the rows that are sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.backends.base import ModelLimits
from inlay.backends.step import StepInputs, StepRequest, build_step, ladder_up_to, round_up
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request
from inlay.runtime.scheduler import ScheduledRequest

UNKNOWN_TOKEN = (0,)
"""Stands for the token sampled last; the device puts the real one in its place."""


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
            logits=ladder_up_to(limits.max_num_seqs),
        )


@dataclass(frozen=True)
class Batch:
    """A step, ready to run.

    sampled: the requests that get a token, in the order of the logits' rows.
    slots, positions: int64, one for each of them: its slot, and the place of its next token.
    """

    step: StepInputs
    sampled: list[Request]
    slots: np.ndarray
    positions: np.ndarray


def prepare(
    scheduled: Sequence[ScheduledRequest],
    kv_cache: KVCache,
    last_tokens: torch.Tensor,
    sizes: StepSizes,
) -> Batch:
    """Build a step's tensors on the device of last_tokens.

    last_tokens: int64 [slots], the token sampled last in each slot. Decoding requests take their
    input from it, so that the host need not have seen a token before the next step is launched.
    """
    sampled = [item.request for item in scheduled if item.needs_logits]
    step = build_step(
        [_step_request(item, kv_cache) for item in scheduled],
        kv_cache.block_size,
        num_tokens=round_up(sum(item.num_tokens for item in scheduled), sizes.tokens),
        num_requests=round_up(len(scheduled), sizes.requests),
        num_logits=round_up(len(sampled), sizes.logits),
    )
    step = step.to(last_tokens.device)
    _gather_last_tokens(step, scheduled, last_tokens)
    return Batch(
        step=step,
        sampled=sampled,
        slots=np.array([request.slot for request in sampled], dtype=np.int64),
        positions=np.array([len(request.token_ids) for request in sampled], dtype=np.int64),
    )


def _gather_last_tokens(
    step: StepInputs, scheduled: Sequence[ScheduledRequest], last_tokens: torch.Tensor
) -> None:
    """Put the token sampled last into the input of each decoding request."""
    rows = [row for row, item in enumerate(scheduled) if item.request.is_decoding]
    if rows:
        slots = torch.tensor([scheduled[row].request.slot for row in rows])
        where = step.query_start_loc[torch.tensor(rows).to(last_tokens.device)]
        step.input_ids[where.long()] = last_tokens[slots.to(last_tokens.device)]


def _step_request(item: ScheduledRequest, kv_cache: KVCache) -> StepRequest:
    request, start = item.request, item.request.num_computed_tokens
    end = start + item.num_tokens
    return StepRequest(
        token_ids=UNKNOWN_TOKEN if request.is_decoding else request.token_ids[start:end],
        num_computed_tokens=start,
        block_tables=kv_cache.table(request.slot, end),
        needs_logits=item.needs_logits,
    )
