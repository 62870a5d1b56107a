"""A request inside the executor, and what is asked of it at the door."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from inlay.errors import RequestError
from inlay.runtime.block_pool import BlockHash, block_names
from inlay.runtime.outputs import FinishReason
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from inlay.runtime.beams import Beams


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request asks of the runtime rather than of the model.

    priority: lower runs first (as in vLLM), in [-2**31, 2**31).
    timeout: seconds from arrival after which it ends with finish_reason "timeout"; None is never.
    cache_salt: requests share cached prefixes only with those of the same salt.
    cache_priority: cached blocks of higher ones are evicted later, 0 to 100.
    pooling: None generates; "last", "mean" or "cls" give the pooled hidden state instead.
    normalize: whether an embedding is divided by its length.
    """

    priority: int = 0
    timeout: float | None = None
    cache_salt: str | None = None
    cache_priority: int = 0
    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError where a value is not allowed."""
        is_int = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        _require(is_int and -(2**31) <= self.priority < 2**31, self, "priority", "an integer")
        is_number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        good = self.timeout is None or (is_number and 0 < self.timeout < math.inf)
        _require(good, self, "timeout", "None or seconds > 0")
        good = self.cache_salt is None or _is_text(self.cache_salt)
        good = good and self.cache_salt != ""  # which an id that is missing would be
        _require(good, self, "cache_salt", "None or a string that UTF-8 can encode, not empty")
        is_int = isinstance(self.cache_priority, int) and not isinstance(self.cache_priority, bool)
        good = is_int and 0 <= self.cache_priority <= 100
        _require(good, self, "cache_priority", "an integer from 0 to 100")
        good = self.pooling in (None, "last", "mean", "cls")
        _require(good, self, "pooling", 'None, "last", "mean" or "cls"')
        _require(isinstance(self.normalize, bool), self, "normalize", "a bool")


def _is_text(value: object) -> bool:
    """Whether it is a string without surrogates, which JSON's escapes can bring in."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _require(good: bool, options: RequestOptions, name: str, allowed: str) -> None:
    if not good:
        raise RequestError(f"{name} must be {allowed}; given {getattr(options, name)!r}")


