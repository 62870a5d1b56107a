"""Between the API's threads and the executor's: requests in, handles out, nothing left behind."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inlay.errors import EngineError
from inlay.handle import RequestHandle
from inlay.jobs import Job
from inlay.runtime.client import connect
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.output_processor import OutputProcessor
from inlay.runtime.output_state import OutputState
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHUT_DOWN = "the LLM was shut down; restart() starts its engine again, or make another LLM"


class Frontend:
    """The requests of one engine. Thread-safe.

    It does not hold its LLM and handles, which are its users: `close_soon` and `drop` are for
    their finalizers, which garbage collection may run in the middle of anything. So they only
    leave word for a thread that does it.
    """

    def __init__(
        self,
        engine: Any,
        config: ExecutorConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        in_process: bool,
        num_threads: int | None,
        max_queue_size: int | None,
    ) -> None:
        """Starts the executor; raises what `connect` does."""
        self.processor = OutputProcessor(
            tokenizer,
            lambda request_id, index: self.client.abort(request_id, index),
            lambda: self.client.alive,
            max_queue_size,
        )
        self._is_closed = False
        self._request_ids = map(str, itertools.count())
        self._left: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.client = connect(
            engine,
            config,
            in_process=in_process,
            num_threads=num_threads,
            on_outputs=self._process,
            on_death=self.processor.fail_all,
        )
        threading.Thread(target=self._clear_away, name="inlay-reaper", daemon=True).start()

    def submit(
        self,
        job: Job,
        owner: object,
        *,
        streaming: bool = False,
        wait: bool = False,
        on_finish: Callable[[OutputState], None] = lambda state: None,
    ) -> RequestHandle:
        """Queue a job.

        owner: lives as long as the handle. wait: block while too many are under way, instead of
        RequestError. on_finish: see `OutputProcessor.add`. Raises EngineError where the engine is
        dead or closed.
        """
        request_id = next(self._request_ids)
        state = self.processor.add(
            request_id,
            job.text,
            job.token_ids,
            job.params,
            is_stream=streaming,
            wait=wait,
            on_finish=on_finish,
        )
        handle = RequestHandle(state, self.abort, self._left.put, owner)
        try:
            self._check_open()
            self.client.submit(NewRequest(request_id, job.token_ids, job.params, job.options))
        except BaseException:
            self.processor.abort(request_id)
            raise
        return handle

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it is finished or unknown."""
        self.processor.abort(request_id)
        if not self._is_closed:
            self.client.abort(request_id)

    def call(self, method: str, *args: Any) -> Any:
        """Call a control method of the executor; EngineError where it is dead or closed."""
        self._check_open()
        return self.client.call(method, *args)

    def restart(self) -> None:
        """Start the engine anew; what is under way fails."""
        self.processor.fail_all(EngineError("the engine was restarted while this ran"))
        self.client.restart()
        self._is_closed = False

    def close(self) -> None:
        """End the executor; what is under way fails with EngineError."""
        self._is_closed = True
        self.processor.fail_all(EngineError(SHUT_DOWN))
        self.client.close()

    def close_soon(self) -> None:
        """Have it closed by another thread, for good."""
        self._left.put(None)

    def _process(self, outputs: list[StepOutput]) -> None:
        self.processor.process(outputs)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError(SHUT_DOWN)

    def _clear_away(self) -> None:
        while (request_id := self._left.get()) is not None:
            self.abort(request_id)
        self.close()
