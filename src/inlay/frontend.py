"""Between the API's threads and the executor's: requests in, handles out, nothing left behind."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from inlay.errors import EngineError
from inlay.handle import RequestHandle
from inlay.jobs import Job
from inlay.runtime.client import connect
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.output_processor import OutputProcessor
from inlay.runtime.output_state import OutputState
from inlay.runtime.request import NewRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHUT_DOWN = "the LLM was shut down; restart() starts its engine again, or make another LLM"


class _Word(Enum):
    """What the reaper is told, beside ids of requests to abort: its own end, or the engine's."""

    END = auto()
    CLOSE = auto()


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
        # What the client calls must not hold the client: it would never be collected.
        weak = weakref.proxy(self)
        self.processor = OutputProcessor(
            tokenizer,
            lambda request_id, index: weak.client.abort(request_id, index),
            lambda: weak.client.alive,
            max_queue_size,
        )
        self._is_closed = False
        self._changing = threading.Lock()
        self._request_ids = map(str, itertools.count())
        self.client = connect(
            engine,
            config,
            in_process=in_process,
            num_threads=num_threads,
            on_outputs=self.processor.process,
            on_death=self.processor.fail_all,
        )
        self._start_reaper()

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
        handle = RequestHandle(state, self.abort, self._words.put, owner)
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
        with self._changing:
            self.processor.fail_all(EngineError("the engine was restarted while this ran"))
            self.client.restart()
            if self._is_closed:
                self._start_reaper()
            self._is_closed = False

    def close(self) -> None:
        """End the executor; what is under way fails with EngineError."""
        with self._changing:
            if self._is_closed:
                return
            self._is_closed = True
            self.processor.fail_all(EngineError(SHUT_DOWN))
            self.client.close()
            reaper = self._reaper
            self._words.put(_Word.END)
        if threading.current_thread() is not reaper:
            reaper.join()  # it holds all of this, the engine too

    def close_soon(self) -> None:
        """Have it closed by another thread, for good."""
        self._words.put(_Word.CLOSE)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError(SHUT_DOWN)

    def _start_reaper(self) -> None:
        self._words: queue.SimpleQueue[str | _Word] = queue.SimpleQueue()
        self._reaper = threading.Thread(
            target=self._clear_away, args=(self._words,), name="inlay-reaper", daemon=True
        )
        self._reaper.start()

    def _clear_away(self, words: queue.SimpleQueue[str | _Word]) -> None:
        while isinstance(word := words.get(), str):
            self.abort(word)
        if word is _Word.CLOSE:
            self.close()
