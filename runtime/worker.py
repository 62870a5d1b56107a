"""The executor's process: see process_link.py, which starts it, and loop.py, which it runs."""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from inlay.errors import RequestError
from inlay.runtime.loop import serve
from inlay.runtime.messages import Failed, Init, Message, Ready, Reply, decode, encode

if TYPE_CHECKING:
    from inlay.runtime.executor import Executor


class _Inbox:
    """Messages from the client. A thread reads them, so that the client never waits for a step,
    and ends the process with the client: at once, in the middle of a load or a step."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inlay-reader", daemon=True).start()

    def get(self, block: bool = True) -> Message:
        return decode(self._queue.get(block))

    def _read(self) -> None:
        try:
            while True:
                self._queue.put(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


class _Outbox:
    """Messages to the client, encoded and sent by a thread, so that no step waits for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="inlay-writer", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        self._queue.put(message)

    def flush(self) -> None:
        """Send what is there and end."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._connection.send_bytes(_encode(message))
            except OSError:  # the client is dead: the reader ends this process
                return
            except BaseException as error:  # nobody may wait for what cannot be sent
                self._connection.send_bytes(encode(Failed(error)))
                os._exit(1)


def _encode(message: Message) -> bytes:
    try:
        return encode(message)
    except RequestError as error:
        if not isinstance(message, Reply):
            raise
        return encode(Reply(message.number, error=error))


def main(fd: int) -> None:
    """Serve the client at the other end of this socket until it says stop or is gone."""
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    inbox, outbox = _Inbox(connection), _Outbox(connection)
    status = 0
    try:
        executor = _load(inbox.get())
        outbox.send(Ready(replace(executor.admission, in_process=False)))
        serve(executor, inbox, outbox.send)
    except BaseException as error:
        outbox.send(Failed(error))
        status = 1
    outbox.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    # What interpreter and libraries would now tear down, the system does as well, and faster.
    os._exit(status)


def _load(message: Message) -> Executor:
    """Of an artifact that the client has opened, and so checked, before."""
    assert isinstance(message, Init), f"not a first message: {message!r}"
    # Late: torch takes a second to import, and the reader already listens.
    from inlay.backends.artifact import Artifact
    from inlay.backends.base import PROCESS
    from inlay.backends.select import get_backend
    from inlay.runtime.config import ExecutorConfig
    from inlay.runtime.executor import Executor

    PROCESS.is_executor = True
    model = get_backend(message.backend).load(Artifact(message.path))
    executor = Executor(model, ExecutorConfig(**message.config))
    # Else each full collection looks through all of torch: 80 ms in the middle of some step.
    gc.collect()
    gc.freeze()
    return executor