@dataclass(frozen=True)
class NewRequest:
    """A request on its way to the executor: checked, in plain data.

    token_ids: the prompt, as `Admission.check` gave it back.
    arrival_time: on the clock of time.perf_counter().
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    options: RequestOptions = RequestOptions()
    arrival_time: float = field(default_factory=time.perf_counter)


UNKNOWN_TOKEN = -1
"""Stands in token_ids for a token that was sampled, and that the host has not read yet."""


class RequestState(Enum):
    """WAITING and UNFORKED hold nothing; RUNNING holds a slot and blocks; FINISHED gave them back.

    UNFORKED: one of several sequences, whose prompt another one runs.
    """

    WAITING = auto()
    UNFORKED = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """One sequence, from arrival to finish; a request of n > 1 has several.

    token_ids: the prompt and what was sampled so far, UNKNOWN_TOKEN where that is under way.
    max_total_tokens: prompt and output together never exceed this.
    index: which of its request's sequences.
    siblings: sequences that will be forked off when the prompt has been run.
    beams: the search that this sequence is a beam of.
    order: a number that grows with arrival.
    num_computed_tokens: how many of token_ids are in the KV cache, or will be after the steps that
        are under way.
    num_pending: tokens that are being sampled.
    epoch: goes up when the sequence loses its place, so that late results are known as such.
    slot: its place in the block tables and the sampler's tensors while it runs, else -1.
    is_aged: it waited too long, and goes before all others from when it runs.
    block_names, num_committed: hashes of its full blocks, and how many of those others may use.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    max_total_tokens: int
    options: RequestOptions = RequestOptions()
    arrival_time: float = 0.0
    index: int = 0
    siblings: list[Request] = field(default_factory=list)
    beams: Beams | None = None
    order: int = 0
    num_computed_tokens: int = 0
    num_pending: int = 0
    epoch: int = 0
    slot: int = -1
    state: RequestState = RequestState.WAITING
    block_names: list[BlockHash] = field(default_factory=list)
    num_committed: int = 0
    num_cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    cumulative_logprob: float = 0.0
    pooled: torch.Tensor | None = None
    waiting_since: int = 0
    is_aged: bool = False
    scheduled_time: float | None = None
    was_heard_of: bool = False
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def rank(self) -> tuple[float, int]:
        """Whose turn comes first: the lowest."""
        return (-math.inf if self.is_aged else self.options.priority), self.order

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host has read."""
        return len(self.token_ids) - self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens the next steps have to run; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to run is the token sampled last."""
        return len(self.token_ids) > self.num_prompt_tokens and self.num_uncomputed_tokens == 1

    @property
    def needs_history(self) -> bool:
        """Whether its next token cannot be sampled before the host has seen the last."""
        params = self.params
        return bool(
            params.no_repeat_ngram_size
            or params.logits_processors
            or params.use_beam_search
            or any(len(word) > 1 for word in params.bad_words_ids or ())
        )

    @property
    def can_run(self) -> bool:
        """Whether there is something to run that does not wait for a result."""
        if self.num_pending and (self.needs_history or self.beams is not None):
            return False
        if self.num_uncomputed_tokens == 0:
            return False
        return self.options.pooling is not None or len(self.token_ids) < self.max_total_tokens

    @property
    def wants_all_rows(self) -> bool:
        """Whether results are wanted for every prompt token, so that none may be skipped."""
        return self.params.prompt_logprobs is not None or self.options.pooling in ("mean", "cls")

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the next tokens to run are the prompt's, and their logits are wanted."""
        within = self.num_computed_tokens < self.num_prompt_tokens
        return within and self.params.prompt_logprobs is not None

    def accept(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Take the first token that is pending; why this ends the sequence (or None), the stop id.

        Tokens still pending behind one that ends the sequence are dropped.
        """
        assert self.num_pending, "no token is awaited"
        self.token_ids[-self.num_pending] = token_id
        self.num_pending -= 1
        reason, stop = self._end(token_id)
        if reason is not None:
            self.drop_pending()
        return reason, stop

    def drop_pending(self) -> None:
        """Forget tokens whose results will not be taken."""
        del self.token_ids[len(self.token_ids) - self.num_pending :]
        self.num_pending = 0

    def _end(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.stop_token_ids:
            return "stop", token_id
        return ("length" if self.num_known_tokens >= self.max_total_tokens else None), None

    def name_blocks(self, block_size: int) -> list[BlockHash]:
        """Hashes of all blocks that are full of known tokens."""
        known = self.token_ids
        if self.num_pending:
            known = known[: self.num_known_tokens]
        return block_names(self.block_names, known, block_size, self.options.cache_salt)


def make_sequences(
    new: NewRequest,
    token_ids: Sequence[int],
    *,
    order: int,
    seed: int,
    eos_token_ids: Sequence[int],
    padding_token: int | None,
    max_total_tokens: int,
) -> list[Request]:
    """A request's sequences; the first one runs the prompt for all.

    Each has a seed of its own. padding_token: one behind which the model's positions would be
    others, so that it ends a sequence.
    """
    params = new.params
    stops = set(params.stop_token_ids or ())
    if padding_token is not None:
        stops.add(padding_token)
    family = [
        Request(
            request_id=new.request_id,
            token_ids=list(token_ids),
            params=params,
            seed=(seed + index) % 2**64,
            stop_token_ids=frozenset(stops),
            eos_token_ids=frozenset(() if params.ignore_eos else eos_token_ids),
            max_total_tokens=max_total_tokens,
            options=new.options,
            arrival_time=new.arrival_time,
            index=index,
            order=order,
            state=RequestState.UNFORKED if index else RequestState.WAITING,
        )
        for index in range(params.num_sequences if new.options.pooling is None else 1)
    ]
    family[0].siblings = family[1:]
    return family


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_seq_len: int) -> list[int]:
    """The prompt as a list of ints; RequestError if it is empty, too long or not of this model."""
    if len(token_ids) == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if len(token_ids) >= max_seq_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens; the engine's max_seq_len is {max_seq_len},"
            f" prompt and output together, so at most {max_seq_len - 1} fit: shorten the prompt,"
            " or build the engine with a larger max_seq_len"
        )
    check_vocabulary("prompt token ids", token_ids, vocab_size)
    return [int(i) for i in token_ids]


def check_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """RequestError that names the first id that is no integer in [0, vocab_size)."""
    for position, token_id in enumerate(ids):
        is_int = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not is_int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} must be integers in [0, {vocab_size}), the model's vocabulary;"
                f" given {token_id!r} at position {position}"
            )
