"""Turns the executor's tokens into the text and the outputs that users see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from inlay.errors import RequestError
from inlay.runtime.detokenizer import Detokenizer, StopStringMatcher, special_token_ids
from inlay.runtime.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    StepOutput,
)
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class OutputState:
    """What one request has given so far; `error` is set when its step failed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    matcher: StopStringMatcher
    detokenizer: Detokenizer | None
    metrics: RequestMetrics
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: BaseException | None = None
    _num_delivered: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def append(self, output: StepOutput) -> None:
        """Take a step's tokens; a stop string in their text finishes the request."""
        now = time.perf_counter()
        if output.token_ids and self.metrics.first_token_time is None:
            self.metrics = replace(self.metrics, first_token_time=now)
        self.token_ids += output.token_ids
        self.logprobs += [self._decoded(places) for places in output.logprobs]
        self.error = output.error
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if self._append_text(output):
            self.finish_reason, self.stop_reason = "stop", self.matcher.stop_reason
        if self.finished:
            self.metrics = replace(self.metrics, finish_time=now)

    def snapshot(self) -> RequestOutput:
        """The output so far; its delta is what came since the last snapshot."""
        text = self.matcher.text
        if not self.finished:
            text = text[: len(text) - self.matcher.num_held]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=text[self._num_delivered :],
            logprobs=None if self.params.logprobs is None else list(self.logprobs),
        )
        self._num_delivered = len(text)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion],
            finished=self.finished,
            metrics=self.metrics,
        )

    def _decoded(self, places: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.detokenizer is None:
            return places
        text_of = self.detokenizer.text_of
        return {token: replace(p, decoded_token=text_of(token)) for token, p in places.items()}

    def _append_text(self, output: StepOutput) -> bool:
        """Whether the text now holds a stop string."""
        if self.detokenizer is None:
            return False
        token_ids = output.token_ids
        if output.finish_reason == "stop" and not self.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        text = self.detokenizer.append(token_ids)
        if output.finished:
            text += self.detokenizer.flush()
        return self.matcher.append(text)


class OutputProcessor:
    """The output state of every request that is under way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._special = special_token_ids(tokenizer) if tokenizer is not None else frozenset()
        self._states: dict[str, OutputState] = {}

    def check_params(self, params: SamplingParams) -> None:
        """RequestError where the parameters need text and there is no tokenizer."""
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                f"stop={list(params.stop_strings)!r} needs a tokenizer, and the engine has none:"
                " give LLM(tokenizer=...), or use stop_token_ids"
            )

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
    ) -> OutputState:
        """Begin to follow a request."""
        detokenizer = None
        if self.tokenizer is not None:
            skipped = self._special if params.skip_special_tokens else frozenset()
            detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, skipped)
        state = OutputState(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            matcher=StopStringMatcher(params.stop_strings, params.include_stop_str_in_output),
            detokenizer=detokenizer,
            metrics=RequestMetrics(arrival_time=time.perf_counter()),
        )
        self._states[request_id] = state
        return state

    def process(self, outputs: Iterable[StepOutput]) -> list[OutputState]:
        """Take a step's outputs; returns the states they changed.

        A finished one may still run in the executor, its stop string having come: abort it there.
        """
        changed = []
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            state.append(output)
            changed.append(state)
            if state.finished:
                del self._states[output.request_id]
        return changed

    def abort(self, request_id: str) -> None:
        """End a request here; a state somebody still holds says "abort"."""
        state = self._states.pop(request_id, None)
        if state is not None:
            state.append(StepOutput(request_id, finish_reason="abort"))
