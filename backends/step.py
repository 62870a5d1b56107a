"""One step's inputs: the ragged batch that every backend runs.

All requests of a step are flattened into one row of tokens. A request brings the tokens that
are not yet in its KV cache: a whole prompt, a chunk of one, or the single token it last sampled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

SMALLEST = 2
"""Tokens and logits rows of a step, at the least. Matrix products of one row take another path in
most libraries, and their sums differ in the last bit from those of the same row in a larger batch;
export, too, treats a size of one as a case of its own."""

ALIGNMENT = 64
"""Bytes; compiled code expects at least 16 of its inputs' addresses."""

PADDING_SLOT = -1
"""Cache slot of a padding token: nothing is written for it."""


@dataclass(frozen=True)
class StepRequest:
    """What one request brings to a step.

    token_ids: the new tokens, in order; positions are num_computed_tokens + 0, 1, ...
    block_tables: for each KV group the blocks that hold (or will hold) this request's cache.
    needs_logits: whether the logits after the last new token are wanted (no for a prompt chunk
        that is not the last).
    all_logits: whether those after every new token are.
    """

    token_ids: Sequence[int]
    num_computed_tokens: int
    block_tables: Sequence[Sequence[int]] | np.ndarray
    needs_logits: bool = True
    all_logits: bool = False

    @property
    def num_logits(self) -> int:
        """Rows of logits that it wants, the last ones of its tokens."""
        return len(self.token_ids) if self.all_logits else int(self.needs_logits)


