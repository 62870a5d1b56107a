"""Who still waits for an answer: requests, by their unfinished sequences, and control calls."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from inlay.errors import EngineError, RequestError
from inlay.runtime.messages import Reply
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest

logger = logging.getLogger(__name__)


class Pending:
    """Requests that are still owed an output, by the indices of their unfinished sequences.

    A beam search gives all its sequences in one step, fewer than n where there are no more.
    """

    def __init__(self) -> None:
        self._unfinished: dict[str, set[int]] = {}
        self._searches: set[str] = set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._unfinished

    def __len__(self) -> int:
        return len(self._unfinished)

    def add(self, request: NewRequest) -> None:
        """From now on this request waits."""
        name, params = request.request_id, request.params
        if params.use_beam_search:
            self._searches.add(name)
        count = params.n if params.use_beam_search else params.num_sequences
        self._unfinished[name] = set(range(count))

    def settle(self, outputs: Sequence[StepOutput]) -> list[StepOutput]:
        """Take note of a step's outputs; those that are waited for."""
        wanted = [output for output in outputs if self._settle(output)]
        for name in {output.request_id for output in wanted if output.finished} & self._searches:
            self.drop(name)
        return wanted

    def _settle(self, output: StepOutput) -> bool:
        name = output.request_id
        if name not in self._unfinished:
            return False
        if output.error is not None:  # ends all sequences, one that has been aborted its bearer
            self.drop(name)
        elif output.index not in self._unfinished[name]:
            return False
        elif output.finished:
            self.drop(name, output.index)
        return True

    def drop(self, request_id: str, index: int | None = None) -> None:
        """A request, or one of its sequences, does not wait any more."""
        indices = self._unfinished.get(request_id, set())
        indices.discard(index) if index is not None else indices.clear()
        if not indices:
            self._unfinished.pop(request_id, None)
            self._searches.discard(request_id)

    def take_all(self) -> dict[str, list[int]]:
        """Unfinished indices by request id; afterwards nobody waits."""
        taken = {name: sorted(indices) for name, indices in self._unfinished.items()}
        self._unfinished.clear()
        self._searches.clear()
        return taken


class Ledger:
    """Hands outputs and replies to those who wait, each once, and tells them of the end.

    Thread-safe, but `deliver`, `reply` and `end` belong to one thread, in which the callbacks run.
    """

    def __init__(
        self,
        on_outputs: Callable[[list[StepOutput]], None],
        on_death: Callable[[EngineError], None],
    ) -> None:
        self._on_outputs, self._on_death = on_outputs, on_death
        # Garbage collection may close a client in the middle of anything: the lock is reentrant.
        self._lock = threading.RLock()
        self._pending = Pending()
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._over: EngineError | None = None
        self.closing = False

    @property
    def is_open(self) -> bool:
        """Whether requests and calls are taken."""
        return self._over is None and not self.closing

    def close(self) -> bool:
        """Take nothing new; False if that was so before."""
        with self._lock:
            was_open, self.closing = not self.closing, True
        return was_open

    def add(self, request: NewRequest) -> None:
        """Wait for a request's outputs; EngineError at the end of things, RequestError twice."""
        with self._lock:
            self.check_open()
            if request.request_id in self._pending:
                raise RequestError(f"request id {request.request_id!r} is in use; give another one")
            self._pending.add(request)

    def drop(self, request_id: str, index: int | None = None) -> None:
        """Wait no longer for a request, or for one of its sequences."""
        with self._lock:
            self._pending.drop(request_id, index)

    def open_call(self) -> tuple[int, Future[Any]]:
        """A number for a control call, and where its reply will be."""
        with self._lock:
            self.check_open()
            number, future = next(self._numbers), Future[Any]()
            self._calls[number] = future
        return number, future

    def deliver(self, outputs: Sequence[StepOutput]) -> None:
        """Hand over what is still waited for."""
        with self._lock:
            wanted = self._pending.settle(outputs)
        if wanted:
            _guarded(self._on_outputs, wanted)

    def drop_call(self, number: int) -> None:
        """Wait no longer for a reply."""
        with self._lock:
            self._calls.pop(number, None)

    def reply(self, reply: Reply) -> None:
        """Hand over what a control call gave, if somebody still waits for it."""
        with self._lock:
            future = self._calls.pop(reply.number, None)
        if future is None:
            return
        if reply.error is not None:
            future.set_exception(reply.error)
        else:
            future.set_result(reply.value)

    def end(self, error: EngineError | None) -> None:
        """Nothing more will come. error: of what the engine died; None: it was closed.

        Of a death each request that waits gets one output with the error, at its first unfinished
        index; of a close, each unfinished sequence one with finish_reason "abort".
        """
        over = error or EngineError("the engine was closed; restart() starts it again")
        with self._lock:
            self._over = over
            pending, calls = self._pending.take_all(), list(self._calls.values())
            self._calls.clear()
        if error is None:
            outputs = [
                StepOutput(name, finish_reason="abort", index=index)
                for name, indices in pending.items()
                for index in indices
            ]
        else:
            outputs = [
                StepOutput(name, finish_reason="error", error=error, index=indices[0])
                for name, indices in pending.items()
            ]
        for future in calls:
            future.set_exception(over)
        if outputs:
            _guarded(self._on_outputs, outputs)
        if error is not None:
            _guarded(self._on_death, error)

    def check_open(self) -> None:
        """EngineError, with the reason, where nothing is taken any more."""
        if self._over is not None:
            # Always a new one: an exception that is raised twice collects tracebacks.
            raise EngineError(str(self._over)) from self._over.__cause__
        if self.closing:
            raise EngineError("the engine was closed; restart() starts it again")


def _guarded(callback: Callable[[Any], None], argument: Any) -> None:
    """A callback that raises must not end the thread that all others wait for."""
    try:
        callback(argument)
    except BaseException:
        logger.exception("the callback %r failed", callback)
