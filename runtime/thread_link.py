"""The way to an executor in a thread of this process: messages are passed as they are."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from inlay.errors import EngineError
from inlay.runtime.ledger import Ledger
from inlay.runtime.loop import serve
from inlay.runtime.messages import Message, Outputs, Reply, Stop

if TYPE_CHECKING:
    from inlay.runtime.admission import Admission
    from inlay.runtime.config import ExecutorConfig
    from inlay.runtime.executor import Executor

logger = logging.getLogger(__name__)


CLOSE_SECONDS = 10.0
"""More than a step takes, if it ends at all."""


class ThreadLink:
    """A Link (see client.py) to a loop in this process."""

    def __init__(self, engine: Any, config: ExecutorConfig | None, ledger: Ledger) -> None:
        """Load here, so that errors are raised here; engine: or a LoadedModel."""
        from inlay.runtime.executor import Executor

        model = engine.load_model() if hasattr(engine, "load_model") else engine
        executor = Executor(model, config)
        self.ledger = ledger
        self.admission: Future[Admission] = Future()
        self.admission.set_result(executor.admission)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # A daemon, since Python waits for all other threads before it tells any to end.
        self.listener = threading.Thread(
            target=self._run, args=(executor,), name="inlay-executor", daemon=True
        )
        self.listener.start()

    def pack(self, message: Message) -> Message:
        """Nothing needs to be packed."""
        return message

    def put(self, message: Message) -> None:
        self._inbox.put(message)

    def close(self) -> None:
        """Stop behind the step that runs, which cannot be interrupted; of one that hangs, no more
        is waited for than CLOSE_SECONDS: the thread ends with the process."""
        if self.ledger.close():
            self.put(Stop())
        if threading.current_thread() is not self.listener:
            self.listener.join(CLOSE_SECONDS)

    def _run(self, executor: Executor) -> None:
        try:
            if executor.model.device.type == "cuda":
                import torch

                torch.cuda.set_device(executor.model.device)  # each thread has one of its own
            serve(executor, self._inbox, self._send)
        except BaseException as error:
            logger.exception("the engine's thread died")
            fatal = EngineError(
                f"the engine's thread died: {type(error).__name__}: {error}; restart() starts a"
                " new one"
            )
            fatal.__cause__ = error
            self.ledger.end(fatal)
        else:
            self.ledger.end(None)

    def _send(self, message: Message) -> None:
        if isinstance(message, Outputs):
            self.ledger.deliver(message.outputs)
        elif isinstance(message, Reply):
            self.ledger.reply(message)
