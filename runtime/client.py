"""The API's side of the executor: in a process of its own, or in a thread of this one.

A worker process is reached through a socket pair, framed by multiprocessing's Connection. ZeroMQ
was weighed against it: a socket pair has no name on disk or network, so nobody else can connect and
nothing is left behind after a crash; and either end's death is an end-of-file that the kernel
reports at once, where ZeroMQ hides it behind reconnection and asks for heartbeats. Its gains, many
peers and many machines, are not needed between two processes.

A worker never outlives its client: it ends at the end-of-file, whatever it is doing.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Protocol

from inlay.errors import EngineError, OptionError
from inlay.runtime.ledger import Ledger
from inlay.runtime.messages import Abort, Add, Call, Message
from inlay.runtime.outputs import StepOutput
from inlay.runtime.process_link import ProcessLink
from inlay.runtime.request import NewRequest
from inlay.runtime.thread_link import ThreadLink

if TYPE_CHECKING:
    from inlay.runtime.admission import Admission
    from inlay.runtime.config import ExecutorConfig

CONTROLS = (
    "get_stats", "reset_prefix_cache", "pin_prefix", "unpin_prefix", "get_kv_events",
    "start_trace", "stop_trace",
)  # fmt: skip


class ExecutorClient(Protocol):
    """What the API talks to. Thread-safe; nothing blocks but call, close and restart."""

    admission: Admission
    """What to check requests against before they are submitted."""

    @property
    def alive(self) -> bool:
        """Whether requests are taken: False within a second of the worker's death, and closed."""

    def submit(self, request: NewRequest) -> None:
        """Run a request. Its outputs come to on_outputs, until each of its sequences is finished
        or one output with an error ends them all.

        Raises EngineError once dead or closed; RequestError where the id is in use or the request
        holds what cannot be sent.
        """

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences: no more outputs of it, and no answer. Nothing
        happens where it is finished or unknown, or the engine is dead."""

    def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Call one of CONTROLS between two steps; raises its error, EngineError if the engine is
        or becomes dead or closed, TimeoutError after `timeout` seconds."""

    def close(self) -> None:
        """End the worker; unfinished sequences get an output with finish_reason "abort". Again:
        nothing happens."""

    def restart(self) -> None:
        """Close, if need be, and start anew with the same arguments; raises as `connect` does."""


def connect(
    engine_or_model: Any,
    config: ExecutorConfig | None = None,
    *,
    in_process: bool,
    on_outputs: Callable[[list[StepOutput]], None],
    on_death: Callable[[EngineError], None],
    num_threads: int | None = None,
) -> ExecutorClient:
    """Load a model into an executor and wait until it is ready.

    engine_or_model: an engine (it has `path`, `backend` and `load_model`); in_process also any
        object with `load_model()`, or a LoadedModel.
    in_process: run it in a thread of this process, for debugging and for Python callables.
    on_outputs, on_death: called in a thread of the client's, one call at a time; they may submit
        and abort, but not `call`. They must not hold the client if it shall end when forgotten.
    num_threads: threads of the worker's OpenMP; None as `threads.thread_settings` says.

    Raises what loading raised, as its own class where that is one of inlay.errors; OptionError;
    EngineError where the worker died of loading.
    """
    if in_process:
        if num_threads is not None:
            raise OptionError(
                f"num_threads is for in_process=False; given {num_threads!r}: in this process"
                " torch.set_num_threads has the say"
            )
        return _Client(lambda: ThreadLink(engine_or_model, config, Ledger(on_outputs, on_death)))
    if not (hasattr(engine_or_model, "path") and hasattr(engine_or_model, "backend")):
        raise OptionError(
            f"a {type(engine_or_model).__name__} cannot be loaded by another process: give an"
            " Engine, which lies in a directory, or in_process=True"
        )
    return _Client(
        lambda: ProcessLink(engine_or_model, config, num_threads, Ledger(on_outputs, on_death))
    )


class Link(Protocol):
    """One life of an executor, as the client sees it.

    ledger: who waits for what. admission: there once the model is loaded. listener: the thread in
    which the callbacks run.
    """

    ledger: Ledger
    admission: Future[Admission]
    listener: threading.Thread

    def pack(self, message: Message) -> Any:
        """What `put` takes; RequestError where the message cannot cross."""

    def put(self, packed: Any) -> None:
        """Send; never blocks, and nothing happens where nobody listens any more."""

    def close(self) -> None:
        """End it; idempotent."""


class _Client:
    """An ExecutorClient over a link, which restart() replaces. Links do not know their client, so
    that one that is forgotten is collected and ends its worker."""

    def __init__(self, start: Callable[[], Link]) -> None:
        self._start = start
        self._owner = os.getpid()
        self._restarting = threading.Lock()
        self._link: Link | None = None
        self._finalizer: weakref.finalize | None = None
        self._num_closes = 0
        self.restart()

    @property
    def alive(self) -> bool:
        link = self._link
        if link is None or os.getpid() != self._owner:
            return False
        return link.admission.done() and link.ledger.is_open

    def submit(self, request: NewRequest) -> None:
        link = self._loaded_link()
        message = link.pack(Add(request))
        link.ledger.add(request)
        link.put(message)

    def abort(self, request_id: str, index: int | None = None) -> None:
        link = self._own_link()
        link.ledger.drop(request_id, index)
        link.put(link.pack(Abort(request_id, index)))

    def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method not in CONTROLS:
            raise OptionError(f"method must be one of {', '.join(CONTROLS)}; given {method!r}")
        link = self._loaded_link()
        if threading.current_thread() is link.listener:
            raise EngineError(f"{method}, called in a callback of its client, would wait for ever")
        number, reply = link.ledger.open_call()
        try:
            link.put(link.pack(Call(number, method, args)))
            return reply.result(timeout)
        except FutureTimeoutError:
            if reply.done():
                raise
            raise TimeoutError(f"{method} was not answered within {timeout} seconds") from None
        finally:
            link.ledger.drop_call(number)

    def close(self) -> None:
        if os.getpid() == self._owner:
            self._num_closes += 1
            if self._link is not None:
                self._link.close()

    def restart(self) -> None:
        self._check_owner()
        with self._restarting:
            num_closes = self._num_closes
            if self._link is not None:
                self._link.close()
            if self._finalizer is not None:
                self._finalizer.detach()
            link = self._link = self._start()
            self._finalizer = weakref.finalize(self, _close_at_home, link, self._owner)
            try:
                if self._num_closes != num_closes:
                    link.close()  # close() came between, and saw the one before
                self.admission = link.admission.result()
                link.ledger.check_open()
            except BaseException:
                link.close()
                raise

    def _check_owner(self) -> None:
        """EngineError in a forked child, which has neither the threads nor the worker."""
        if os.getpid() != self._owner:
            raise EngineError(
                f"this engine belongs to process {self._owner}, of which this one,"
                f" {os.getpid()}, is a fork: open the engine again here"
            )

    def _own_link(self) -> Link:
        self._check_owner()
        assert self._link is not None
        return self._link

    def _loaded_link(self) -> Link:
        link = self._own_link()
        if not link.admission.done():
            raise EngineError("the engine is restarting: wait until restart() has returned")
        return link


def _close_at_home(link: Link, owner: int) -> None:
    """A forked child that ends must not end its parent's worker."""
    if os.getpid() == owner:
        link.close()
