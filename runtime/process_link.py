"""The way to an executor in a process of its own: a socket pair, and two threads at our end."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from inlay.backends.python_process import SET_PATH, path_argument
from inlay.errors import EngineError, OptionError, RequestError
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.ledger import Ledger
from inlay.runtime.messages import (
    Failed,
    Init,
    Message,
    Outputs,
    Ready,
    Reply,
    Stop,
    decode,
    encode,
)
from inlay.runtime.threads import thread_settings

if TYPE_CHECKING:
    from inlay.runtime.admission import Admission

logger = logging.getLogger(__name__)

GRACE = 2.0
"""Seconds that a worker is given to end its step, and then to obey SIGTERM."""

BOOTSTRAP = f"""{SET_PATH}
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from inlay.runtime.worker import main
main(int(sys.argv[1]))
"""
"""Of multiprocessing's ways none is taken: they would run the user's main module again."""


class ProcessLink:
    """A Link (see client.py) to runtime/worker.py in a new process."""

    def __init__(
        self, engine: Any, config: ExecutorConfig | None, num_threads: int | None, ledger: Ledger
    ) -> None:
        """Start the process; `admission` has a result, or the error, once it has loaded."""
        first = _init_frame(engine, config)
        self.ledger = ledger
        self.admission: Future[Admission] = Future()
        self._fatal: BaseException | None = None
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs.fileno(), num_threads)
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._pidfd = _open_pidfd(self._process.pid)
        _links.add(self)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.put(first)
        self.listener = threading.Thread(target=self._listen, name="inlay-client", daemon=True)
        self._sender = threading.Thread(target=self._send, name="inlay-sender", daemon=True)
        self.listener.start()
        self._sender.start()

    def pack(self, message: Message) -> bytes:
        """In the caller's thread, so that it gets the error of what cannot be sent."""
        return encode(message)

    def put(self, frame: bytes) -> None:
        self._outbox.put(frame)

    def close(self) -> None:
        """Ask the worker to stop, then tell it, then end it; at once while it still loads."""
        self.ledger.close()
        if self.admission.done():
            self.put(encode(Stop()))
        if not (self.admission.done() and self._has_ended(GRACE)):
            self._process.terminate()
            if not self._has_ended(GRACE):
                self._process.kill()
        # Garbage collection, and with it this, may happen in these threads as well.
        if threading.current_thread() not in (self.listener, self._sender):
            self.listener.join()

    def let_go(self) -> None:
        """In a forked child: hold no end of the pair, so that the parent's death is noticed."""
        self._socket.close()
        self._connection.close()

    def _has_ended(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _send(self) -> None:
        """The sender's thread: it may block where `put` must not."""
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(frame)
            except OSError:  # the worker is dead: the listener sees to it
                return

    def _listen(self) -> None:
        """The listener's thread: hands out what comes until the worker is dead."""
        try:
            while (frame := self._receive()) is not None:
                self._take(decode(frame))
        except BaseException as error:
            logger.exception("a message of the engine's process cannot be read")
            self._fatal = error
        self._bury()

    def _receive(self) -> bytes | None:
        """The next frame; None when the worker is dead and all that it sent was taken.

        Beside the socket its pidfd is waited for: somebody's forked child may hold the other end.
        """
        sources: list[Any] = [self._connection, *([] if self._pidfd is None else [self._pidfd])]
        try:
            if self._connection in wait(sources) or self._connection.poll():
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            pass  # the other end is gone, which is what the caller is told
        return None

    def _take(self, message: Message) -> None:
        if isinstance(message, Outputs):
            self.ledger.deliver(message.outputs)
        elif isinstance(message, Reply):
            self.ledger.reply(message)
        elif isinstance(message, Ready):
            self.admission.set_result(message.admission)
        elif isinstance(message, Failed):
            self._fatal = message.error

    def _bury(self) -> None:
        """Give everything back, then tell all who wait."""
        if not self._has_ended(0.5):
            self._process.kill()
            self._process.wait()
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the sender, should it be blocked
        self._outbox.put(None)
        self._sender.join()
        self._connection.close()
        self._socket.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        if self.admission.done():
            self.ledger.end(None if self.ledger.closing else self._cause_of_death())
            return
        error = self._cause_of_death()
        self.ledger.end(None)
        self.admission.set_exception(
            EngineError("the engine was closed while it was loading")
            if self.ledger.closing
            else self._fatal or error
        )

    def _cause_of_death(self) -> EngineError:
        code, fatal = self._process.returncode, self._fatal
        if fatal is not None:
            how = f"{type(fatal).__name__}: {fatal}"
        elif code < 0:
            known = -code in set(signal.Signals)  # most real-time signals have no name
            how = f"killed by signal {-code}" + (
                f" ({signal.Signals(-code).name})" if known else ""
            )
            if -code == signal.SIGKILL:
                how += ", as the system does when memory runs out"
        else:
            how = f"it exited with status {code}; its last words are on stderr"
        error = EngineError(f"the engine's process died: {how}; restart() starts a new one")
        error.__cause__ = fatal
        return error


_links: weakref.WeakSet[ProcessLink] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for link in list(_links):
        link.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)


def _init_frame(engine: Any, config: ExecutorConfig | None) -> bytes:
    config = config or ExecutorConfig()
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    try:
        return encode(Init(os.path.abspath(engine.path), engine.backend, options))
    except RequestError as error:
        raise OptionError(f"the executor's options: {error}") from error


def _spawn(fd: int, num_threads: int | None) -> subprocess.Popen[bytes]:
    """A worker that has this end of the pair, this sys.path, no stdin, and our stderr."""
    is_number = isinstance(num_threads, int) and not isinstance(num_threads, bool)
    if num_threads is not None and not (is_number and num_threads >= 1):
        raise OptionError(f"num_threads must be None or an integer >= 1; given {num_threads!r}")
    environment = {**os.environ, **thread_settings(num_threads, os.environ)}
    command = [sys.executable, "-c", BOOTSTRAP, path_argument(), str(fd)]
    # Ctrl-C in a terminal goes to all processes, and ours decides. Until the worker ignores it, it
    # is blocked there: the mask is inherited.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            command, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=2, env=environment
        )
    except OSError as error:
        raise EngineError(f"the engine's process cannot be started: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _open_pidfd(pid: int) -> int | None:
    """None where the system has none: the end-of-file must do."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
