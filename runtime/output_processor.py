"""Hands the executor's tokens to the requests that they belong to."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from inlay.errors import EngineError, RequestError
from inlay.runtime.detokenizer import DetokenizerFactory
from inlay.runtime.output_state import OutputState
from inlay.runtime.outputs import FinishReason, StepOutput
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class OutputProcessor:
    """The output state of every request that is under way. Thread-safe.

    on_stopped: called with (request id, index, or None for all of it) of what a stop string has
        ended, or a fault while its text was made: the executor may still run it.
    is_alive: whether the engine is; where not, an EngineError in an output is that of its end.
    max_queue_size: requests under way at once; None sets no limit.
    num_finished: requests by the finish reason of their first sequence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        on_stopped: Callable[[str, int | None], None] = lambda request_id, index: None,
        is_alive: Callable[[], bool] = lambda: True,
        max_queue_size: int | None = None,
    ) -> None:
        self.num_finished: Counter[FinishReason] = Counter()
        self._texts = DetokenizerFactory(tokenizer) if tokenizer is not None else None
        self._on_stopped, self._is_alive = on_stopped, is_alive
        self.max_queue_size = max_queue_size
        self._states: dict[str, OutputState] = {}
        # Guards the states' dict, and wakes who waits for room. A request's own lock is taken
        # before it, never behind it.
        self._room = threading.Condition()

    @property
    def num_unfinished(self) -> int:
        """Requests under way."""
        return len(self._states)

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        is_stream: bool = False,
        wait: bool = False,
        on_finish: Callable[[OutputState], None] = lambda state: None,
    ) -> OutputState:
        """Begin to follow a request.

        wait: block while max_queue_size requests are under way; else that raises RequestError.
        on_finish: called with the state, once, in whatever thread ends the request; it must not
            block.
        """

        def finish(state: OutputState) -> None:
            self._remove(state)
            on_finish(state)

        state = OutputState(
            request_id, prompt, prompt_token_ids, params, self._texts, is_stream, finish
        )
        with self._room:
            if wait:
                self._room.wait_for(lambda: not self._is_full)
            elif self._is_full:
                raise RequestError(
                    f"the engine is overloaded: {len(self._states)} requests are under way, and"
                    f" max_queue_size is {self.max_queue_size}; try again later, or raise it"
                )
            self._states[request_id] = state
        return state

    def process(self, outputs: Iterable[StepOutput]) -> None:
        """Take a step's outputs; those of requests that are over are dropped."""
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            if isinstance(output.error, EngineError) and not self._is_alive():
                state.engine_error = output.error
            try:
                is_stopped = state.append(output)
            except Exception as error:  # of a tokenizer: the fault is this request's alone
                state.end("error", error)
                is_stopped = True
            if is_stopped:
                self._on_stopped(state.request_id, None if state.finished else output.index)

    def abort(self, request_id: str) -> None:
        """End a request here, keeping what came; nothing happens if it is finished or unknown."""
        if state := self._states.get(request_id):
            state.end("abort")

    def fail_all(self, error: EngineError) -> None:
        """The engine is gone: end every request with the reason."""
        for state in list(self._states.values()):
            state.engine_error = error
            state.end("error", error)

    @property
    def _is_full(self) -> bool:
        limit = self.max_queue_size
        return limit is not None and len(self._states) >= limit

    def _remove(self, state: OutputState) -> None:
        reason = state.sequences[0].finish_reason
        assert reason is not None, f"request {state.request_id} is removed unfinished"
        with self._room:
            del self._states[state.request_id]
            self.num_finished[reason] += 1
            self._room.notify_all()
        if state.error is not None and state.engine_error is None:
            logger.error(
                "request %s failed: %s", state.request_id, state.error, exc_info=state.error
            )
