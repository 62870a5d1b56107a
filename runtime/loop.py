"""The executor's loop: take what has come, run a step, send what it gave."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from inlay.runtime.ledger import Pending
from inlay.runtime.messages import Abort, Add, Call, Message, Outputs, Reply, Stop
from inlay.runtime.outputs import StepOutput

logger = logging.getLogger(__name__)


class Inbox(Protocol):
    """A queue of messages; `get` raises queue.Empty where it may not block and nothing is there."""

    def get(self, block: bool = True) -> Message: ...


def serve(executor: Any, inbox: Inbox, send: Callable[[Message], None]) -> None:
    """Run an executor until a Stop comes; it blocks only while there is nothing to run.

    A request that the executor refuses, and all requests of a step that raises, are answered by an
    output with the error. What is raised when no request is there to blame is raised here.
    """
    pending = Pending()
    while True:
        for message in take(inbox, wait=not executor.has_unfinished):
            if isinstance(message, Stop):
                executor.shutdown()
                return
            apply(message, executor, pending, send)
        if outputs := step(executor, pending):
            send(Outputs(outputs))


def take(inbox: Inbox, wait: bool) -> Iterator[Message]:
    """All messages that are there; wait: at least one."""
    try:
        yield inbox.get(block=wait)
        while True:
            yield inbox.get(block=False)
    except queue.Empty:
        return


def apply(
    message: Message, executor: Any, pending: Pending, send: Callable[[Message], None]
) -> None:
    """Do what a message asks for."""
    if isinstance(message, Add):
        name = message.request.request_id
        try:
            executor.add_request(message.request)
            pending.add(message.request)
        except Exception as error:
            send(Outputs([StepOutput(name, finish_reason="error", error=error)]))
    elif isinstance(message, Abort):
        executor.abort(message.request_id, message.index)
        pending.drop(message.request_id, message.index)
    elif isinstance(message, Call):
        try:
            value = getattr(executor, message.method)(*message.args)
            send(Reply(message.number, value))
        except Exception as error:
            send(Reply(message.number, error=error))
    else:
        raise AssertionError(f"not for the executor: {message!r}")


def step(executor: Any, pending: Pending) -> list[StepOutput]:
    """Run a step, if there is anything to run. Should it raise, which is a fault of ours, all
    requests end with that error and the executor goes on with none."""
    if not executor.has_unfinished:
        return []
    try:
        outputs = executor.step()
    except BaseException as error:
        if not pending:
            raise
        logger.exception("a step failed: all requests end")
        failed = pending.take_all()
        for name in failed:
            executor.abort(name)
        return [
            StepOutput(name, finish_reason="error", error=error, index=indices[0])
            for name, indices in failed.items()
        ]
    pending.settle(outputs)
    return outputs
