"""A stand-in for a device that works by itself: what overlap needs, and a CPU has not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class SlowDevice:
    """A device that runs calls in order, in a thread of its own, each after a random delay."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._thread = ThreadPoolExecutor(1)

    def launch(self, call: Callable[[], Any]) -> Future[Any]:
        delay = self._random.choice([0, 0, 0, 1e-4, 5e-4])

        def run() -> Any:
            time.sleep(delay)
            return call()

        return self._thread.submit(run)

    def close(self) -> None:
        self._thread.shutdown()