@dataclass(frozen=True)
class FlatRequests:
    """The same of all requests of a step, in arrays. T tokens, B requests, G KV groups."""

    token_ids: np.ndarray  # [T]
    counts: np.ndarray  # [B] int64, new tokens
    computed: np.ndarray  # [B] int64, tokens before them
    block_tables: np.ndarray  # [G, B, blocks] int32
    num_logits: np.ndarray  # [B] int64, rows of logits wanted, of the last tokens

    @classmethod
    def of(cls, requests: Sequence[StepRequest], block_size: int) -> FlatRequests:
        """Requests one behind the other; AssertionError where a table is too short for one."""
        counts = np.array([len(r.token_ids) for r in requests], dtype=np.int64)
        computed = np.array([r.num_computed_tokens for r in requests], dtype=np.int64)
        width = max(len(table) for r in requests for table in r.block_tables)
        tables = np.zeros((len(requests[0].block_tables), len(requests), width), dtype=np.int32)
        for b, request in enumerate(requests):
            needed = -(-int(computed[b] + counts[b]) // block_size)
            for g, table in enumerate(request.block_tables):
                assert len(table) >= needed, f"request {b}: {len(table)} blocks, {needed} needed"
                tables[g, b, : len(table)] = table
        return cls(
            token_ids=np.concatenate([np.asarray(r.token_ids) for r in requests]),
            counts=counts,
            computed=computed,
            block_tables=tables,
            num_logits=np.array([r.num_logits for r in requests], dtype=np.int64),
        )


@dataclass(frozen=True)
class StepInputs:
    """The tensors of one step. T tokens, B requests, R wanted logits, G KV groups.

    Padding: tokens beyond query_start_loc[-1] belong to no request and have slot -1. Made by
    `build_step` they repeat the last real one, so that a kernel may compute equal rows once.
    Requests beyond the real ones have seq_len 0 and no tokens. Logits rows beyond num_logits repeat
    the last real one, or token 0 where there is none, and are to be ignored.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [G, T] int64, block * block_size + offset, or PADDING_SLOT
    block_tables: torch.Tensor  # [G, B, max_blocks] int32
    seq_lens: torch.Tensor  # [B] int32, cached tokens after this step
    query_start_loc: torch.Tensor  # [B + 1] int32
    logits_indices: torch.Tensor  # [R] int64
    num_tokens: int
    num_requests: int
    num_logits: int

    def to(self, device: torch.device) -> StepInputs:
        """The same step with its tensors on a device; itself where they are there."""
        if self.input_ids.device == device:
            return self
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **send(tensors, device))


def send(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of the host on a device, in one copy: they are parts of one buffer there.

    On CUDA from pinned memory, in stream order: a copy that is waited for would wait for the step
    before it too.
    """
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, tensor in tensors.items():
        _part(host, starts[name], tensor).copy_(tensor)
    there = host.to(device, non_blocking=True)
    return {name: _part(there, starts[name], tensor) for name, tensor in tensors.items()}


def _part(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def round_up(value: int, ladder: Sequence[int]) -> int:
    """The smallest rung of an ascending ladder that is at least value; value itself beyond it."""
    index = bisect_left(ladder, value)
    return value if index == len(ladder) else ladder[index]


def ladder_up_to(limit: int, smallest: int = SMALLEST) -> list[int]:
    """Padded sizes: powers of two to 16, by 8 to 128, by 64 to 1024, then by 256, up to limit."""
    rungs = {smallest, 2, 4, 8, 16, *range(24, 129, 8), *range(192, 1025, 64)}
    rungs |= set(range(1280, limit + 256, 256))
    return sorted({min(rung, max(limit, smallest)) for rung in rungs if rung >= smallest})


def build_step(
    requests: Sequence[StepRequest] | FlatRequests,
    block_size: int,
    *,
    num_tokens: int | None = None,
    num_requests: int | None = None,
    num_logits: int | None = None,
) -> StepInputs:
    """Flatten requests into one step; the three sizes, where given, are padded to.

    Tokens and logits rows are padded to at least SMALLEST.

    Raises AssertionError when a block table is too short for its tokens: the scheduler's fault.
    """
    if not isinstance(requests, FlatRequests):
        assert requests, "a step needs at least one request"
        requests = FlatRequests.of(requests, block_size)
    counts, computed, real_b = requests.counts, requests.computed, len(requests.counts)
    num_groups, _, max_blocks = requests.block_tables.shape
    starts = np.zeros(real_b + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    real_tokens = int(starts[-1])
    size_t, size_b = max(num_tokens or real_tokens, SMALLEST), num_requests or real_b
    assert size_t >= real_tokens, f"{real_tokens} tokens do not fit {size_t}"
    assert size_b >= real_b, f"{real_b} requests do not fit {size_b}"
    assert counts.min() > 0, "a request without tokens has no last row"

    owner = np.repeat(np.arange(real_b), counts)
    positions = np.arange(real_tokens) + (computed - starts[:-1])[owner]

    block_tables = np.zeros((num_groups, size_b, max_blocks), dtype=np.int32)
    block_tables[:, :real_b] = requests.block_tables
    slot_mapping = np.full((num_groups, size_t), PADDING_SLOT, dtype=np.int64)
    index, offset = np.divmod(positions, block_size)
    blocks = block_tables[:, owner, index].astype(np.int64)
    slot_mapping[:, :real_tokens] = blocks * block_size + offset

    seq_lens = np.zeros(size_b, dtype=np.int32)
    seq_lens[:real_b] = computed + counts
    query_start_loc = np.full(size_b + 1, real_tokens, dtype=np.int32)
    query_start_loc[: real_b + 1] = starts
    rows = requests.num_logits
    ends = np.cumsum(rows)
    wanted = np.arange(ends[-1]) + np.repeat(starts[1:] - ends, rows)
    size_r = max(num_logits or len(wanted), len(wanted), SMALLEST)
    return StepInputs(
        input_ids=_repeat_last(requests.token_ids, size_t),
        position_ids=_repeat_last(positions, size_t),
        slot_mapping=torch.from_numpy(slot_mapping),
        block_tables=torch.from_numpy(block_tables),
        seq_lens=torch.from_numpy(seq_lens),
        query_start_loc=torch.from_numpy(query_start_loc),
        logits_indices=_repeat_last(wanted, size_r),
        num_tokens=real_tokens,
        num_requests=real_b,
        num_logits=len(wanted),
    )


def _repeat_last(values: np.ndarray, size: int) -> torch.Tensor:
    padded = np.full(size, values[-1] if len(values) else 0, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
