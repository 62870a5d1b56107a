"""`RequestHandle`: a request under way, to be waited for, read or ended, from threads and loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import suppress

from inlay.errors import EngineError
from inlay.runtime.output_state import Delivered, OutputState
from inlay.runtime.outputs import RequestOutput


class RequestHandle:
    """What `LLM.generate_async` gives.

    >>> handle = llm.generate_async("In short,", params, streaming=True)
    >>> for output in handle: print(output.outputs[0].delta, end="")
    >>> async for output in handle: ...     # the same in asyncio
    >>> handle.result(timeout=10)           # or, in asyncio: await handle

    Any number of threads and event loops may wait and read at once, each reader its own stream.
    Reading a handle without streaming gives one output, the last. A handle that nobody holds any
    more ends its request. What fails for the request's own reasons does not raise: see
    `RequestOutput.error`. EngineError is raised where the engine died or was shut down.
    """

    def __init__(
        self,
        state: OutputState,
        abort: Callable[[str], None],
        drop: Callable[[str], None],
        owner: object = None,
    ) -> None:
        """abort ends the request; drop has it ended soon and may be called at any point of any
        thread. owner: lives as long as this does."""
        self._state, self._abort, self._drop, self._owner = state, abort, drop, owner

    @property
    def request_id(self) -> str:
        """What `LLM.abort` takes."""
        return self._state.request_id

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._state.finished

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The finished output; TimeoutError after so many seconds, and the request goes on."""
        if not self._state.wait(lambda: self._state.finished, timeout):
            raise TimeoutError(
                f"request {self.request_id} has not finished within {timeout} seconds; it goes on:"
                " wait again, or abort() it"
            )
        return self._checked().snapshot()

    async def aresult(self) -> RequestOutput:
        """`result`, for asyncio."""
        await self._wait_in_loop(lambda: self._state.finished)
        return self._checked().snapshot()

    def abort(self) -> None:
        """End the request, keeping what has come; nothing happens if it is finished."""
        self._abort(self.request_id)

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Stream:
        return Stream(self)

    def __aiter__(self) -> Stream:
        return Stream(self)

    def __del__(self) -> None:
        if not self._state.finished:
            self._drop(self.request_id)

    def __repr__(self) -> str:
        return f"RequestHandle({self.request_id!r}, done={self.done})"

    def finished_state(self) -> OutputState:
        """Block until the request is finished; for outputs of other kinds."""
        self._state.wait(lambda: self._state.finished)
        return self._checked()

    def _checked(self) -> OutputState:
        error = self._state.engine_error
        if error is not None:
            # Always a new one: an exception that is raised twice collects tracebacks.
            raise EngineError(str(error)) from error
        return self._state

    async def _wait_in_loop(self, is_ready: Callable[[], bool]) -> None:
        """Wait without blocking the running event loop."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(woken.set)

        with self._state.listening(wake):
            while not is_ready():
                await woken.wait()
                woken.clear()


class Stream:
    """One reader's outputs of a request, each with the text that it has not seen yet."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._delivered: Delivered = []
        self._is_over = False

    def __iter__(self) -> Stream:
        return self

    def __aiter__(self) -> Stream:
        return self

    def __next__(self) -> RequestOutput:
        if self._is_over:
            raise StopIteration
        self._handle._state.wait(self._has_news)
        return self._read()

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        await self._handle._wait_in_loop(self._has_news)
        return self._read()

    def _has_news(self) -> bool:
        return self._handle._state.has_news(self._delivered)

    def _read(self) -> RequestOutput:
        self._is_over = True  # also where this raises
        output = self._handle._checked().snapshot(self._delivered)
        self._is_over = output.finished
        return output
