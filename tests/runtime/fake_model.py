"""A LoadedModel whose logits say exactly which tokens a request has, as its paged cache holds them.

Every token of the history, its position and each KV group's window go into the logits. A wrong
slot, block table, position or chunk boundary therefore changes what is sampled.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.backends.kv_caches import blocks_of_groups
from inlay.backends.step import PADDING_SLOT, StepInputs
from inlay.runtime.executor import Executor
from inlay.runtime.sampler import NO_TOKEN, Sampler
from inlay.runtime.sampling_params import SamplingParams

WINDOWS = (0, 5)
VOCAB_SIZE = 97
LIMITS = ModelLimits(
    vocab_size=VOCAB_SIZE, max_seq_len=64, max_num_tokens=24, max_num_seqs=6, block_size=4
)
_TABLES = np.random.default_rng(0).normal(0, 2, (2, 1021, 5000)).astype(np.float32)


def logits_of(cached: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Logits float32 [vocab] of a history: for each group the (token, position) pairs in view."""
    digest = zlib.crc32(b"|".join(np.ascontiguousarray(pairs).tobytes() for pairs in cached))
    rows = _TABLES[0, digest % 1021] + _TABLES[1, digest // 1021 % 1021]
    return rows[:vocab_size]


def view(pairs: np.ndarray, window: int) -> np.ndarray:
    """What a layer of this window sees of a history [tokens, 2]."""
    return pairs[-window:] if window else pairs


class FakeModel:
    """Stores (token, position) by slot_mapping; reads them back through block_tables."""

    def __init__(
        self, limits: ModelLimits = LIMITS, windows: Sequence[int] = WINDOWS, eos: int | None = None
    ) -> None:
        self.is_encoder = False
        self.limits = limits
        self.windows = windows
        self.kv_groups = self.kv_groups_for(None)
        self.device = torch.device("cpu")
        self.eos = eos
        self.steps: list[StepInputs] = []
        self.before_forward: Callable[[int], None] = lambda step_number: None
        self._caches: list[np.ndarray] = []

    def kv_groups_for(self, dtype: str | None) -> tuple[KVGroup, ...]:
        return tuple(KVGroup(window, 1, 16 * self.limits.block_size) for window in self.windows)

    def allocate_kv_cache(self, num_blocks: int | Sequence[int], dtype: str | None = None) -> None:
        sizes = blocks_of_groups(num_blocks, len(self.kv_groups))
        self._caches = [np.full((n * self.limits.block_size, 2), -1) for n in sizes]

    def kv_tensors(self, group: int) -> list[torch.Tensor]:
        """[blocks, block_size, 2], shared with the cache."""
        return [torch.from_numpy(self._caches[group]).unflatten(0, (-1, self.limits.block_size))]

    def make_batch_invariant(self) -> None:
        """It is so anyway."""

    def forward(self, step: StepInputs) -> torch.Tensor:
        return self.forward_hidden(step)[0]

    def forward_pieces(self, step: StepInputs) -> torch.Tensor:
        return self.forward(step)

    def forward_hidden(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and hidden states [T, 2]: each row is its token and position."""
        self.steps.append(step)
        self.before_forward(len(self.steps))
        self._check_padding(step)
        pairs = torch.stack([step.input_ids, step.position_ids], dim=-1).numpy()
        for group, slots in enumerate(step.slot_mapping.numpy()):
            written = slots != PADDING_SLOT
            self._caches[group][slots[written]] = pairs[written]
        # Padding rows are poison: whoever reads one notices.
        logits = torch.full((len(step.logits_indices), self.limits.vocab_size), torch.nan)
        num_requests = int((step.seq_lens > 0).sum())
        is_blank = not int(step.query_start_loc[-1])
        is_decode = step.num_tokens == step.num_requests
        num_logits = num_requests if is_decode or is_blank else step.num_logits
        for row, index in enumerate(step.logits_indices[:num_logits].tolist()):
            logits[row] = torch.from_numpy(self._logits_at(step, index))
        return logits, torch.from_numpy(pairs).float()

    def _logits_at(self, step: StepInputs, index: int) -> np.ndarray:
        request = int(np.searchsorted(step.query_start_loc.numpy(), index, side="right")) - 1
        behind = int(step.query_start_loc[request + 1]) - 1 - index
        size, block_size = int(step.seq_lens[request]) - behind, self.limits.block_size
        cached = []
        for group, config in enumerate(self.kv_groups):
            blocks = step.block_tables[group, request].numpy().astype(np.int64)
            positions = np.arange(size)
            slots = blocks[positions // block_size] * block_size + positions % block_size
            cached.append(view(self._caches[group][slots], config.window))
        logits = logits_of(cached, self.limits.vocab_size).copy()
        if self.eos is not None:
            logits[self.eos] += 3
        return logits

    def _check_padding(self, step: StepInputs) -> None:
        assert step.input_ids.shape[0] <= max(self.limits.max_num_tokens, 2)
        assert min(step.input_ids.shape[0], step.logits_indices.shape[0]) >= 2
        assert step.seq_lens.shape[0] <= self.limits.max_num_seqs
        # A captured step has the numbers that it was captured with: of padding and all.
        num_tokens = int(step.query_start_loc[-1])
        assert step.num_tokens in (num_tokens, len(step.input_ids))
        assert (step.slot_mapping[:, num_tokens:] == PADDING_SLOT).all()
        live = step.slot_mapping[:, :num_tokens]
        assert (live != PADDING_SLOT).all()
        assert all(len(set(slots.tolist())) == len(slots) for slots in live), "two tokens, one slot"


def processed(
    logits: np.ndarray,
    tokens: Sequence[int],
    num_prompt: int,
    params: SamplingParams,
    ends: set[int],
) -> np.ndarray:
    """Penalties, biases and bans as their definitions have them, token by token."""
    output, logits = list(tokens[num_prompt:]), logits.copy()
    for token in set(tokens):
        factor = np.float32(params.repetition_penalty)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= np.float32(params.frequency_penalty) * output.count(token)
        logits[token] -= np.float32(params.presence_penalty)
    for token, value in params.bias.items():
        logits[token] += np.float32(value)
    if params.allowed_token_ids is not None:
        logits[[t for t in range(len(logits)) if t not in params.allowed_token_ids]] = -np.inf
    if len(output) < params.min_tokens:
        logits[list(ends)] = -np.inf
    for *before, last in params.bad_words_ids or ():
        if list(tokens[len(tokens) - len(before) :]) == before:
            logits[last] = -np.inf
    if size := params.no_repeat_ngram_size:
        recent = tuple(tokens[len(tokens) - size + 1 :])
        for start in range(len(tokens) - size + 1):
            if tuple(tokens[start : start + size - 1]) == recent:
                logits[tokens[start + size - 1]] = -np.inf
    return logits


def history_logits(model: FakeModel, tokens: Sequence[int]) -> torch.Tensor:
    """The logits [vocab] behind a history, without any cache."""
    pairs = np.array(list(zip(tokens, range(len(tokens)), strict=True)), dtype=np.int64)
    logits = logits_of([view(pairs, group.window) for group in model.kv_groups], VOCAB_SIZE).copy()
    if model.eos is not None:
        logits[model.eos] += 3
    return torch.from_numpy(logits)


def generate_alone(
    model: FakeModel, prompt: Sequence[int], params: SamplingParams, max_seq_len: int
) -> tuple[list[int], str]:
    """The oracle: one request by itself, without cache, blocks, slots or chunks."""
    sampler = Sampler(1, torch.device("cpu"))
    sampler.set_slot(0, params, params.seed or 0)
    tokens = list(prompt)
    most = max_seq_len if params.max_tokens is None else len(prompt) + params.max_tokens
    while True:
        pairs = np.array(list(zip(tokens, range(len(tokens)), strict=True)), dtype=np.int64)
        cached = [view(pairs, group.window) for group in model.kv_groups]
        logits = logits_of(cached, model.limits.vocab_size).copy()
        if model.eos is not None:
            logits[model.eos] += 3
        ends = set(params.stop_token_ids or ())
        if model.eos is not None and not params.ignore_eos:
            ends.add(model.eos)
        logits = processed(logits, tokens, len(prompt), params, ends)
        rows, positions = np.array([0]), np.array([len(tokens)])
        token = int(sampler.sample(torch.from_numpy(logits)[None], rows, positions))
        if token == NO_TOKEN:
            return tokens[len(prompt) :], "error"
        tokens.append(token)
        if tokens[-1] in ends:
            return tokens[len(prompt) :], "stop"
        if len(tokens) >= min(most, max_seq_len):
            return tokens[len(prompt) :], "length"


def run_all(executor: Executor) -> dict[str, tuple[list[int], str | None]]:
    """Step until nothing is left: each request's tokens and finish reason."""
    results: dict[str, tuple[list[int], str | None]] = {}
    while executor.has_unfinished:
        for output in executor.step():
            tokens, _ = results.get(output.request_id, ([], None))
            reason = "error" if output.error is not None else output.finish_reason
            results[output.request_id] = ([*tokens, *output.token_ids], reason)
    return results


def assert_nothing_held(executor: Executor) -> None:
    """Every block and slot is free again, and nobody is known any more."""
    executor.scheduler.check()
    assert executor.kv_cache.num_used_blocks == 0
    assert all(pool.num_free == pool.num_blocks for pool in executor.kv_cache.pools)
    assert not executor.scheduler.running
    assert not executor.scheduler.waiting
    assert not executor._sequences
    assert not executor._in_flight
