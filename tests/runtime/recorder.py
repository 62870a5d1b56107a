"""What a client hands out, kept and waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from inlay.errors import EngineError
from inlay.runtime.outputs import StepOutput


class Recorder:
    """on_outputs and on_death of a client under test."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.deaths: list[EngineError] = []
        self.threads: set[threading.Thread] = set()
        self._news = threading.Condition()

    def on_outputs(self, outputs: list[StepOutput]) -> None:
        with self._news:
            self.threads.add(threading.current_thread())
            self.outputs += outputs
            self._news.notify_all()

    def on_death(self, error: EngineError) -> None:
        with self._news:
            self.threads.add(threading.current_thread())
            self.deaths.append(error)
            self._news.notify_all()

    def of(self, request_id: str) -> list[StepOutput]:
        return [output for output in self.outputs if output.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.of(request_id) for token in output.token_ids]

    def last(self, request_id: str, timeout: float = 60) -> StepOutput:
        """Waits for the request's end; asserts that nothing came behind it."""
        self.wait_for(lambda: any(output.finished for output in self.of(request_id)), timeout)
        *before, last = self.of(request_id)
        assert not any(output.finished for output in before)
        return last

    def wait_for(self, is_so: Callable[[], bool], timeout: float = 60) -> float:
        """Returns the seconds that it took."""
        start = time.perf_counter()
        with self._news:
            assert self._news.wait_for(is_so, timeout), f"not within {timeout} s"
        return time.perf_counter() - start
