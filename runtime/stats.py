"""What the executor counts: for `get_stats`, the iteration log and traces."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from inlay.errors import OptionError, RequestError

MAX_TRACE_EVENTS = 1_000_000
"""Events that a trace holds; later ones are not recorded, so that a forgotten one cannot grow."""


@dataclass
class Counters:
    """Sums since the engine began; times in seconds."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_sampled_tokens: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_block_copies: int = 0
    schedule_time: float = 0.0
    prepare_time: float = 0.0
    launch_time: float = 0.0
    wait_time: float = 0.0
    output_time: float = 0.0


@dataclass
class Stats:
    """The counters, and where each step's facts go beside."""

    counters: Counters = field(default_factory=Counters)
    last_step: dict[str, Any] = field(default_factory=dict)
    _trace: list[dict[str, Any]] | None = None
    _log: TextIO | None = None

    @classmethod
    def logging_to(cls, path: str | None) -> Stats:
        """Stats that write each step's facts to this file; nowhere for None."""
        if path is None:
            return cls()
        try:
            return cls(_log=Path(path).open("a", encoding="utf-8"))
        except OSError as error:
            raise OptionError(
                f"iteration_log must be a file that can be written; given {path!r}: {error}"
            ) from error

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the loop: "schedule", "prepare", "launch", "wait" or "output"."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            field_name = f"{name}_time"
            setattr(self.counters, field_name, getattr(self.counters, field_name) + end - begin)
            self._event(name, begin, end, {})

    def step(self, begin: float, facts: dict[str, Any]) -> None:
        """A step's results have been handed out."""
        now = time.perf_counter()
        self.counters.num_steps += 1
        self.last_step = {"step": self.counters.num_steps, "step_time": now - begin, **facts}
        self._event("step", begin, now, facts, thread=1)
        if self._log is not None:
            self._log.write(json.dumps({"time": time.time(), **self.last_step}) + "\n")
            self._log.flush()

    def summary(self) -> dict[str, Any]:
        """All counters, and the last step's facts."""
        return {**asdict(self.counters), "last_step": self.last_step}

    def start_trace(self) -> None:
        """Record what happens from now on; RequestError where that is done already."""
        if self._trace is not None:
            raise RequestError("a trace is being recorded already: end that one first")
        self._trace = []

    def stop_trace(self) -> dict[str, Any]:
        """What was recorded, in Chrome's trace event format (chrome://tracing, Perfetto)."""
        events, self._trace = self._trace or [], None
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def close(self) -> None:
        """Close the iteration log."""
        if self._log is not None:
            self._log.close()

    def _event(
        self, name: str, begin: float, end: float, facts: dict[str, Any], thread: int = 0
    ) -> None:
        if self._trace is not None and len(self._trace) < MAX_TRACE_EVENTS:
            times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
            event = {"name": name, "ph": "X", "pid": 0, "tid": thread, **times, "args": facts}
            self._trace.append(event)
