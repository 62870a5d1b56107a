"""What comes out: of the executor each step, and of the API for each request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["length", "stop", "abort", "timeout", "error"]


@dataclass(frozen=True)
class Logprob:
    """logprob: natural logarithm of a token's probability. rank: 1 is the likeliest.
    decoded_token: its text; None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class StepOutput:
    """What one executor step gave one sequence of a request.

    index: which of the request's sequences, 0 to best_of - 1 (or beam_width - 1).
    token_ids: the newly sampled tokens; a token that ends the sequence is among them. Of beams
        all tokens come at once, at the end.
    finish_reason: None while the sequence goes on.
    stop_reason: the entry of stop_token_ids that was sampled; None for end of sequence.
    error: why the request failed (finish_reason "error"); it is over, its blocks are free.
    logprobs: for each of token_ids, where the request asked for them.
    cumulative_logprob: of the whole sequence so far, where the executor knows it (beams, best_of).
    prompt_logprobs: for prompt tokens in order, the first None, as chunks of the prompt are run.
    embedding: pooled hidden state, of a request that asked for one.
    num_cached_tokens: prompt tokens that came out of the prefix cache; with the first output.
    scheduled_time: when the request first ran, on the clock of time.perf_counter().
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: BaseException | None = None
    logprobs: tuple[dict[int, Logprob], ...] = ()
    index: int = 0
    cumulative_logprob: float | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] = ()
    embedding: tuple[float, ...] | None = None
    num_cached_tokens: int = 0
    scheduled_time: float | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the sequence's last output."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds on the clock of time.perf_counter().

    num_cached_tokens: prompt tokens that came out of the prefix cache.
    num_output_tokens: of the longest sequence.
    """

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Arrival to the first step that runs it, in seconds."""
        return None if self.scheduled_time is None else self.scheduled_time - self.arrival_time

    @property
    def prefill_time(self) -> float | None:
        """The first step that runs it to its first token, in seconds."""
        if self.first_token_time is None or self.scheduled_time is None:
            return None
        return self.first_token_time - self.scheduled_time

    @property
    def mean_itl(self) -> float | None:
        """Mean inter-token latency behind the first token, in seconds."""
        if self.finish_time is None or self.first_token_time is None or self.num_output_tokens < 2:
            return None
        return (self.finish_time - self.first_token_time) / (self.num_output_tokens - 1)

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2e_latency(self) -> float | None:
        """Arrival to finish, in seconds."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence, so far.

    index: its place among the request's outputs.
    text: all of the text, in whole characters; a stop string is cut off unless asked for. Empty
        without a tokenizer.
    token_ids: all generated ids, the one that ended the sequence included.
    finish_reason: "length" (max_tokens or max_seq_len), "stop", "abort", "timeout", "error" (see
        RequestOutput.error), or None: not finished. What came before an end of any kind is kept.
    stop_reason: the stop string or the entry of stop_token_ids that ended it; None otherwise.
    delta: what `text` gained since the previous output of the same stream.
    logprobs: for each of token_ids itself and the likeliest tokens there, by id, of the model's
        logits before penalties, temperature and truncation; None where not asked for.
    cumulative_logprob: the logarithm of all tokens' probability; None where neither logprobs nor a
        choice between sequences was asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    delta: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and what was generated for it.

    prompt: None where token ids were given.
    outputs: `n` of them; while the request runs none where the best are chosen at the end.
    prompt_logprobs: for each prompt token, None for the first; None where not asked for.
    error: why the request failed; None where it did not.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: BaseException | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came out of the prefix cache."""
        return self.metrics.num_cached_tokens


@dataclass(frozen=True)
class EmbeddingOutput:
    """A prompt's pooled hidden state; [] where the request failed."""

    embedding: list[float]


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding. prompt: None where token ids were given. error: why there is no
    embedding; None where there is one."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool
    metrics: RequestMetrics
    error: BaseException | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is to the model.

    prompt: None where token ids were given.
    logprobs: of each token given those before it; None for the first. [] where the request failed.
    error: why it did; None where it did not.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    logprobs: list[float | None]
    metrics: RequestMetrics
    error: BaseException | None = None

    @property
    def num_scored(self) -> int:
        """Tokens that have a log probability: all but the first."""
        return sum(value is not None for value in self.logprobs)

    @property
    def sum_logprob(self) -> float:
        """Logarithm of the probability of all tokens behind the first."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def mean_logprob(self) -> float:
        """Of a token; NaN where nothing was scored."""
        return self.sum_logprob / self.num_scored if self.num_scored else math.nan

    @property
    def perplexity(self) -> float:
        """exp(-mean_logprob)."""
        mean = self.mean_logprob
        return math.inf if mean < -700 else math.exp(-mean)
