"""A request inside the executor, and what is asked of it at the door."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from numbers import Integral
from typing import Literal

from inlay.errors import RequestError
from inlay.runtime.outputs import FinishReason
from inlay.runtime.sampling_params import SamplingParams


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
        good = self.cache_salt is None or isinstance(self.cache_salt, str)
        _require(good, self, "cache_salt", "None or a string")
        is_int = isinstance(self.cache_priority, int) and not isinstance(self.cache_priority, bool)
        good = is_int and 0 <= self.cache_priority <= 100
        _require(good, self, "cache_priority", "an integer from 0 to 100")
        good = self.pooling in (None, "last", "mean", "cls")
        _require(good, self, "pooling", 'None, "last", "mean" or "cls"')
        _require(isinstance(self.normalize, bool), self, "normalize", "a bool")


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


class RequestState(Enum):
    """WAITING holds nothing; RUNNING holds a slot and blocks; FINISHED gave them back."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """One request, from arrival to finish.

    token_ids: the prompt and what was sampled so far.
    max_total_tokens: prompt and output together never exceed this.
    num_computed_tokens: how many of token_ids are in the KV cache.
    slot: its place in the block tables and the sampler's tensors while it runs, else -1.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    max_total_tokens: int
    num_computed_tokens: int = 0
    slot: int = -1
    state: RequestState = RequestState.WAITING
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt_tokens = len(self.token_ids)

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

    def append(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Take a sampled token; returns why this ends the request (or None), and the stop id."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.stop_token_ids:
            return "stop", token_id
        return ("length" if len(self.token_ids) >= self.max_total_tokens else None), None


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
