"""What one request has given so far, written by one thread and read by many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from inlay.errors import EngineError
from inlay.runtime.detokenizer import Detokenizer, DetokenizerFactory, StopStringMatcher
from inlay.runtime.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    StepOutput,
)
from inlay.runtime.sampling_params import SamplingParams

Delivered = list[int]
"""How many characters of each sequence a reader of a stream has seen; an empty list to begin."""


class SequenceState:
    """One of a request's sequences. It is the request that locks."""

    def __init__(
        self,
        params: SamplingParams,
        detokenizer: Detokenizer | None,
        texts: DetokenizerFactory | None,
    ) -> None:
        self._params, self._detokenizer, self._texts = params, detokenizer, texts
        self.matcher = StopStringMatcher(params.stop_strings, params.include_stop_str_in_output)
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def append(self, output: StepOutput) -> None:
        """Take a step's tokens one by one: none behind a stop string counts."""
        for place, token in enumerate(output.token_ids):
            self.token_ids.append(token)
            if output.logprobs:
                places = output.logprobs[place]
                self.logprobs.append(decoded(places, self._texts))
                self.cumulative_logprob = (self.cumulative_logprob or 0.0) + places[token].logprob
            is_stop = output.finish_reason == "stop" and place == len(output.token_ids) - 1
            if self._completes_a_stop(token, has_text=not is_stop):
                self.finish("stop", self.matcher.stop_reason)
                return
        if output.cumulative_logprob is not None:
            self.cumulative_logprob = output.cumulative_logprob
        if output.finish_reason is not None:
            self.finish(output.finish_reason, output.stop_reason)

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Nothing more will come: what was held back is text now."""
        text = "" if self._detokenizer is None else self._detokenizer.flush()
        if self.matcher.stop_reason is None and self._append(text):
            reason, stop_reason = "stop", self.matcher.stop_reason
        self.finish_reason, self.stop_reason = reason, stop_reason

    @property
    def text(self) -> str:
        """What may be shown; while it runs, without what may become a stop string."""
        text = self.matcher.text
        held = self.matcher.num_held if self.finish_reason is None else 0
        return text[: len(text) - held]

    def completion(self, index: int, num_delivered: int) -> CompletionOutput:
        """The sequence so far, for a reader who has seen so many characters."""
        text = self.text
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=text[num_delivered:],
            logprobs=None if self._params.logprobs is None else list(self.logprobs),
            cumulative_logprob=self.cumulative_logprob,
        )

    def _completes_a_stop(self, token: int, has_text: bool) -> bool:
        if self._detokenizer is None or not (has_text or self._params.include_stop_str_in_output):
            return False
        return self._append(self._detokenizer.append([token]))

    def _append(self, text: str) -> bool:
        """Whether a stop string is complete; none is within the first min_tokens."""
        if len(self.token_ids) <= self._params.min_tokens:
            self.matcher.skip(text)
            return False
        return self.matcher.append(text)


class OutputState:
    """All that one request has given. Thread-safe: its `condition` guards it.

    error: why it failed; engine_error: that it did because the engine is gone.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        texts: DetokenizerFactory | None,
        is_stream: bool,
        on_finish: Callable[[OutputState], None],
    ) -> None:
        """on_finish: called once, before anybody who waits is woken."""
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.prompt_token_ids = list(prompt_token_ids)
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []
        self.embedding: tuple[float, ...] | None = None
        self.error: BaseException | None = None
        self.engine_error: EngineError | None = None
        self.metrics = RequestMetrics(arrival_time=time.perf_counter())
        self.condition = threading.Condition()
        self._texts, self._is_stream, self._on_finish = texts, is_stream, on_finish
        self._listeners: list[Callable[[], None]] = []
        self._is_choice = params.use_beam_search or params.num_sequences > params.n
        # Of beams only those come that are given back.
        count = params.n if params.use_beam_search else params.num_sequences
        self.sequences = [self._new_sequence() for _ in range(count)]
        self.finished = False

    def append(self, output: StepOutput) -> bool:
        """Take a step's output; whether its sequence is finished by a stop string, which the
        executor does not know of. What ends a request otherwise than in its text ends all of it."""
        with self.condition:
            sequence = self.sequences[output.index]
            if self.finished or (sequence.finish_reason is not None and output.error is None):
                return False
            self._observe(output)
            if sequence.finish_reason is None:
                sequence.append(output)
            if output.error is not None or output.finish_reason == "error":
                self.error = output.error
                self._finish("error")
            elif output.finish_reason in ("abort", "timeout"):
                self._finish(output.finish_reason)
            elif all(one.finish_reason is not None for one in self.sequences):
                self._finish("stop")
            self._notify()
            return sequence.matcher.stop_reason is not None and not output.finished

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """End what is not finished yet; nothing happens if all of it is."""
        with self.condition:
            if not self.finished:
                self.error = error
                self._finish(reason)
                self._notify()

    def wait(self, is_ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Block until is_ready(), asked whenever something came; False after `timeout` seconds."""
        with self.condition:
            return self.condition.wait_for(is_ready, timeout)

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have a function called, in whatever thread, whenever something came."""
        with self.condition:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self.condition:
                self._listeners.remove(listener)

    def has_news(self, delivered: Delivered) -> bool:
        """Whether a reader of the stream, who has seen so much, is to be given a piece."""
        with self.condition:
            if self.finished or not self._is_stream or self._is_choice:
                return self.finished
            pairs = zip(self.sequences, self._filled(delivered), strict=True)
            return any(self._num_deliverable(sequence) > seen for sequence, seen in pairs)

    def snapshot(self, delivered: Delivered | None = None) -> RequestOutput:
        """The output so far; its deltas are what `delivered` lacks, which is brought up to date."""
        with self.condition:
            seen = self._filled([] if delivered is None else delivered)
            shown = self._chosen()
            completions = [one.completion(i, seen[i]) for i, one in enumerate(shown)]
            if delivered is not None:
                delivered[:] = [self._num_deliverable(one) for one in shown]
            wanted = self.params.prompt_logprobs is not None
            return RequestOutput(
                request_id=self.request_id,
                prompt=self.prompt,
                prompt_token_ids=self.prompt_token_ids,
                outputs=completions,
                finished=self.finished,
                metrics=self.metrics,
                prompt_logprobs=list(self.prompt_logprobs) if wanted else None,
                error=self.error,
            )

    def _new_sequence(self) -> SequenceState:
        if self._texts is None:
            return SequenceState(self.params, None, None)
        skip = self.params.skip_special_tokens
        return SequenceState(
            self.params, self._texts.make(self.prompt_token_ids, skip), self._texts
        )

    def _observe(self, output: StepOutput) -> None:
        """What concerns the request rather than one of its sequences."""
        metrics = self.metrics
        if output.scheduled_time is not None and metrics.scheduled_time is None:
            metrics = replace(metrics, scheduled_time=output.scheduled_time)
        if output.num_cached_tokens:
            metrics = replace(metrics, num_cached_tokens=output.num_cached_tokens)
        if output.token_ids and metrics.first_token_time is None:
            metrics = replace(metrics, first_token_time=time.perf_counter())
        self.metrics = metrics
        for places in output.prompt_logprobs:
            self.prompt_logprobs.append(None if places is None else decoded(places, self._texts))
        if output.embedding is not None:
            self.embedding = output.embedding

    def _finish(self, reason: FinishReason) -> None:
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.finish(reason)
        longest = max(len(sequence.token_ids) for sequence in self.sequences)
        now = time.perf_counter()
        self.metrics = replace(self.metrics, finish_time=now, num_output_tokens=longest)
        self.finished = True
        self._on_finish(self)

    def _notify(self) -> None:
        if self._is_stream or self.finished:
            self.condition.notify_all()
            for listener in self._listeners:
                listener()

    def _chosen(self) -> list[SequenceState]:
        if not self._is_choice:
            return self.sequences
        if not self.finished:
            return []
        if self.params.use_beam_search:
            return self.sequences
        ranked = sorted(self.sequences, key=_likelihood, reverse=True)
        return ranked[: self.params.n]

    def _num_deliverable(self, sequence: SequenceState) -> int:
        """What a stream counts: characters, or tokens where there is no text."""
        return len(sequence.token_ids) if self._texts is None else len(sequence.text)

    def _filled(self, delivered: Delivered) -> Delivered:
        return delivered or [0] * len(self.sequences)


def decoded(places: dict[int, Logprob], texts: DetokenizerFactory | None) -> dict[int, Logprob]:
    """Log probabilities by token with the tokens' texts."""
    if texts is None:
        return places
    return {token: replace(p, decoded_token=texts.text_of(token)) for token, p in places.items()}


def _likelihood(sequence: SequenceState) -> float:
    value = sequence.cumulative_logprob
    return float("-inf") if value is None else value
